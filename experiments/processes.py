"""The cores of a machine: one training each, or all for one evaluation."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax

from experiments import interrupts, loop, workdir
from mmjax import types

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


class _Child:
  """A training in a process of its own; its output goes to a file, so that it never waits."""

  def __init__(self, training: Training, slot: int, core: int | None):
    self.training, self.slot = training, slot
    self.files = contextlib.ExitStack()
    self.output, self.errors = (
      self.files.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))  # noqa: SIM115
      for _ in range(2)
    )
    command = [sys.executable, "-m", "experiments.train", f"--workdir={training.path}"]
    # a session of its own: a Ctrl-C reaches it through us, once
    self.process = subprocess.Popen(
      command, stdout=self.output, stderr=self.errors, text=True, start_new_session=True
    )
    if core is not None:  # before it starts any thread
      os.sched_setaffinity(self.process.pid, {core})
    self.bar = loop.make_bar(training.epochs, position=slot, desc=training.name, leave=False)

  def epochs(self) -> int:
    return len(workdir.history(self.training.path))

  def show(self) -> None:
    self.bar.update(self.epochs() - self.bar.n)

  def end(self) -> tuple[str, str]:
    """What it printed, and what went wrong."""
    self.bar.close()
    texts = []
    for file in (self.output, self.errors):
      file.seek(0)
      texts.append(file.read())
    self.files.close()
    return texts[0], texts[1]


def run(trainings: Sequence[Training], count: int, watch: interrupts.Watch) -> None:
  """Trains each run in its folder, on a core of its own where there are several processes.

  Args:
    trainings: the runs; a finished one ends at once.
    count: how many at a time.
    watch: a signal is passed on to the trainings, which save and end.

  Raises:
    Interrupted: after a signal.
    UsageError: if one could not be trained as asked; the others are finished first.
    RuntimeError: if one failed otherwise, with its output.
  """
  cores = _cores() if count > 1 else []
  waiting, running, failed = list(trainings), [], []
  watch.on_abort = lambda: [child.process.kill() for child in running]
  free, told, passed_on = list(range(count)), time.monotonic(), False
  while waiting or running:
    while waiting and free and watch.signal is None:
      slot = free.pop(0)
      core = cores[slot % len(cores)] if cores else None
      running.append(_Child(waiting.pop(0), slot, core))
    time.sleep(0.1)
    if watch.signal is not None and not passed_on:
      passed_on = True
      for child in running:
        child.process.send_signal(signal.SIGTERM)
    for child in [child for child in running if child.process.poll() is not None]:
      running.remove(child)
      free.append(child.slot)
      output, errors = child.end()
      if child.process.returncode == 0:
        print(f"{child.training.name}: {output.splitlines()[0].removesuffix(' Next:')}", flush=True)
      elif not passed_on:
        failed.append((child.training, output, errors))
    if watch.signal is not None and not running:
      raise interrupts.Interrupted
    for child in running:
      child.show()
    if running and time.monotonic() - told > STATUS_S and running[0].bar.disable:
      told = time.monotonic()
      where = [f"{c.training.name} epoch {c.epochs()} of {c.training.epochs}" for c in running]
      print("; ".join(where), file=sys.stderr, flush=True)
  for training, output, errors in failed:
    command = f"python -m experiments.train --workdir={training.path}"
    last = (errors.splitlines() or [""])[-1]
    for mark in ("error: ", "Stopped: "):
      if last.startswith(mark):
        raise types.UsageError(f"{training.name}: {last.removeprefix(mark)}\n  {command}")
    raise RuntimeError(f"{command}\n{output}\n{errors}")
