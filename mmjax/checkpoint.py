"""Checkpoints of whole runs (orbax): one pytree in, the same pytree out.

A checkpoint appears under its final name only when it is complete, so a process that is
killed while writing leaves the one before. One that was damaged afterwards is passed over.
"""

import logging
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mmjax import types

_LOG = logging.getLogger(__name__)


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
  """Reads the newest whole checkpoint into the structure of `template`.

  A damaged one is named in a warning, and so is the one that is read in its place. Unless the
  restoration is partial, as a reader's is, it is renamed: the run will write that step again.

  Args:
    checkpoints: from `manager`.
    template: a pytree of the same structure, shapes and types; arrays come back on its devices.
    partial: whether the template is only a part of what was saved, and only that is read; a dict
      may stand for another container with the same names.

  Returns:
    The pytree, or None if there is no checkpoint yet.

  Raises:
    UsageError: if the checkpoint is whole, but does not fit the template, or if all are damaged.
  """
  shapes = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=getattr(a, "sharding", None)),
    template,
  )
  options = dict(
    restore_args=ocp.checkpoint_utils.construct_restore_args(shapes), partial_restore=partial
  )
  damaged = []
  for step in sorted(checkpoints.all_steps(), reverse=True):
    folder = checkpoints.directory / str(step)
    try:
      found = _read(folder, shapes, **options)
    except Exception as error:
      if not _is_whole(folder):
        _LOG.warning("checkpoint %d in %s is damaged: %s", step, checkpoints.directory, error)
        damaged.append(step)
        continue
      if not isinstance(error, (ValueError, KeyError, TypeError)):
        raise
      raise types.UsageError(
        f"checkpoint {step} in {checkpoints.directory} does not fit this model, method and"
        f" optimizer, or another version of mmjax wrote it: {error}"
      ) from error
    if damaged:
      _LOG.warning("going on from checkpoint %d in %s.", step, checkpoints.directory)
      if not partial:
        _set_aside(checkpoints, damaged)
    return found
  if damaged:
    raise types.UsageError(
      f"all checkpoints in {checkpoints.directory} are damaged ({damaged}): delete the folder to"
      " begin anew."
    )
  return None


def _read(folder: Any, item: Any = None, **options: Any) -> Any:
  # not through the manager, which takes the other folders for what a damaged one looks like
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    return reader.restore(folder / "default", args=ocp.args.PyTreeRestore(item, **options))


def _is_whole(folder: Any) -> bool:
  """Whether every array of a checkpoint can be read."""
  try:
    tree = ocp.PyTreeCheckpointHandler().metadata(folder / "default").tree
    _read(folder, restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), tree))
  except Exception:  # of tensorstore, of json, of the file system …
    return False
  return True


def _set_aside(checkpoints: ocp.CheckpointManager, steps: list[int]) -> None:
  for step in steps:
    folder = pathlib.Path(checkpoints.directory) / str(step)
    if jax.process_index() == 0:
      folder.rename(folder.with_name(f"damaged-{step}"))
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("mmjax_damaged")
  checkpoints.reload()
