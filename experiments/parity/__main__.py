"""Compares a port with arrays recorded from the published code.

python -m experiments.parity --golden=misa.npz

The file's name says what it holds. Prints a row per group of tensors with the worst error,
relative to the tensor's largest magnitude, and ends with PASS or FAIL (exit code 0 or 1).
"""

import pathlib
import sys

import jax
import tabulate
from absl import app, flags

from .. import parity

_GOLDEN = flags.DEFINE_string("golden", None, "The recorded file, NAME.npz or NAME-….npz.")
_TOLERANCE = flags.DEFINE_float("tolerance", 1e-4, "Largest relative error.")
_GRAD_TOLERANCE = flags.DEFINE_float("grad_tolerance", 1e-3, "The same for gradients.")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  jax.config.update("jax_default_matmul_precision", "highest")  # accelerators round more by default
  jax.config.update("jax_disable_most_optimizations", True)  # each program runs once or twice
  path = pathlib.Path(str(_GOLDEN.value))
  try:
    module, arrays = parity.find(path), parity.read(path)
    compared = list(module.compare(arrays))
  except (KeyError, ValueError) as error:
    lacks = f"lacks {error}." if isinstance(error, KeyError) else error
    print(f"error: {path}: {lacks}\nFAIL")
    sys.exit(1)
  groups = parity.judge(compared, _TOLERANCE.value, _GRAD_TOLERANCE.value)
  rows = [(g.name, g.tensors, f"{g.worst:.1e}", g.where, "ok" if g.ok else "FAIL") for g in groups]
  print(tabulate.tabulate(rows, ("group", "tensors", "worst relative error", "in", "")))
  left = parity.uncovered(arrays, compared)
  if left:
    print("recorded, but not compared:", ", ".join(left))
  passed = bool(groups) and not left and all(group.ok for group in groups)
  print("PASS" if passed else "FAIL")
  sys.exit(0 if passed else 1)


if __name__ == "__main__":
  flags.mark_flags_as_required(["golden"])
  app.run(main)
