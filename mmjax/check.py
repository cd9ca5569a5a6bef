"""The one check of feature arrays in the MMSA layout: clean arrays and notes, or one clear error.

`data.from_arrays` and `data_prep.convert` both read through it.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from mmjax import padding, types

SPLITS = ("train", "valid", "test")
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
  "binary_labels": 2,
  "annotations": 1,
}
STRINGS = ("id", "raw_text", "annotations")
FEATURES = ("text", "audio", "vision")
REGRESSION, CLASSES = LABELS = ("regression_labels", "classification_labels")
BINARY = "binary_labels"  # [N, K] answers, 0 or 1, to K binary problems
# of each a key is needed
_GROUPS = (("audio",), ("vision",), ("text", "text_bert"), (*LABELS, BINARY))
# What known datasets bring: the smallest and largest label, the number of classes.
LABEL_RANGES = {
  "mosi": (-3.0, 3.0),
  "mosei": (-3.0, 3.0),
  "sims": (-1.0, 1.0),
  "simsv2": (-1.0, 1.0),
}
NUM_CLASSES = {"iemocap": 4}
# Names of binary problems, in the order in which MulT's files have them.
PROBLEMS = {"iemocap": ("neutral", "happy", "sad", "angry")}


class DataError(types.UsageError):
  """Data that cannot be used; the message says where, what, and how to mend it."""


@dataclasses.dataclass(frozen=True)
class Checked:
  """Clean arrays.

  Attributes:
    arrays: {split: {key: array}}; numbers as they were, strings as object arrays of str.
    replaced: {split: {key: number of entries without a finite float32 value that became 0}}.
    moved: {split: {key: number of rows that were padded in front}}, see `padding`.
    notes: what the user should know, one sentence each.
    left_out: keys that are no fields of the MMSA layout.
  """

  arrays: dict[str, dict[str, np.ndarray]]
  replaced: dict[str, dict[str, int]]
  moved: dict[str, dict[str, int]]
  notes: list[str]
  left_out: list[str]


def known(table: Mapping[str, Any], dataset: str) -> Any:
  """A known dataset's entry, or None: "SIMS_v2", "sims-v2" and "simsv2" are one name.

  Other names that begin like one, such as "mosi_long", are datasets of their own.
  """
  return table.get(re.sub(r"[^a-z0-9]", "", dataset.lower()))


def check(
  found: Any,
  path: str,
  dataset: str,
  *,
  task: str | None = None,
  label_range: tuple[float, float] | None = None,
  own: bool = False,
) -> Checked:
  """Checks arrays in the MMSA layout, see `data`.

  Args:
    found: {split: {key: array or list}}. Labels may be [N, 1] or [N, 1, 1], classes one-hot [N, C],
      ids tuples such as (video, start, end); MulT's `labels` stands for the labels, and may be the
      answers to binary problems: [N, K], or one-hot [N, K, 2] of no and yes.
    path: the file (or what else names the data), for messages.
    dataset: its name; known ones bring the labels' range.
    task: "regression" or "classification", if it is known; what only the other needs is not noted.
    label_range: smallest and largest label, if the name is not a known one.
    own: whether `found` may be emptied and its arrays written to, which saves memory.

  Returns:
    The arrays: features without a finite float32 value are 0 (MMSA does this to audio), and rows
    that were padded in front begin with their real steps (see `padding`).

  Raises:
    DataError: at the first fault.
  """
  if not isinstance(found, Mapping):
    fail(path, found=f"a {type(found).__name__}", expected="a dictionary of splits")
  arrays, notes, left_out = {}, [], set()
  if others := sorted(map(repr, found.keys() - set(SPLITS))):
    notes.append(f"left out, not the splits train, valid and test: {', '.join(others)}")
  for split in SPLITS:
    if split not in found:
      fail(path, split, found=f"the splits {sorted(map(str, found))}", expected="this split too")
    fields = found[split]
    if not isinstance(fields, Mapping):
      fail(path, split, found=f"a {type(fields).__name__}", expected="a dictionary of fields")
    fields = {key: value for key, value in fields.items() if value is not None}
    if own and isinstance(found, dict):
      found[split] = None  # each array is let go when its clean one is there
    _name_labels(fields, path, split, dataset, notes)
    left_out |= {str(key) for key in fields if key not in RANKS}
    arrays[split] = _clean(fields, _GROUPS, path, split, notes)
    _check_values(arrays[split], path, split, dataset, label_range)
  _check_across(arrays, path)
  _add_classes(arrays, notes)
  if CLASSES in arrays["train"]:
    notes += _check_classes(arrays, path) if task != "regression" else []
  if left_out:
    notes.append(f"left out, not in the MMSA layout: {', '.join(sorted(left_out))}")
  replaced, moved = {}, {}
  for split, fields in arrays.items():
    replaced[split] = _replace(fields, split, own, notes)
    moved[split], more = padding.straighten(fields, split, own)
    notes += more
  return Checked(arrays, replaced, moved, list(dict.fromkeys(notes)), sorted(left_out))


def check_inputs(
  fields: Mapping[str, Any], path: str, split: str, lacking: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray], list[str]]:
  """Checks the arrays of one split that is only to be predicted: labels are not read.

  Args:
    fields: {key: array or list}; they are not changed.
    path: the file, for messages.
    split: names the split in messages, and samples without ids.
    lacking: modalities that need not be there.

  Returns:
    Clean arrays as `check` gives them, and notes.

  Raises:
    DataError: at the first fault.
  """
  notes: list[str] = []
  known = {key: v for key, v in fields.items() if v is not None and key in RANKS}
  known = {k: v for k, v in known.items() if k not in LABELS and not k.startswith(REGRESSION)}
  needed = [group for group in _GROUPS[:3] if group[0] not in lacking]
  clean = _clean(known, needed, path, split, notes)
  _check_lengths(clean, path, split)
  _replace(clean, split, False, notes)
  _, more = padding.straighten(clean, split, False)
  return clean, notes + more


class Files(str):
  """Names of several files, for messages; `came[split, key]` is the one that an array came from."""

  came: Mapping[tuple[str, str], str]


def fail(path, split=None, key=None, *, found, expected) -> NoReturn:
  """Raises the error of one fault."""
  path = path.came.get((str(split), str(key)), path) if isinstance(path, Files) else path
  where = "".join(f", {kind} {name!r}" for kind, name in (("split", split), ("key", key)) if name)
  raise DataError(f"{path}{where}: found {found}, expected {expected}.")


def _name_labels(fields, path, split, dataset, notes) -> None:
  """MulT's files call the labels `labels`."""
  if "labels" in fields and not any(key in fields for key in (*LABELS, BINARY)):
    labels = _numbers(fields.pop("labels"), path, split, "labels")
    key = CLASSES if known(NUM_CLASSES, dataset) else REGRESSION
    several = labels.ndim == 2 and np.isin(labels, (0, 1)).all() and (labels.sum(1) != 1).any()
    if labels.ndim == 3 and labels.shape[2] == 2 or key == CLASSES and several:
      key = BINARY
    fields[key] = labels
    notes.append(f"'labels' were read as {key!r}")


