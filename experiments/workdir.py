"""The folder of one training run: what it was asked for, its log, its checkpoints.

config.json     what was run; the same folder refuses another config
metrics.jsonl   one line per epoch
done.json       the selected epoch and its score, once the training is over
tensorboard/    the same numbers as TensorBoard events
checkpoints/    the newest states (orbax), numbered by optimizer step
"""

import importlib.metadata
import json
import os
import pathlib
from collections.abc import Sequence

import jax
import tensorboardX

from mmjax import checkpoint, train, types

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class WorkdirError(types.UsageError):
  """The folder cannot serve this run."""


def _flatten(tree: dict, prefix: str = "") -> dict:
  flat = {}
  for key, value in tree.items():
    nested = isinstance(value, dict)
    flat |= _flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
  return flat


def _write_atomically(path: pathlib.Path, text: str) -> None:
  draft = path.with_suffix(path.suffix + ".part")
  draft.write_text(text, encoding="utf-8")
  os.replace(draft, path)


def read_config(workdir: str | os.PathLike) -> dict:
  """What the run in `workdir` was asked for ("run"), with what, and on the data of where.

  Raises:
    WorkdirError: if there is no run.
  """
  path = pathlib.Path(workdir) / "config.json"
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise WorkdirError(
      f"{path} does not exist: {workdir} holds no training run. Train one with"
      " `python -m experiments.train --workdir=…`."
    ) from None


class Workdir:
  """Opens or creates the folder of a run. Of several processes the first alone writes text.

  Args:
    path: the folder.
    asked: what the run is asked for, JSON values only. It must be the same on every call.
    data_dir: where the datasets lie; it may change.

  Raises:
    WorkdirError: if the folder belongs to a run that was asked for something else.
  """

  def __init__(self, path: str | os.PathLike, asked: dict, data_dir: str | os.PathLike):
    self.path = pathlib.Path(path)
    self.path.mkdir(parents=True, exist_ok=True)
    asked = json.loads(json.dumps(asked))  # as it will be read back
    if (self.path / "config.json").exists():
      _refuse_other(self.path, read_config(self.path)["run"], asked)
    elif _is_first():
      versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
      found = {"run": asked, "data_dir": os.fspath(data_dir), "versions": versions}
      text = json.dumps(found, indent=2)
      _write_atomically(self.path / "config.json", text + "\n")
    self.checkpoints = checkpoint.manager(self.path / "checkpoints")
    self._log = self.path / "metrics.jsonl"
    self._events = None

  def read(self, template: train.Progress) -> train.Progress | None:
    """The newest saved progress, or None."""
    return checkpoint.restore(self.checkpoints, template)

  def read_best(self, template: dict, also: Sequence[str] = ()) -> dict | None:
    """{None: {"params", "extra"}} of the selected epoch in the newest progress, or None.

    And of the epochs that metrics in `train.Recipe.also` select, by the metric.
    """
    wanted = {"best": template}
    if also:
      wanted["others"] = dict.fromkeys(also, template)
    found = checkpoint.restore(self.checkpoints, wanted, partial=True)
    return found and {None: found["best"], **found.get("others", {})}

  def restore(self, template: train.Progress) -> train.Progress | None:
    """`read`, to train on: see `rewind`."""
    progress = self.read(template)
    self.rewind(0 if progress is None else int(progress.epoch))
    return progress

  def rewind(self, finished: int) -> None:
    """Opens the log for the epoch `finished`: drops the lines of that one and of later ones."""
    if not _is_first():
      return
    kept = [line for line in self.history() if line["epoch"] < finished]
    _write_atomically(self._log, "".join(json.dumps(line) + "\n" for line in kept))
    self._events = tensorboardX.SummaryWriter(
      str(self.path / "tensorboard"), purge_step=finished, flush_secs=10
    )

  def history(self) -> list[dict]:
    """The log's lines; a line that a kill cut short is left out."""
    lines = []
    if self._log.exists():
      for text in self._log.read_text(encoding="utf-8").splitlines():
        try:
          lines.append(json.loads(text))
        except json.JSONDecodeError:
          break
    return lines

  def save(self, progress: train.Progress) -> None:
    """Saves the progress, unless that step is saved already."""
    step = int(progress.state.step)
    if step not in self.checkpoints.all_steps():
      checkpoint.save(self.checkpoints, step, progress)

  @property
  def is_done(self) -> bool:
    """Whether the training came to its end."""
    return (self.path / "done.json").exists()

  def finish(self, progress: train.Progress) -> None:
    """Saves the last progress and marks the training as over."""
    self.save(progress)
    if not _is_first():
      return
    found = {"best_epoch": int(progress.best_epoch), "score": float(progress.best_score)}
    _write_atomically(self.path / "done.json", json.dumps(found) + "\n")

  def log(self, report: train.EpochReport, test: dict[str, float] | None = None) -> None:
    """Appends an epoch to the log and to the TensorBoard events; `test` metrics if given."""
    if not _is_first():
      return
    line = {
      "epoch": report.epoch,
      "step": int(report.progress.state.step),
      "train": report.train,
      "valid": report.valid,
      "is_best": report.is_best,
      **({} if test is None else {"test": test}),
    }
    with self._log.open("a", encoding="utf-8") as log:
      log.write(json.dumps(line) + "\n")
    for part in {"train", "valid", "test"} & line.keys():
      for name, value in line[part].items():
        self._events.add_scalar(f"{part}/{name}", value, report.epoch)

  def close(self) -> None:
    """Flushes the events and ends pending writes."""
    if self._events is not None:
      self._events.close()
    self.checkpoints.close()


def _is_first() -> bool:
  return jax.process_index() == 0


def _refuse_other(path: pathlib.Path, old: dict, new: dict) -> None:
  old, new = _flatten(old), _flatten(new)
  changed = [
    f"  {name}: {old.get(name)!r} there, {new.get(name)!r} asked for"
    for name in sorted(old.keys() | new.keys())
    if old.get(name) != new.get(name)
  ]
  if changed:
    raise WorkdirError(
      f"{path} holds a run of another config; choose another --workdir or delete it:\n"
      + "\n".join(changed)
    )
