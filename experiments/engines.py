"""Where trainings run: processes of this machine, or Ray, a cluster of several.

Every node of a cluster sees the same folders (code, data, runs) under the same paths. When one
dies, Ray starts its trainings elsewhere, and each goes on from its last checkpoint.
"""

import contextlib
import importlib.util
import logging
import os
import time
import warnings
from typing import Any

from absl import flags

from mmjax import types

from . import child, processes

NAMES = ("processes", "ray")
RETRIES = 20  # of a training whose node dies
PASSED_ON = ("JAX_", "XLA_", "XDG_CACHE_HOME")  # environment of the trainings


def define(flag_values: flags.FlagValues) -> None:
  """Defines the flags of a binary that trains."""
  flags.DEFINE_enum(
    "engine",
    "processes",
    NAMES,
    "What trains: processes of this machine, or ray (extra `cluster`).",
    flag_values=flag_values,
  )
  flags.DEFINE_string(
    "ray_address",
    "local",
    "Of a running Ray cluster, HOST:PORT or auto; local starts one of its own.",
    flag_values=flag_values,
  )
  flags.DEFINE_integer(
    "processes",
    os.cpu_count(),
    "Trainings at a time, 1 on a GPU; on Ray as many as it has GPUs, or else cores.",
    lower_bound=1,
    flag_values=flag_values,
  )


def make(flag_values: flags.FlagValues) -> processes.Engine:
  """The engine that the flags ask for, before JAX runs anything.

  Raises:
    UsageError: if Ray is asked for and not installed, or all seeds are to be one program.
  """
  if flag_values["engine"].value == "processes":
    return processes.Processes(flag_values["processes"].value or 1)
  if importlib.util.find_spec("ray") is None:
    raise types.UsageError("--engine=ray needs Ray: pip install 'mmjax[cluster]'.")
  if "schedule" in flag_values and flag_values["schedule"].value == "together":
    raise types.UsageError("--schedule=together is one program on one machine; leave --engine out.")
  return Ray(flag_values["ray_address"].value or "local")


def train(path: str) -> child.Ended:
  """What a node runs: a training in its folder; a cancelled one saves and ends."""
  training = child.Child(path)
  while True:
    with contextlib.suppress(KeyboardInterrupt):
      while (ended := training.poll()) is None:
        time.sleep(0.2)
      return ended
    training.stop()


class Ray:
  """The engine of a cluster.

  Args:
    address: see --ray_address.
  """

  def __init__(self, address: str):
    import ray

    paths = (os.getcwd(), os.environ.get("PYTHONPATH"))
    given = {name: text for name, text in os.environ.items() if name.startswith(PASSED_ON)}
    given["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    try:
      with warnings.catch_warnings(action="ignore"):  # it forks, but JAX has no threads yet
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
      raise types.UsageError(f"--ray_address={address}: {error}") from None
    self._gpus = 1 if ray.cluster_resources().get("GPU") else 0
    if not self._gpus:
      given["NPROC"] = "1"  # XLA's threads: a core for each training, which decides its bits too
    environment = {"env_vars": given}
    self._train: Any = ray.remote(
      num_cpus=1, num_gpus=self._gpus, max_retries=RETRIES, runtime_env=environment
    )(train)

  @property
  def count(self) -> int:
    """How many trainings at a time: one per GPU, or core, of the nodes there are now."""
    import ray

    return int(ray.cluster_resources().get("GPU" if self._gpus else "CPU", 0))

  def start(self, training: processes.Training) -> processes.Job:
    """See `Engine.start`."""
    return _RayJob(self._train.remote(str(training.path.absolute())))


class _RayJob:
  """A training on some node."""

  def __init__(self, ref: Any):
    self._ref = ref

  def poll(self) -> child.Ended | None:
    import ray
    import ray.exceptions

    if not ray.wait([self._ref], timeout=0)[0]:
      return None
    try:
      return ray.get(self._ref)
    except ray.exceptions.RayError as error:  # cancelled, or lost too often
      return child.Ended(1, "", str(error))

  def stop(self) -> None:
    import ray

    ray.cancel(self._ref)

  def kill(self) -> None:
    import ray

    ray.cancel(self._ref, force=True)
