"""Checkpoints of whole runs (orbax): one pytree in, the same pytree out.

A checkpoint appears under its final name only when it is complete, so a process that is
killed while writing leaves the one before.
"""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


def manager(directory: str | pathlib.Path, keep: int = 2) -> ocp.CheckpointManager:
  """An orbax manager of `directory` that keeps the newest `keep` checkpoints."""
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep, create=True, enable_async_checkpointing=False
  )
  return ocp.CheckpointManager(pathlib.Path(directory).absolute(), options=options)


def save(checkpoints: ocp.CheckpointManager, step: int, tree: Any) -> None:
  """Writes a pytree of arrays as checkpoint number `step`; done when it returns."""
  checkpoints.save(step, args=ocp.args.StandardSave(tree), force=True)
  checkpoints.wait_until_finished()


def restore(checkpoints: ocp.CheckpointManager, template: Any, *, partial: bool = False) -> Any:
  """Reads the newest checkpoint into the structure of `template`.

  Args:
    checkpoints: from `manager`.
    template: a pytree of the same structure, shapes and types; arrays come back on its devices.
    partial: whether the template is only a part of what was saved; a dict may stand for
      another container with the same names.

  Returns:
    The pytree, or None if there is no checkpoint yet.

  Raises:
    ValueError: if the checkpoint does not fit the template.
  """
  step = checkpoints.latest_step()
  if step is None:
    return None
  shapes = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=getattr(a, "sharding", None)),
    template,
  )
  if partial:
    args = ocp.args.PyTreeRestore(
      shapes,
      restore_args=ocp.checkpoint_utils.construct_restore_args(shapes),
      partial_restore=True,
    )
  else:
    args = ocp.args.StandardRestore(shapes)
  try:
    return checkpoints.restore(step, args=args)
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"checkpoint {step} in {checkpoints.directory} does not fit this model and optimizer: {error}"
    ) from error