def _clean(fields, needed, path, split, notes) -> dict[str, np.ndarray]:
  """The known fields as arrays of equally many rows; of each needed group one must be there."""
  for group in needed:
    if not any(key in fields for key in group):
      keys = f"the keys {sorted(map(str, fields))}"
      fail(path, split, " or ".join(group), found=keys, expected="this key too")
  clean = {}
  for key, rank in RANKS.items():
    if key not in fields:
      continue
    value = fields.pop(key)
    if key in STRINGS:
      clean[key] = _texts(value, path, split, key)
    elif key in LABELS or key.startswith(REGRESSION):
      clean[key] = _labels(_numbers(value, path, split, key), path, split, key, notes)
    elif key == BINARY:
      clean[key] = _answers(_numbers(value, path, split, key), path, split)
    else:
      clean[key] = _shaped(_numbers(value, path, split, key), rank, path, split, key)
  if "id" not in clean:
    named = [f"{split}_{row}" for row in range(len(next(iter(clean.values()))))]
    clean["id"] = _texts(named, path, split, "id")
    notes.append("there are no ids: samples are named by their split and row")
  rows = len(clean["id"])
  if not rows:
    fail(path, split, "id", found="no rows", expected="at least one sample")
  for key, value in clean.items():
    if len(value) != rows:
      fail(path, split, key, found=f"{len(value)} rows", expected=f"{rows}, as many as ids")
  return clean


def _texts(value, path, split, key) -> np.ndarray:
  """Strings, or tuples of them such as MulT's ids (video, start, end), as str objects."""
  joint = "$_$" if key == "id" else " "  # as in MMSA's ids, video$_$clip
  if isinstance(value, str | bytes) or not np.iterable(value):
    fail(path, split, key, found=f"a {type(value).__name__}", expected="one string for each row")

  def text(v):
    if isinstance(v, list | tuple | np.ndarray):
      return joint.join(text(part) for part in v)
    return v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v)

  texts = [text(v) for v in value]
  array = np.empty(len(texts), object)
  array[:] = texts
  return array


