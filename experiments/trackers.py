"""Where each epoch's numbers go besides the log: TensorBoard, Weights & Biases, MLflow.

A tracker's package is imported when it is asked for. Where it sends to is its own affair, told by
its environment variables: `WANDB_MODE=offline`, `WANDB_PROJECT`, `MLFLOW_TRACKING_URI`,
`MLFLOW_EXPERIMENT_NAME`. A run that goes on goes on there too.
"""

import contextlib
import importlib
import os
import pathlib
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from mmjax import types

from . import settings

PROJECT = "mmjax"  # where no environment variable names another


class Story(NamedTuple):
  """What a tracker is told of a run.

  Attributes:
    path: its folder.
    config: it, as plain values.
    epoch: the next one.
    told: epochs that were tracked before; those from `epoch` on come again, with the same numbers.
  """

  path: pathlib.Path
  config: Mapping[str, Any]
  epoch: int
  told: int


class Tracker(Protocol):
  """Where numbers go."""

  def log(self, epoch: int, values: Mapping[str, float]) -> None:
    """Tells the numbers of an epoch, by names such as "valid/mae"."""
    ...

  def close(self) -> None:
    """Sends what is left."""
    ...


class _TensorBoard:
  """Events in the folder `tensorboard`."""

  def __init__(self, story: Story):
    import tensorboardX

    folder = str(story.path / "tensorboard")
    self._events = tensorboardX.SummaryWriter(folder, purge_step=story.epoch, flush_secs=10)

  def log(self, epoch, values):
    for name, value in values.items():
      self._events.add_scalar(name, value, epoch)

  def close(self):
    self._events.close()


class _Wandb:
  """A run of Weights & Biases; its id is kept in the folder."""

  def __init__(self, story: Story):
    wandb = importlib.import_module("wandb")

    self._told = story.told
    try:
      self._run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=_kept(story.path / "wandb.id", lambda: secrets.token_hex(8)),
        name=story.path.name,
        dir=str(story.path),
        config=dict(story.config),
        resume="allow",
      )
    except wandb.Error as error:
      raise types.UsageError(
        f"--tracker=wandb: {error} Log in with `wandb login`, or set WANDB_MODE=offline."
      ) from error

  def log(self, epoch, values):
    if epoch >= self._told:
      self._run.log({**values, "epoch": epoch}, step=epoch)

  def close(self):
    self._run.finish()


class _Mlflow:
  """A run of MLflow; its id is kept in the folder."""

  def __init__(self, story: Story):
    mlflow = importlib.import_module("mlflow")
    entities = importlib.import_module("mlflow.entities")

    self._told, self._metric = story.told, entities.Metric
    self._client = mlflow.MlflowClient()
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    try:
      found = self._client.get_experiment_by_name(name)
      number = found.experiment_id if found else self._client.create_experiment(name)

      def create():
        return self._client.create_run(number, run_name=story.path.name).info.run_id

      self._id = _kept(story.path / "mlflow.id", create)
      self._client.update_run(self._id, "RUNNING")
      told = {k: str(v) for k, v in settings.flatten(story.config).items()}
      self._client.log_batch(self._id, params=[entities.Param(k, v) for k, v in told.items()])
    except mlflow.MlflowException as error:
      raise types.UsageError(
        f"--tracker=mlflow: {error} MLFLOW_TRACKING_URI says where runs are kept."
      ) from error

  def log(self, epoch, values):
    if epoch >= self._told:
      now = int(time.time() * 1000)
      found = [self._metric(name, value, now, epoch) for name, value in values.items()]
      self._client.log_batch(self._id, metrics=found)

  def close(self):
    self._client.set_terminated(self._id)


TRACKERS: dict[str, Callable[[Story], Tracker]] = {
  "tensorboard": _TensorBoard,
  "wandb": _Wandb,
  "mlflow": _Mlflow,
}


def check(name: str) -> None:
  """Raises a `UsageError` if a tracker's package is not installed."""
  try:
    importlib.import_module({"tensorboard": "tensorboardX"}.get(name, name))
  except ModuleNotFoundError as error:
    if error.name != name:
      raise
    raise types.UsageError(
      f"--tracker={name}: {name} is not installed; `pip install 'mmjax[{name}]'` brings it."
    ) from None


def _kept(file: pathlib.Path, make: Callable[[], str]) -> str:
  """The id in a file, made and written there at first."""
  with contextlib.suppress(FileNotFoundError):
    return file.read_text(encoding="utf-8").strip()
  found = make()
  file.write_text(found + "\n", encoding="utf-8")
  return found
