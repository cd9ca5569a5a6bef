"""Checks a feature pickle strictly and turns it into clean arrays: one clear error, or none."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_prep import unpickle
from mmjax import data

# Rank of each field's array, the rows included.
RANKS = {
  "id": 1,
  "raw_text": 1,
  "text": 3,
  "text_bert": 3,
  "audio": 3,
  "vision": 3,
  "audio_lengths": 1,
  "vision_lengths": 1,
  "regression_labels": 1,
  "regression_labels_T": 1,
  "regression_labels_A": 1,
  "regression_labels_V": 1,
  "classification_labels": 1,
  "annotations": 1,
}
STRINGS = ("id", "raw_text", "annotations")
FEATURES = ("text", "audio", "vision")
LABELS = ("regression_labels", "classification_labels")
NUM_CLASSES = {"iemocap": 4}


@dataclasses.dataclass(frozen=True)
class Checked:
  """Clean arrays.

  Attributes:
    arrays: {split: {key: array}}; numbers as they were, strings as object arrays of str.
    replaced: {split: {key: number of NaN or infinite entries that became 0}}.
    left_out: keys of the file that are no fields of the MMSA layout.
  """

  arrays: dict[str, dict[str, np.ndarray]]
  replaced: dict[str, dict[str, int]]
  left_out: list[str]


def read(path: str | os.PathLike, dataset: str) -> Checked:
  """Reads and checks a pickle; see `check`."""
  try:
    found = unpickle.load(path)
  except unpickle.UnpickleError as error:
    raise data.DataError(str(error)) from None
  return check(found, os.fspath(path), dataset)


def check(found: Any, path: str, dataset: str) -> Checked:
  """Checks what was unpickled.

  Args:
    found: {split: {key: array or list}}.
    path: the file, for messages.
    dataset: its name; known ones bring the labels' range.

  Returns:
    The arrays, with every non-finite feature replaced by 0 (MMSA does this to audio).

  Raises:
    data.DataError: at the first fault.
  """
  if not isinstance(found, Mapping):
    _fail(path, found=f"a {type(found).__name__}", expected="a dictionary of splits")
  arrays, replaced, left_out = {}, {}, set()
  for split in data.SPLITS:
    if split not in found:
      _fail(path, split, found=f"the splits {sorted(map(str, found))}", expected="this split too")
    fields = found[split]
    if not isinstance(fields, Mapping):
      _fail(path, split, found=f"a {type(fields).__name__}", expected="a dictionary of fields")
    arrays[split], replaced[split] = _check_split(fields, path, split, dataset)
    left_out |= {str(key) for key in fields if key not in RANKS}
  _check_across(arrays, path)
  return Checked(arrays, replaced, sorted(left_out))


def _fail(path, split=None, key=None, *, found, expected):
  where = "".join(f", {kind} {name!r}" for kind, name in (("split", split), ("key", key)) if name)
  raise data.DataError(f"{path}{where}: found {found}, expected {expected}.")


def _check_split(fields, path, split, dataset):
  for group in (("id",), ("audio",), ("vision",), ("text", "text_bert"), LABELS):
    if not any(key in fields for key in group):
      _fail(
        path,
        split,
        " or ".join(group),
        found=f"the keys {sorted(map(str, fields))}",
        expected="this key too",
      )
  clean, replaced = {}, {}
  for key, rank in RANKS.items():
    if key in fields:
      clean[key] = _to_array(fields[key], key, rank, path, split)
  rows = len(clean["id"])
  if not rows:
    _fail(path, split, "id", found="no rows", expected="at least one sample")
  for key, value in clean.items():
    if len(value) != rows:
      _fail(path, split, key, found=f"{len(value)} rows", expected=f"{rows}, as many as ids")
    if value.dtype.kind == "f" and not np.isfinite(value).all():
      bad = ~np.isfinite(value)
      if key in LABELS or key.startswith("regression_labels"):
        row = int(np.argwhere(bad)[0, 0])
        _fail(path, split, key, found=f"{value[row]} in row {row}", expected="a finite label")
      clean[key] = np.where(bad, 0, value).astype(value.dtype)
      replaced[key] = int(bad.sum())
  _check_values(clean, path, split, dataset)
  return clean, replaced


def _to_array(value, key, rank, path, split) -> np.ndarray:
  if key in STRINGS:
    texts = [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in value]
    array = np.empty(len(texts), object)
    array[:] = texts
    return array
  try:
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
      array = array.astype(np.float32)
  except (ValueError, TypeError) as error:
    _fail(path, split, key, found=f"no array of numbers ({error})", expected="one of equal rows")
  if rank == 1 and array.ndim == 2 and array.shape[1] == 1:
    array = array[:, 0]
  if array.ndim != rank:
    _fail(path, split, key, found=f"shape {array.shape}", expected=f"{rank} axes, rows first")
  return array


def _check_values(clean, path, split, dataset) -> None:
  names, counts = np.unique(clean["id"].astype(str), return_counts=True)
  if (counts > 1).any():
    _fail(path, split, "id", found=f"{str(names[counts > 1][0])!r} twice", expected="each id once")
  if "text_bert" in clean and clean["text_bert"].shape[1] != 3:
    _fail(
      path,
      split,
      "text_bert",
      found=f"shape {clean['text_bert'].shape}",
      expected="[N, 3, L]: ids, attention mask, segments",
    )
  for m in ("audio", "vision"):
    lengths, steps = clean.get(f"{m}_lengths"), clean[m].shape[1]
    if lengths is not None and not ((lengths >= 0) & (lengths <= steps)).all():
      row = int(np.argmax((lengths < 0) | (lengths > steps)))
      _fail(
        path,
        split,
        f"{m}_lengths",
        found=f"{lengths[row]} in row {row}",
        expected=f"0 to {steps}, the steps of {m!r}",
      )
  low, high = next(
    (r for name, r in data.LABEL_RANGES.items() if dataset.lower().startswith(name)),
    (-np.inf, np.inf),
  )
  ranges = {key: (low, high) for key in clean if key.startswith("regression_labels")}
  if "classification_labels" in clean:
    classes = NUM_CLASSES.get(dataset.lower())
    ranges["classification_labels"] = (0, classes - 1 if classes else np.inf)
  for key, (least, most) in ranges.items():
    wrong = (clean[key] < least) | (clean[key] > most)
    if key == "classification_labels":
      wrong |= clean[key] != np.floor(clean[key])
    if wrong.any():
      row = int(np.argmax(wrong))
      _fail(
        path,
        split,
        key,
        found=f"{clean[key][row]} in row {row} ({clean['id'][row]})",
        expected=f"{'classes' if key == LABELS[1] else 'labels'} from {least:g} to {most:g}",
      )


def _check_across(arrays, path) -> None:
  """All splits have the same fields with the same shapes, and no sample stands in two."""
  first, seen = arrays[data.SPLITS[0]], {}
  for split, fields in arrays.items():
    if fields.keys() != first.keys():
      key = sorted(fields.keys() ^ first.keys())[0]
      _fail(path, split, key, found="it in some splits only", expected="it in all splits or none")
    for key, value in fields.items():
      if value.shape[1:] != first[key].shape[1:]:
        _fail(
          path,
          split,
          key,
          found=f"rows of shape {value.shape[1:]}",
          expected=f"{first[key].shape[1:]}, as in {data.SPLITS[0]!r}",
        )
    for name in fields["id"]:
      if seen.setdefault(name, split) != split:
        _fail(
          path,
          split,
          "id",
          found=f"{name!r}, which is in {seen[name]!r} too",
          expected="each id once",
        )
