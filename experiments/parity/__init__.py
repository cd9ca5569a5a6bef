"""Compares ports with arrays recorded from the published code: `python -m experiments.parity`."""

import importlib
import pathlib
import pkgutil
import zipfile
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from . import goldens

# A tensor that should be zero (the bias of attention keys has no gradient) holds rounding noise
# on both sides; its error is taken relative to this share of the group's largest magnitude.
FLOOR = 1e-3


class Group(NamedTuple):
  """The comparison of one group: number of tensors, worst relative error and where, verdict."""

  name: str
  tensors: int
  worst: float
  where: str
  ok: bool


def names() -> list[str]:
  """The files that can be compared."""
  return sorted(module.name for module in pkgutil.iter_modules(goldens.__path__))


def find(path: pathlib.Path):
  """The module that compares a file: the longest known name that starts the file's name."""
  stem = path.stem.lower().replace("-", "_")
  known = [name for name in names() if stem.startswith(name)]
  if not known:
    raise ValueError(f"the file's name starts with none of {', '.join(names())}.")
  return importlib.import_module(f"{__package__}.goldens.{max(known, key=len)}")


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """All arrays of an npz file."""
  try:
    with np.load(path, allow_pickle=False) as z:
      return {key: z[key] for key in z.files}
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(f"cannot be read as an npz file ({error}).") from None


def judge(rows: Iterable[goldens.Row], tolerance: float, grad_tolerance: float) -> list[Group]:
  """Compares the tensors of each group with its tolerance."""
  groups = {}
  for group, name, ours, theirs in rows:
    groups.setdefault(group, []).append((name, np.asarray(ours), np.asarray(theirs)))
  verdicts = []
  for group, tensors in groups.items():
    allowed = grad_tolerance if group.startswith("grad") else tolerance
    floor = FLOOR * max((np.abs(t).max() for _, _, t in tensors if t.size), default=0)
    errors = {name: _error(ours, theirs, floor) for name, ours, theirs in tensors}
    where = max(errors, key=lambda name: errors[name])
    verdicts.append(Group(group, len(tensors), errors[where], where, errors[where] <= allowed))
  return verdicts


def uncovered(arrays: Iterable[str], rows: Iterable[goldens.Row]) -> list[str]:
  """Keys of recorded outputs and losses, those of cases too, that no row stands for."""
  covered = {(group, name) for group, name, _, _ in rows}

  def stands_for(key):
    """The group and the name of a recorded key's row."""
    _, case, rest = key.split("/", 2) if key.startswith("case/") else ("", "", key)
    group, _, name = rest.partition("/")
    return f"{group} {case}".strip(), name

  found = {key: stands_for(key) for key in arrays}
  return [
    key
    for key, row in found.items()
    if row[0].split()[0] in ("output", "loss") and row not in covered
  ]


def _error(ours: np.ndarray, theirs: np.ndarray, floor: float) -> float:
  """max |ours - theirs| / max |theirs|; infinite for another shape or NaN."""
  if ours.shape != theirs.shape:
    return float("inf")
  if not theirs.size:
    return 0.0
  ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
  error = np.abs(ours - theirs).max()
  scale = max(np.abs(theirs).max(), floor)
  if not np.isfinite(error):
    return float("inf")
  return float(error / scale) if scale else float("inf") if error else 0.0
