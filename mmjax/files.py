"""Feature files -> dictionaries in the MMSA layout: a pickle, `.npz` or `.safetensors`, or several.

A file holds splits, {"train": {"audio": array, …}, …}, or the fields of one split. In `.npz` and
`.safetensors`, which have flat names, a split's field is "train/audio" (or "train.audio"). What
stands in several files is put together:

- one per modality: each has the same splits, with fields of its own; or, named as a field
  (`audio.pkl`), that field's arrays by split;
- one per split: a file with the fields of one split is named as it (`train.pkl`, `mosi_valid.npz`).
"""

import os
import pathlib
import re
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax import check, unpickle

Path = str | os.PathLike
# What a file's name may call a split.
_SPLITS = {"dev": "valid", "val": "valid", **{split: split for split in check.SPLITS}}


def read(paths: Sequence[Path]) -> Any:
  """Reads feature files and puts them together; `check.check` tells whether they are right.

  Args:
    paths: the files of one dataset; of one file, any content is given back.

  Returns:
    {split: {key: array or list}}, or the fields of one split (or sample).

  Raises:
    DataError: if a file cannot be read, or two of them have the same array.
  """
  if len(paths) == 1:
    return read_file(paths[0])
  merged: dict[str, dict[str, Any]] = {}
  came: dict[tuple[str, str], Path] = {}
  for path in paths:
    for split, fields in _splits_of(read_file(path), path).items():
      for key, value in fields.items():
        if key == "id" and "id" in merged.get(split, {}):
          _check_ids(merged[split]["id"], value, path, split, came[split, "id"])
          continue
        if (split, key) in came:
          found = f"it in {os.fspath(came[split, key])} too"
          check.fail(os.fspath(path), split, key, found=found, expected="each array in one file")
        came[split, key] = path
        merged.setdefault(split, {})[key] = value
  return merged


def read_file(path: Path) -> Any:
  """What stands in one file; nothing in it is run, see `unpickle`."""
  path = pathlib.Path(path)
  try:
    if path.suffix == ".npz":
      with np.load(path, allow_pickle=False) as found:
        return _nested({name: found[name] for name in found.files})
    if path.suffix == ".safetensors":
      import safetensors.numpy

      return _nested(safetensors.numpy.load_file(path))
    return unpickle.load(path)
  except unpickle.UnpickleError as error:
    raise check.DataError(str(error)) from None
  except FileNotFoundError:
    raise check.DataError(f"{path}: there is no such file.") from None
  except _unreadable() as error:
    expected = "arrays of numbers and strings (no objects)"
    check.fail(str(path), found=f"no readable {path.suffix[1:]} file ({error})", expected=expected)


def _unreadable() -> tuple[type[Exception], ...]:
  import safetensors

  return OSError, ValueError, EOFError, zipfile.BadZipFile, safetensors.SafetensorError


def _nested(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """{"train/audio": a} -> {"train": {"audio": a}}; names without a split stay."""
  found: dict[str, Any] = {}
  for name, value in flat.items():
    value = value[()] if value.ndim == 0 else value  # a sample's id
    split, mark, key = name.replace(".", "/", 1).partition("/")
    if mark:
      found.setdefault(split, {})[key] = value
    else:
      found[name] = value
  return found


def _splits_of(found: Any, path: Path) -> dict[str, Mapping[str, Any]]:
  """A file's content by split."""
  name = os.fspath(path)
  if not isinstance(found, Mapping):
    check.fail(name, found=f"a {type(found).__name__}", expected="a dictionary")
  stem = pathlib.Path(path).stem.lower()
  splits = {split: fields for split, fields in found.items() if split in check.SPLITS}
  if splits and all(isinstance(fields, Mapping) for fields in splits.values()):
    return splits
  if splits:  # arrays by split
    if stem in check.RANKS:
      return {split: {stem: value} for split, value in splits.items()}
    expected = "a name that says which field it is, as audio.pkl"
    check.fail(name, found="an array for each split", expected=expected)
  named = [_SPLITS[word] for word in re.split(r"[^a-z0-9]+", stem) if word in _SPLITS]
  if len(named) != 1:
    expected = "a name that says of which split they are, as train.pkl"
    check.fail(name, found="the fields of one split", expected=expected)
  return {named[0]: found}


def _check_ids(known: Any, ids: Any, path: Path, split: str, first: Path) -> None:
  """Files of the same split must have the same samples in the same order."""
  if [str(i) for i in known] != [str(i) for i in ids]:
    expected = f"those of {os.fspath(first)}, in the same order"
    check.fail(os.fspath(path), split, "id", found="other ids", expected=expected)
