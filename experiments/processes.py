"""Trainings beside each other: what starts them (an engine), and what watches over them (a crew).

Here is the engine of one machine, a process per core; `engines` has the one of a cluster.
"""

import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import tqdm

from mmjax import types

from . import child, interrupts, loop, workdir

STATUS_S = 30.0  # between two lines that say where the trainings are, without a terminal


class Training(NamedTuple):
  """A run whose folder waits for `python -m experiments.train --workdir=FOLDER`.

  Attributes:
    name: says which it is, in messages.
    path: its folder.
    epochs: how many it has.
  """

  name: str
  path: pathlib.Path
  epochs: int


def _cores() -> list[int]:
  """The cores that this process may use; none where the system does not say."""
  return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def cores_as_devices() -> None:
  """Makes each core of a CPU a device: a robustness grid shares its cells over devices.

  To be called before anything runs. Not for trainings: their batches must be divisible by the
  number of devices, and several of them share the cores already (`run`).
  """
  flags = os.environ.get("XLA_FLAGS", "")
  asked: int = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
  if asked < 0 and "host_platform_device_count" not in flags:
    cores = len(_cores()) or os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):  # too late: something ran already in this process
      jax.config.update("jax_num_cpu_devices", min(cores, 8))  # each holds a copy of the split


class Job(Protocol):
  """A training that an engine has started; see `child.Child`."""

  def poll(self) -> child.Ended | None: ...
  def stop(self) -> None: ...
  def kill(self) -> None: ...


class Engine(Protocol):
  """What trains."""

  @property
  def count(self) -> int:
    """How many trainings at a time."""
    ...

  def start(self, training: Training) -> Job:
    """Starts one; its folder is prepared, or holds its last checkpoint."""
    ...


class Processes:
  """The engine of this machine: a process per training, on a core of its own if there are several.

  Args:
    count: how many at a time.
  """

  def __init__(self, count: int):
    self.count = count
    self._cores = _cores() if count > 1 else []
    self._started: list[tuple[int, child.Child]] = []

  def start(self, training: Training) -> child.Child:
    """See `Engine.start`."""
    self._started = [(core, one) for core, one in self._started if one.runs()]
    used = [core for core, _ in self._started]
    core = min(self._cores, key=used.count, default=None)
    started = child.Child(training.path, core)
    if core is not None:
      self._started.append((core, started))
    return started


class _Member(NamedTuple):
  training: Training
  job: Job
  slot: int  # line of the terminal
  bar: tqdm.tqdm

  def epochs(self) -> int:
    return len(workdir.history(self.training.path))


class Crew:
  """Trainings in progress: shows where they are, and passes a signal on to them.

  Args:
    engine: what trains.
    watch: of signals.
    below: lines of the terminal that others write to, above its own.
  """

  def __init__(self, engine: Engine, watch: interrupts.Watch, *, below: int = 0):
    self._engine, self._watch, self._below = engine, watch, below
    self._members: list[_Member] = []
    self._told, self._passed_on = time.monotonic(), False
    watch.on_abort = lambda: [member.job.kill() for member in self._members]

  def __len__(self) -> int:
    return len(self._members)

  def is_free(self) -> bool:
    """Whether one more may start."""
    return len(self) < self._engine.count and self._watch.signal is None

  def start(self, training: Training) -> None:
    """Starts a training."""
    used = {member.slot for member in self._members}
    slot = next(n for n in range(len(used) + 1) if n not in used)
    bar = loop.make_bar(
      training.epochs, position=slot + self._below, desc=training.name, leave=False
    )
    self._members.append(_Member(training, self._engine.start(training), slot, bar))

  def stop(self, training: Training) -> None:
    """Asks a training to save and end."""
    for member in self._members:
      if member.training == training:
        member.job.stop()

  def wait(self) -> list[tuple[Training, child.Ended]]:
    """The trainings that ended within this moment.

    Raises:
      Interrupted: when a signal came and nothing runs any more.
    """
    if self._watch.signal is not None and not self._members:
      raise interrupts.Interrupted
    time.sleep(0.1)
    if self._watch.signal is not None and not self._passed_on:
      self._passed_on = True
      for member in self._members:
        member.job.stop()
    ended = []
    for member in list(self._members):
      if (how := member.job.poll()) is not None:
        self._members.remove(member)
        member.bar.close()
        ended.append((member.training, how))
      else:
        member.bar.update(member.epochs() - member.bar.n)
    self._tell()
    return ended

  def _tell(self) -> None:
    """Without a terminal: a line now and then."""
    if not self._members or not self._members[0].bar.disable:
      return
    if time.monotonic() - self._told > STATUS_S:
      self._told = time.monotonic()
      where = [
        f"{m.training.name} epoch {m.epochs()} of {m.training.epochs}" for m in self._members
      ]
      print("; ".join(where), file=sys.stderr, flush=True)


def run(trainings: Sequence[Training], engine: Engine, watch: interrupts.Watch) -> None:
  """Trains each run in its folder.

  Args:
    trainings: the runs; a finished one ends at once.
    engine: what trains.
    watch: a signal is passed on to the trainings, which save and end.

  Raises:
    Interrupted: after a signal.
    UsageError: if one could not be trained as asked; the others are finished first.
    RuntimeError: if one failed otherwise, with its output.
  """
  crew, waiting, failed = Crew(engine, watch), list(trainings), []
  while waiting or len(crew):
    while waiting and crew.is_free():
      crew.start(waiting.pop(0))
    for training, ended in crew.wait():
      if ended.code == 0:
        print(f"{training.name}: {first_line(ended)}", flush=True)
      elif watch.signal is None:
        failed.append((training, ended))
  if watch.signal is not None:
    raise interrupts.Interrupted
  for training, ended in failed:
    raise failure(training, ended)


def first_line(ended: child.Ended) -> str:
  """What a training says of its result."""
  return ended.output.splitlines()[0].removesuffix(" Next:")


def failure(training: Training, ended: child.Ended) -> Exception:
  """Why a training failed: a UsageError where the user can mend it, else a RuntimeError."""
  command = f"python -m experiments.train --workdir={training.path}"
  last = (ended.errors.splitlines() or [""])[-1]
  for mark in ("error: ", "Stopped: "):
    if last.startswith(mark):
      return types.UsageError(f"{training.name}: {last.removeprefix(mark)}\n  {command}")
  return RuntimeError(f"{command}\n{ended.output}\n{ended.errors}")
