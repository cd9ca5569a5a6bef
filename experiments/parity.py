"""Compares a port with arrays recorded from the published code.

python -m experiments.parity --golden=misa.npz

The file's name says what it holds. Prints a row per group of tensors with the worst error,
relative to the tensor's largest magnitude, and ends with PASS or FAIL (exit code 0 or 1).
"""

import importlib
import pathlib
import pkgutil
import sys
import zipfile
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
import tabulate
from absl import app, flags

from experiments import goldens

_GOLDEN = flags.DEFINE_string("golden", None, "The recorded file, NAME.npz or NAME-….npz.")
_TOLERANCE = flags.DEFINE_float("tolerance", 1e-4, "Largest relative error.")
_GRAD_TOLERANCE = flags.DEFINE_float("grad_tolerance", 1e-3, "The same for gradients.")

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
  return importlib.import_module(f"experiments.goldens.{max(known, key=len)}")


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
    where = max(errors, key=errors.get)
    verdicts.append(Group(group, len(tensors), errors[where], where, errors[where] <= allowed))
  return verdicts


def uncovered(arrays: Iterable[str], rows: Iterable[goldens.Row]) -> list[str]:
  """Keys of recorded outputs and losses that no row stands for."""
  covered = {f"{group}/{name}" for group, name, _, _ in rows}
  return [k for k in arrays if k.startswith(("output/", "loss/")) and k not in covered]


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


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  jax.config.update("jax_default_matmul_precision", "highest")  # accelerators round more by default
  path = pathlib.Path(_GOLDEN.value)
  try:
    module, arrays = find(path), read(path)
    compared = list(module.compare(arrays))
  except (KeyError, ValueError) as error:
    lacks = f"lacks {error}." if isinstance(error, KeyError) else error
    print(f"error: {path}: {lacks}\nFAIL")
    sys.exit(1)
  groups = judge(compared, _TOLERANCE.value, _GRAD_TOLERANCE.value)
  rows = [(g.name, g.tensors, f"{g.worst:.1e}", g.where, "ok" if g.ok else "FAIL") for g in groups]
  print(tabulate.tabulate(rows, ("group", "tensors", "worst relative error", "in", "")))
  left = uncovered(arrays, compared)
  if left:
    print("recorded, but not compared:", ", ".join(left))
  passed = bool(groups) and not left and all(group.ok for group in groups)
  print("PASS" if passed else "FAIL")
  sys.exit(0 if passed else 1)


if __name__ == "__main__":
  flags.mark_flags_as_required(["golden"])
  app.run(main)