def _numbers(value, path, split, key) -> np.ndarray:
  try:
    array = np.asarray(value)
    if array.dtype.kind in "cmM":
      raise TypeError(f"its type is {array.dtype}")
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
      with np.errstate(over="ignore"):  # counted later; rows may be arrays themselves
        array = np.array(array.tolist() if array.dtype == object else array, np.float32)
  except (ValueError, TypeError) as error:
    fail(path, split, key, found=f"no array of numbers ({error})", expected="one of equal rows")
  if not array.dtype.isnative:
    array = array.astype(array.dtype.newbyteorder("="))
  if not array.ndim:
    fail(path, split, key, found="a single number", expected="an array, rows first")
  return array


def _shaped(array, rank, path, split, key) -> np.ndarray:
  if rank == 1:
    array = _squeeze(array)
  if array.ndim != rank:
    fail(path, split, key, found=f"shape {array.shape}", expected=f"{rank} axes, rows first")
  if rank == 3 and 0 in array.shape[1:]:
    expected = "at least one step and one channel; fill a modality that is absent with zeros"
    fail(path, split, key, found=f"shape {array.shape}", expected=expected)
  return array


def _squeeze(array) -> np.ndarray:
  """[N, 1, 1] -> [N]."""
  while array.ndim > 1 and array.shape[-1] == 1:
    array = array[..., 0]
  return array


def _labels(array, path, split, key, notes) -> np.ndarray:
  """[N] labels."""
  array = _squeeze(array)
  shape = f"shape {array.shape}"
  if key == CLASSES and array.ndim == 2:
    if not (np.isin(array, (0, 1)).all() and (array.sum(1) == 1).all()):
      expected = "[N] classes 0 … C-1, or [N, C] rows with a single 1: one class for each row"
      fail(path, split, key, found=shape, expected=expected)
    notes.append(f"{key!r} are one-hot rows of {array.shape[1]} columns and were read as classes")
    array = array.argmax(1)
  if array.ndim != 1:
    expected = "one label for each row, [N]; keep one column, such as labels[:, 0]"
    fail(path, split, key, found=shape, expected=expected)
  return array


def _answers(array, path, split) -> np.ndarray:
  """[N, K] answers to binary problems, 0 or 1."""
  pairs = array.ndim == 3 and array.shape[2] == 2
  if not np.isin(array, (0, 1)).all() or (pairs and (array.sum(2) != 1).any()):
    expected = "answers 0 or 1, or rows (1, 0) for no and (0, 1) for yes"
    fail(path, split, BINARY, found="other values", expected=expected)
  array = array.argmax(2) if pairs else array
  if array.ndim != 2 or array.shape[1] < 2:
    expected = "[N, K] answers to at least two problems, or [N, K, 2] of no and yes"
    fail(path, split, BINARY, found=f"shape {array.shape}", expected=expected)
  return array.astype(np.int64)


def _add_classes(arrays, notes) -> None:
  """Where every sample has exactly one yes, binary problems are classes too."""
  if CLASSES in arrays[SPLITS[0]] or BINARY not in arrays[SPLITS[0]]:
    return
  if all((fields[BINARY].sum(1) == 1).all() for fields in arrays.values()):
    for fields in arrays.values():
      fields[CLASSES] = fields[BINARY].argmax(1)
    notes.append(f"{BINARY!r} have one yes in each row and were read as {CLASSES!r} too")


def _at_fault(path, split, key, clean, wrong, expected) -> None:
  """Fails at the first row that is wrong."""
  if wrong.any():
    row = int(np.argmax(wrong))
    found = f"{clean[key][row]} in row {row} ({clean['id'][row]})"
    fail(path, split, key, found=found, expected=expected)


