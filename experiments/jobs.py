"""The cores of a machine: one training each, or all for one evaluation."""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent import futures
from typing import NamedTuple

import jax


class Job(NamedTuple):
  """One run of `experiments.train`.

  Attributes:
    name: says which it is, in messages.
    config: the config's flags, "--config=…" first.
    data_dir, folder, method, missing_rate, seed: the other flags.
  """

  name: str
  config: tuple[str, ...]
  data_dir: str
  folder: os.PathLike
  method: str
  missing_rate: str
  seed: int


def _cores() -> list[int]:
  """The cores that this process may use; none where the system does not say."""
  return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def cores_as_devices() -> None:
  """Makes each core of a CPU a device: a robustness grid shares its cells over devices.

  To be called before anything runs. Not for trainings: their batches must be divisible by the
  number of devices, and several of them share the cores already (`run`).
  """
  flags = os.environ.get("XLA_FLAGS", "")
  if jax.config.jax_num_cpu_devices < 0 and "host_platform_device_count" not in flags:
    cores = len(_cores()) or os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", min(cores, 8))  # each holds a copy of the split


def run(jobs: Sequence[Job], processes: int) -> None:
  """Trains each job in its folder, on a core of its own where there are several processes.

  Args:
    jobs: the jobs; a finished one ends at once.
    processes: how many at a time.

  Raises:
    RuntimeError: with the command and its output, if one fails. The others are finished first.
  """
  cores = _cores()
  free = list(range(processes))

  def train(job):
    slot = free.pop()
    command = [
      sys.executable,
      "-m",
      "experiments.train",
      *job.config,
      f"--data_dir={job.data_dir}",
      f"--workdir={os.fspath(job.folder)}",
      f"--method={job.method}",
      f"--missing_rate={job.missing_rate}",
      f"--seed={job.seed}",
      "--log_test",
    ]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
      if processes > 1 and cores:  # before it starts any thread
        os.sched_setaffinity(process.pid, {cores[slot % len(cores)]})
      output, errors = process.communicate()
    free.append(slot)
    if process.returncode:
      raise RuntimeError(f"{' '.join(command)}\n{output}\n{errors}")
    print(f"{job.name}: {output.splitlines()[0]}", flush=True)

  with futures.ThreadPoolExecutor(processes) as pool:
    list(pool.map(train, jobs))
