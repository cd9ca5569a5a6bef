"""The folder of one training run: what it was asked for, its log, its checkpoints.

config.json     the whole run: config, SHA-256 of the data, library versions, format of the folder
spec.json       what `mmjax.load` must know of the data
metrics.jsonl   one line per epoch
done.json       the selected epochs and their scores, once the training is over
tensorboard/    the same numbers as TensorBoard events, unless another tracker gets them
checkpoints/    the newest states (orbax), numbered by optimizer step
lock            held by the process that trains; the system lets go of it when that ends
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import time
import uuid
from typing import Any

import jax

from mmjax import checkpoint, runs, train

from . import settings, trackers

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

Path = str | os.PathLike


def history(path: Path) -> list[dict[str, Any]]:
  """The lines of a run's log; a line that a kill cut short is left out."""
  log, lines = pathlib.Path(path) / "metrics.jsonl", []
  if log.exists():
    for text in log.read_text(encoding="utf-8").splitlines():
      try:
        lines.append(json.loads(text))
      except json.JSONDecodeError:
        break
  return lines


def is_done(path: Path) -> bool:
  """Whether a folder's training came to its end."""
  return (pathlib.Path(path) / "done.json").exists()


def told(best: dict[str, train.Best]) -> str:
  """The selected epochs in words."""
  words = [
    f"{name} = {float(one.score):.4f} (epoch {int(one.epoch)})" for name, one in best.items()
  ]
  if next(iter(best)).startswith("test/"):
    return f"TEST ORACLE, the best epoch of each metric on the test split: {', '.join(words)}"
  name, one = next(iter(best.items()))
  return f"Best epoch {int(one.epoch)} on validation: {name} = {float(one.score):.4f}"


def check(path: Path, asked: dict[str, Any]) -> None:
  """Raises a `runs.RunError` unless a folder could serve what is asked for; writes nothing."""
  path = pathlib.Path(path)
  if not (path / "config.json").exists():
    if _has_begun(path):
      raise runs.RunError(f"{path} holds a training without a config.json; choose another folder.")
    return
  try:
    old = runs.read_config(path)["run"]
  except runs.RunError:
    if _has_begun(path):
      raise
    return
  old, new = settings.flatten(old), settings.flatten(_as_json(asked))
  changed = [
    f"  {name}: {old.get(name)!r} there, {new.get(name)!r} asked for"
    for name in sorted(old.keys() | new.keys())
    if old.get(name) != new.get(name)
  ]
  if changed and _has_begun(path):
    raise runs.RunError(
      f"{path} holds a run of another config; choose another --workdir or delete it:\n"
      + "\n".join(changed)
    )


def prepare(path: Path, asked: dict[str, Any], data_dir: Path) -> None:
  """Writes the config.json of a run to come; see `Workdir`."""
  path = pathlib.Path(path)
  check(path, asked)
  path.mkdir(parents=True, exist_ok=True)
  versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
  if (path / "config.json").exists() and _has_begun(path):
    versions = runs.read_config(path)["versions"]  # of what began it
  found = {
    "format": runs.FORMAT,
    "run": _as_json(asked),
    "data_dir": str(pathlib.Path(data_dir).absolute()),
    "versions": versions,
  }
  write_atomically(path / "config.json", json.dumps(found, indent=2) + "\n")