def _check_values(clean, path, split, dataset, label_range) -> None:
  names, counts = np.unique(clean["id"].astype(str), return_counts=True)
  if (counts > 1).any():
    fail(path, split, "id", found=f"{str(names[counts > 1][0])!r} twice", expected="each id once")
  _check_lengths(clean, path, split)
  low, high = label_range or known(LABEL_RANGES, dataset) or (-np.inf, np.inf)
  classes = known(NUM_CLASSES, dataset)
  for key in clean:
    if key.startswith(REGRESSION):
      with np.errstate(over="ignore"):
        wrong = ~np.isfinite(clean[key].astype(np.float32))
      _at_fault(path, split, key, clean, wrong, "a finite label")
      wrong = (clean[key] < low) | (clean[key] > high)
      _at_fault(path, split, key, clean, wrong, f"labels from {low:g} to {high:g}")
  if CLASSES in clean:
    values = clean[CLASSES]
    _at_fault(path, split, CLASSES, clean, ~np.isfinite(values), "a finite label")
    wrong = (values < 0) | (values != np.floor(values)) | (values >= (classes or np.inf))
    expected = f"whole classes from 0 to {classes - 1 if classes else 'C-1'}; renumber them"
    _at_fault(path, split, CLASSES, clean, wrong, expected)


def _check_lengths(clean, path, split) -> None:
  """Tokens, and the lengths of audio and vision."""
  if "text_bert" in clean:
    _check_tokens(clean["text_bert"], path, split)
  for m in ("audio", "vision"):
    key = f"{m}_lengths"
    if key in clean and m in clean:
      lengths, steps = clean[key], clean[m].shape[1]
      right = (lengths >= 0) & (lengths <= steps) & (lengths == np.floor(lengths))
      expected = f"whole numbers from 0 to {steps}, the steps of {m!r}"
      _at_fault(path, split, key, clean, ~right, expected)


def _check_tokens(tokens, path, split) -> None:
  layout = "[N, 3, L]: ids, attention mask, segments"
  if tokens.shape[1] != 3:
    fail(path, split, "text_bert", found=f"shape {tokens.shape}", expected=layout)
  for n, part in enumerate(("id", "attention mask", "segment")):
    values = tokens[:, n]
    wrong = ~((values >= 0) & (values == np.floor(values)) & (values < 2**31))
    if wrong.any():
      row, step = np.argwhere(wrong)[0]
      found = f"the {part} {values[row, step]} in row {row}, step {step}"
      fail(path, split, "text_bert", found=found, expected="whole numbers from 0 on")
  if not tokens[:, 1].any() and tokens[:, 2].any():
    found = "an attention mask of zeros and segments that are not"
    fail(path, split, "text_bert", found=found, expected=layout + ", in this order")


def _check_across(arrays, path) -> None:
  """All splits have the same fields with the same shapes, and no sample stands in two."""
  first, seen = arrays[SPLITS[0]], {}
  for split, fields in arrays.items():
    if fields.keys() != first.keys():
      key = sorted(fields.keys() ^ first.keys())[0]
      fail(path, split, key, found="it in some splits only", expected="it in all splits or none")
    for key, value in fields.items():
      if value.shape[1:] != first[key].shape[1:]:
        expected = f"{first[key].shape[1:]}, as in {SPLITS[0]!r}"
        fail(path, split, key, found=f"rows of shape {value.shape[1:]}", expected=expected)
    for name in fields["id"]:
      if seen.setdefault(name, split) != split:
        found = f"{name!r}, which is in {seen[name]!r} too"
        fail(path, split, "id", found=found, expected="each id once")


def _check_classes(arrays, path) -> list[str]:
  """Classes begin at 0; those that no training sample has are noted."""
  found = np.unique(np.concatenate([fields[CLASSES] for fields in arrays.values()]))
  if found[0] > 0:
    expected = f"classes from 0 on; subtract {found[0]:g}"
    fail(path, None, CLASSES, found=f"no class below {found[0]:g}", expected=expected)
  unseen = np.setdiff1d(np.arange(found[-1] + 1), arrays["train"][CLASSES])
  listed = ", ".join(f"{c:g}" for c in unseen[:9])
  return [f"train/{CLASSES}: no sample has the class {listed}"] if len(unseen) else []


def _replace(fields, split, own, notes) -> dict[str, int]:
  """Features that have no finite float32 value become 0 -> how many, by key."""
  replaced = {}
  for key in FEATURES:
    if key not in fields or fields[key].dtype.kind != "f":
      continue
    x = fields[key]
    for part in padding.blocks(x):
      with np.errstate(over="ignore"):
        bad = ~np.isfinite(x[part].astype(np.float32, copy=False))
      if bad.any():
        if key not in replaced and not (own and x.flags.writeable):
          fields[key] = x = x.copy()
        replaced[key] = replaced.get(key, 0) + int(bad.sum())
        x[part][bad] = 0
    if key in replaced:
      text = "NaN or infinite values (also those beyond float32) became 0"
      notes.append(f"{split}/{key}: {replaced[key]} {text}")
  return replaced
