"""Trains one system with one method on one dataset.

python -m experiments.train --config=misa:mosi --data_dir=data --workdir=runs/misa-m3s \\
    --method=m3s --missing_rate=0.4,0.6 --seed=0
python -m experiments.train --workdir=runs/misa-m3s

The second command goes on with the run of that folder after any interruption, as the first one
does, and ends with the same bits. All devices of the process share each batch; data larger than
the memory stream from disk with --config.data.stream=True.
"""

import pathlib
import sys

import jax
from absl import flags

from mmjax import checkpoint, runs, train, types

from . import build, child, cli, interrupts, loop, settings, trackers, workdir

_FLAGS = flags.FlagValues()
_CONFIG, _SET = cli.define_config(_FLAGS)
_DATA_DIR = flags.DEFINE_string(
  "data_dir", None, "Folder of the datasets; `data`, or the folder's own.", flag_values=_FLAGS
)
_WORKDIR = flags.DEFINE_string(
  "workdir", "", "Folder of this run: config, log, checkpoints.", flag_values=_FLAGS
)
_METHOD = flags.DEFINE_string("method", None, cli.METHOD_HELP, flag_values=_FLAGS)
_MISSING_RATE = flags.DEFINE_string("missing_rate", None, cli.RATE_HELP, flag_values=_FLAGS)
_SEED = flags.DEFINE_integer(
  "seed", None, "Seed of everything random in the run.", lower_bound=0, flag_values=_FLAGS
)
_CHECKPOINT_EVERY = flags.DEFINE_float(
  "checkpoint_every", 60.0, "Seconds between two checkpoints, at least.", flag_values=_FLAGS
)
_TRACKER = flags.DEFINE_enum(
  "tracker",
  "tensorboard",
  list(trackers.TRACKERS),
  "Where the epochs' numbers go besides the log; WANDB_MODE=offline and MLFLOW_TRACKING_URI count.",
  flag_values=_FLAGS,
)
_DISTRIBUTED = flags.DEFINE_string(
  "distributed",
  "",
  "Train on several hosts: `auto` on a cluster that JAX knows (TPU, SLURM, MPI),"
  " else COORDINATOR:PORT,PROCESSES,PROCESS. All see the same --workdir.",
  flag_values=_FLAGS,
)
_PARENT = flags.DEFINE_integer(
  "parent",
  None,
  "Given by studies to their trainings: a pipe that closes when the study is gone.",
  flag_values=_FLAGS,
)
LEFT_S = 60.0  # a training whose study died may need so long to be gone


def join(hosts: str) -> None:
  """Makes this process one of several, see --distributed."""
  if hosts == "auto":
    jax.distributed.initialize()
  elif hosts:
    try:
      address, count, number = hosts.split(",")
      count, number = int(count), int(number)
    except ValueError:
      raise types.UsageError(
        f"--distributed={hosts}: expected auto or HOST:PORT,PROCESSES,PROCESS."
      ) from None
    jax.distributed.initialize(address, count, number)


def read() -> tuple[settings.Config, str]:
  """The config that the flags ask for, or that the folder has; and the folder of the data."""
  if _CONFIG.value:
    config, data_dir = settings.load(_CONFIG.value), "data"
  else:
    try:
      found = runs.read_config(_WORKDIR.value)
    except runs.RunError as error:
      raise types.UsageError(f"--config is missing, as misa:mosi; {error}") from None
    config, data_dir = settings.from_json(found["run"]["config"]), found["data_dir"]
  short = {
    "method.name": _METHOD.value,
    "mask.rate": cli.rate("missing_rate", _MISSING_RATE.value),
    "seed": _SEED.value,
  }
  return cli.change(config, short, cli.entries(_SET.value)), _DATA_DIR.value or data_dir


def train_group(folders: list[pathlib.Path], watch: interrupts.Watch) -> None:
  """Trains the runs of some folders side by side, see `workdir.write_group`."""
  found = [runs.read_config(folder) for folder in folders]
  configs = [settings.from_json(one["run"]["config"]) for one in found]
  data_dir = found[0]["data_dir"]
  dataset = build.load_data(configs[0], data_dir)
  loop.execute_together(
    [build.make_run(config, dataset) for config in configs],
    folders,
    data_dir,
    pathlib.Path(_WORKDIR.value) / "checkpoints",
    checkpoint_every=_CHECKPOINT_EVERY.value,
    should_stop=lambda: watch.signal is not None,
  )


@cli.binary(_FLAGS, __doc__, required=["workdir"])
def main():
  trackers.check(_TRACKER.value)
  group = workdir.group(_WORKDIR.value)
  if _PARENT.value is not None:
    child.end_with(_PARENT.value)
    for folder in group or [_WORKDIR.value]:
      workdir.wait(folder, LEFT_S)
  join(_DISTRIBUTED.value)
  config, data_dir = (None, "") if group else read()
  with interrupts.Watch() as watch:
    try:
      if group:
        train_group(group, watch)
        return
      run = build.make_run(config, build.load_data(config, data_dir))
      progress = loop.execute(
        run,
        _WORKDIR.value,
        data_dir,
        checkpoint_every=_CHECKPOINT_EVERY.value,
        should_stop=lambda: watch.signal is not None,
        tracker=_TRACKER.value,
      )
    except interrupts.Interrupted:
      print(f"Interrupted; saved in {_WORKDIR.value}. The same command goes on from there.")
      sys.exit(128 + (watch.signal or 0))
    except train.NonFiniteLoss as error:
      newest = checkpoint.manager(f"{_WORKDIR.value}/checkpoints").latest_step()
      where = (
        "there is no checkpoint yet" if newest is None else f"the last one is of step {newest}"
      )
      sys.exit(f"Stopped: {error} Checkpoints are in {_WORKDIR.value}/checkpoints; {where}.")
  print(f"{workdir.told(progress.best)}. Next:")
  print(cli.told(f"  python -m experiments.evaluate --workdir={_WORKDIR.value}"))


if __name__ == "__main__":
  main()
