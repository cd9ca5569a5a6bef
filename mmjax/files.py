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
from typing import Any, NamedTuple

import numpy as np

from mmjax import check, unpickle

Path = str | os.PathLike
# What a file's name may call a split.
_SPLITS = {"dev": "valid", "val": "valid", **{split: split for split in check.SPLITS}}


class Found(NamedTuple):
  """What stands in feature files; `check.check` tells whether it is right.

  Attributes:
    content: {split: {key: array or list}}, or the fields of one split (or sample); of one file
      anything.
    name: of the files, for messages; a `check.Files` if there are several.
    notes: what the user should know, one sentence each.
  """

  content: Any
  name: str
  notes: list[str]


def read(paths: Sequence[Path]) -> Found:
  """Reads feature files and puts them together.

  Args:
    paths: the files of one dataset.

  Raises:
    DataError: if a file cannot be read, or two of them do not go together.
  """
  if len(paths) == 1:
    return Found(read_file(paths[0]), str(paths[0]), [])
  merged: dict[str, dict[str, Any]] = {}
  came: dict[tuple[str, str], str] = {}
  notes = []
  names = [str(path) for path in paths]
  for path in names:
    for split, fields in _splits_of(read_file(path), path).items():
      known = merged.setdefault(split, {})
      for key, value in fields.items():
        if key in known:
          _check_same(known[key], value, path, split, key, came[split, key])
        else:
          known[key], came[split, key] = value, path
      if known.keys() - fields.keys() and not ("id" in fields and came[split, "id"] != path):
        notes.append(f"{path} and the files before it are put together by the order of their rows")
  name = check.Files(", ".join(names))
  name.came = came
  return Found(merged, name, list(dict.fromkeys(notes)))


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


def _splits_of(found: Any, path: str) -> dict[str, Mapping[str, Any]]:
  """A file's content by split."""
  if not isinstance(found, Mapping):
    check.fail(path, found=f"a {type(found).__name__}", expected="a dictionary")
  stem = pathlib.Path(path).stem.lower()
  splits = {split: fields for split, fields in found.items() if isinstance(fields, Mapping)}
  if splits:
    return splits
  if found.keys() & set(check.SPLITS):  # arrays by split
    if stem in check.RANKS:
      return {split: {stem: value} for split, value in found.items()}
    expected = "a name that says which field it is, as audio.pkl"
    check.fail(path, found="an array for each split", expected=expected)
  named = [_SPLITS[word] for word in re.split(r"[^a-z0-9]+", stem) if word in _SPLITS]
  if len(named) != 1:
    expected = "a name that says of which split they are, as train.pkl"
    check.fail(path, found="the fields of one split", expected=expected)
  return {named[0]: found}


def _check_same(known: Any, value: Any, path: str, split: str, key: str, first: str) -> None:
  """What stands in two files must be the same there; ids too, in the same order."""
  try:
    known, value = np.asarray(known), np.asarray(value)
    same = known.shape == value.shape and bool(np.all(known == value))
  except ValueError:  # rows of unlike lengths
    same = False
  if not same:
    expected = f"the same as in {first}, or it in one file only"
    check.fail(path, split, key, found="other values", expected=expected)
