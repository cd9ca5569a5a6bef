"""Trains one system with one method on one dataset.

python -m experiments.train --config=experiments/configs/misa.py:mosi --data_dir=data \
    --workdir=runs/misa-m3s --method=m3s --missing_rate=0.4,0.6 --seed=0

The same command goes on after any interruption, and ends with the same bits. All devices of the
process share each batch; data larger than the memory stream from disk with
--config.data.stream=True.
"""

import signal
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from experiments import run as run_lib
from experiments import workdir as workdir_lib
from mmjax import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, `misa.py:mosi`.")
_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Folder of the converted datasets.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run: log, checkpoints.")
_METHOD = flags.DEFINE_enum("method", "m3s", list(run_lib.METHODS), "Training method.")
_MISSING_RATE = flags.DEFINE_string(
  "missing_rate", "0.4,0.6", "Lowest and highest missing rate, in training and validation."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of everything random in the run.", lower_bound=0)
_CHECKPOINT_EVERY = flags.DEFINE_float(
  "checkpoint_every", 60.0, "Seconds between two checkpoints, at least."
)
_LOG_TEST = flags.DEFINE_bool(
  "log_test", False, "Also log the test split's metrics, for figures; they select nothing."
)
_DISTRIBUTED = flags.DEFINE_string(
  "distributed",
  "",
  "Train on several hosts: `auto` on a cluster that JAX knows (TPU, SLURM, MPI),"
  " else COORDINATOR:PORT,PROCESSES,PROCESS. All see the same --workdir.",
)


def join(hosts: str) -> None:
  """Makes this process one of several, see --distributed."""
  if hosts == "auto":
    jax.distributed.initialize()
  elif hosts:
    try:
      address, count, number = hosts.split(",")
      count, number = int(count), int(number)
    except ValueError:
      sys.exit(f"error: --distributed={hosts}: expected auto or HOST:PORT,PROCESSES,PROCESS.")
    jax.distributed.initialize(address, count, number)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  join(_DISTRIBUTED.value)
  signals = []
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: signals.append(number))
  try:
    settings = dict(
      method=_METHOD.value,
      missing_rate=run_lib.parse_interval(_MISSING_RATE.value),
      seed=_SEED.value,
    )
    asked = run_lib.describe(_CONFIG.value, _DATA_DIR.value, **settings)
    dataset = run_lib.load_data(_CONFIG.value, _DATA_DIR.value)
    folder = workdir_lib.Workdir(_WORKDIR.value, asked, _DATA_DIR.value)
    run = run_lib.make_run(_CONFIG.value, dataset, **settings)
    progress = run_lib.execute(
      run,
      folder,
      checkpoint_every=_CHECKPOINT_EVERY.value,
      log_test=_LOG_TEST.value,
      should_stop=lambda: bool(signals),
    )
  except run_lib.Interrupted:
    print(f"Interrupted; saved in {_WORKDIR.value}. The same command goes on from there.")
    sys.exit(128 + signals[0])
  except train.NonFiniteLoss as error:
    newest = folder.checkpoints.latest_step()
    where = "there is no checkpoint yet" if newest is None else f"the last one is of step {newest}"
    sys.exit(f"Stopped: {error} Checkpoints are in {folder.path / 'checkpoints'}; {where}.")
  except ValueError as error:  # what the user asked for cannot be done: no traceback
    sys.exit(f"error: {error}")
  folder.close()
  sign = 1 if run.recipe.larger_is_better else -1
  print(
    f"Best epoch {int(progress.best_epoch)} on validation: {run.recipe.select} ="
    f" {sign * float(progress.best_score):.4f}. Next:\n"
    f"  python -m experiments.evaluate --workdir={_WORKDIR.value}"
  )


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
