"""The dataset card: what a converted dataset holds, as numbers and as text."""

import collections
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax import check, data, padding


def make_card(
  checked: check.Checked, paths: Sequence[pathlib.Path], dataset: str, file_format: str
) -> dict[str, Any]:
  """The statistics of a dataset, as JSON values.

  Args:
    checked: its clean arrays.
    paths: the files that they come from.
    dataset: its name.
    file_format: how it is stored.

  Returns:
    Rows, fields, lengths, label histogram, the training mean and standard deviation of audio's
    and vision's channels over the valid steps (none where there are no such steps), the largest
    token id, replaced values, rows that were padded in front, notes, shared videos, the files.
  """
  arrays = checked.arrays
  train = arrays["train"]
  valid = {split: data.valid_steps(fields) for split, fields in arrays.items()}
  return {
    "dataset": dataset,
    "file_format": file_format,
    "pickle": ", ".join(path.name for path in paths),
    "sha256": data.digest(paths),
    "rows": {split: len(fields["id"]) for split, fields in arrays.items()},
    "fields": {
      key: {"shape": list(value.shape[1:]), "dtype": _dtype(value)} for key, value in train.items()
    },
    "left_out": checked.left_out,
    "lengths": {
      split: {name: _spread(steps.sum(1)) for name, steps in found.items()}
      for split, found in valid.items()
    },
    "labels": {
      split: {key: _histogram(fields[key]) for key in check.LABELS if key in fields}
      | {k: _histogram(fields[k].nonzero()[1]) for k in (check.BINARY,) if k in fields}  # each yes
      for split, fields in arrays.items()
    },
    "standardize": {
      name: _moments(train[name], valid["train"][name])
      for name in data.STANDARDIZED
      if valid["train"][name].any()
    },
    "largest_id": max(
      (int(f["text_bert"][:, 0].max()) for f in arrays.values() if "text_bert" in f), default=None
    ),
    "replaced": checked.replaced,
    "moved": checked.moved,
    "notes": checked.notes,
    "videos_in_two_splits": _shared_videos(arrays),
  }


def _dtype(value: np.ndarray) -> str:
  return "str" if value.dtype == object else str(value.dtype)


def _spread(lengths: np.ndarray) -> dict[str, float]:
  return {"min": int(lengths.min()), "mean": float(lengths.mean()), "max": int(lengths.max())}


def _histogram(labels: np.ndarray) -> dict[str, int]:
  """Counts of the labels, rounded to whole numbers where they are not classes."""
  values, counts = np.unique(np.round(labels).astype(int), return_counts=True)
  return {str(value): int(count) for value, count in zip(values, counts, strict=True)}


def _moments(x: np.ndarray, valid: np.ndarray) -> dict[str, list[float]]:
  """Mean and standard deviation of each channel over the valid steps; no copy of x as a whole."""

  def mean(function):
    total = np.zeros(x.shape[-1])
    for part in padding.blocks(x):
      total += function(x[part][valid[part]].astype(np.float64)).sum(0)
    return total / valid.sum()

  center = mean(lambda steps: steps)
  return {"mean": center.tolist(), "std": np.sqrt(mean(lambda s: (s - center) ** 2)).tolist()}


def _shared_videos(arrays) -> list[dict[str, Any]]:
  """Videos ("video$_$clip") whose clips stand in more than one split."""
  splits = collections.defaultdict(set)
  for split, fields in arrays.items():
    for name in fields["id"]:
      if "$_$" in name:
        splits[name.split("$_$")[0]].add(split)
  return [{"video": v, "splits": sorted(s)} for v, s in sorted(splits.items()) if len(s) > 1]


def to_text(card: dict[str, Any]) -> str:
  """The card for the terminal."""
  lines = [
    f"{card['dataset']}  ({card['file_format']}, from {card['pickle']},"
    f" sha256 {card['sha256'][:12]}…)",
    "rows     " + ", ".join(f"{split} {rows}" for split, rows in card["rows"].items()),
    "fields   "
    + ", ".join(f"{k} {tuple(f['shape']) or ''}".strip() for k, f in card["fields"].items()),
    "lengths  (training: least, mean, most)",
  ]
  lines += [
    f"  {name:7}{s['min']:5d} {s['mean']:7.1f} {s['max']:5d}"
    for name, s in card["lengths"]["train"].items()
  ]
  for split, labels in card["labels"].items():
    for key, counts in labels.items():
      lines.append(f"{split} {key}: " + ", ".join(f"{v}: {n}" for v, n in counts.items()))
  lines += [f"note: {note}" for note in card.get("notes", ())]  # older cards have none
  if card["videos_in_two_splits"]:
    names = ", ".join(entry["video"] for entry in card["videos_in_two_splits"][:5])
    lines.append(
      f"note: {len(card['videos_in_two_splits'])} videos have clips in two splits ({names} …):"
      " test results may profit from speakers seen in training"
    )
  return "\n".join(lines)