class Workdir:
  """Opens or creates the folder of a run, to train in it. Of several processes the first writes.

  Args:
    path: the folder.
    asked: what the run is asked for, JSON values only. It must be the same on every call, until
      which a folder without a checkpoint and a log may be taken over.
    data_dir: where the datasets lie; it may change.
    reading: what predictions need to know of the data, kept for `mmjax.load`.
    tracker: where the numbers of epochs go too, a key of `trackers.TRACKERS`.

  Raises:
    runs.RunError: if the folder belongs to a run that was asked for something else, or another
      process trains in it.
  """

  def __init__(
    self,
    path: Path,
    asked: dict[str, Any],
    data_dir: Path,
    reading: runs.Reading | None = None,
    tracker: str = "tensorboard",
  ):
    self.path = pathlib.Path(path)
    check(self.path, asked)
    self._lock = _lock(self.path) if _is_first() else None
    if _is_first():
      prepare(self.path, asked, data_dir)
      if reading is not None:
        runs.write_reading(self.path, reading)
    self.checkpoints = checkpoint.manager(self.path / "checkpoints")
    self._log = self.path / "metrics.jsonl"
    self._config, self._make_tracker = asked.get("config", {}), trackers.TRACKERS[tracker]
    self._tracker: trackers.Tracker | None = None

  def restore(self, template: train.Progress) -> train.Progress | None:
    """The newest saved progress, or None, to train on: see `rewind`."""
    progress = checkpoint.restore(self.checkpoints, template)
    self.rewind(0 if progress is None else int(progress.epoch))
    return progress

  def rewind(self, finished: int) -> None:
    """Opens the log for the epoch `finished`: drops the lines of that one and of later ones."""
    if not _is_first():
      return
    told = history(self.path)
    kept = [line for line in told if line["epoch"] < finished]
    self._tracker = self._make_tracker(trackers.Story(self.path, self._config, finished, len(told)))
    write_atomically(self._log, "".join(json.dumps(line) + "\n" for line in kept))

  def save(self, progress: train.Progress) -> None:
    """Saves the progress, unless that step is saved already."""
    step = int(progress.state.step)
    if step not in self.checkpoints.all_steps():
      checkpoint.save(self.checkpoints, step, progress)

  def finish(self, progress: train.Progress) -> None:
    """Saves the last progress and marks the training as over."""
    self.save(progress)
    if not _is_first():
      return
    found = {
      name: {"epoch": int(best.epoch), "score": float(best.score)}
      for name, best in progress.best.items()
    }
    write_atomically(self.path / "done.json", json.dumps(found) + "\n")

  def log(self, report: train.EpochReport) -> None:
    """Appends an epoch to the log and to the tracker."""
    if not _is_first():
      return
    parts = {"train": report.train, **report.evaluated}
    line = {
      "epoch": report.epoch,
      "step": int(report.progress.state.step),
      **parts,
      "improved": list(report.improved),
    }
    with self._log.open("a", encoding="utf-8") as log:
      log.write(json.dumps(line) + "\n")
    if self._tracker is not None:
      values = {f"{part}/{k}": v for part, found in parts.items() for k, v in found.items()}
      self._tracker.log(report.epoch, values)

  def close(self) -> None:
    """Flushes the events, ends pending writes and lets go of the folder."""
    if self._tracker is not None:
      self._tracker.close()
    self.checkpoints.close()
    if self._lock is not None:
      os.close(self._lock)
      self._lock = None


def _lock(path: pathlib.Path) -> int:
  """A file descriptor that holds the folder until it is closed or the process ends."""
  path.mkdir(parents=True, exist_ok=True)
  lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(lock)
    raise runs.RunError(
      f"another process trains in {path}; wait for it, stop it, or choose another --workdir."
    ) from None
  return lock


def wait(path: Path, seconds: float) -> None:
  """Waits while another process trains in a folder, at most so long."""
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    with contextlib.suppress(runs.RunError):
      os.close(_lock(pathlib.Path(path)))
      return
    time.sleep(0.2)


def _has_begun(path: pathlib.Path) -> bool:
  """Whether a checkpoint or a line of the log stands in a folder."""
  steps = path.glob("checkpoints/*")
  return any(step.name.isdigit() for step in steps) or bool(history(path))


def _as_json(tree: dict[str, Any]) -> dict[str, Any]:
  return json.loads(json.dumps(tree))  # as it will be read back


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Writes a file that is never seen half written."""
  draft = path.with_suffix(f"{path.suffix}.{uuid.uuid4().hex[:8]}.part")  # several may write
  draft.write_text(text, encoding="utf-8")
  draft.replace(path)


def _is_first() -> bool:
  return jax.process_index() == 0
