"""Compares training methods over seeds: the protocol of the M³S paper's tables.

python -m experiments.compare --config=experiments/configs/misa.py:mosi --data_dir=data \\
    --out=runs/misa --methods=orig,spl,m3s --missing_rate=0.4,0.6 --seeds=3

Trains every (method, seed) that is not finished yet, one process per core; evaluates the epoch
that is best on validation, on test data of the same (or --test_rate) missing rate.
"""

import os
import pathlib
import subprocess
import sys
from concurrent import futures

import pandas as pd
from absl import app, flags
from ml_collections import config_flags

from experiments import report
from experiments import run as run_lib
from mmjax import evaluate

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, `misa.py:mosi`.")
_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Folder of the converted datasets.")
_OUT = flags.DEFINE_string("out", None, "Folder of the runs and of the tables.")
_METHODS = flags.DEFINE_list("methods", list(run_lib.METHODS), "Methods; ORIG is the baseline.")
_MISSING_RATE = flags.DEFINE_string("missing_rate", "0.4,0.6", "Missing rate in training.")
_TEST_RATE = flags.DEFINE_string("test_rate", None, "Missing rate in testing; as in training.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Number of runs per method.", lower_bound=1)
_MASK_SEEDS = flags.DEFINE_integer("mask_seeds", 3, "Test masks per run.", lower_bound=1)
_PROCESSES = flags.DEFINE_integer("processes", os.cpu_count(), "Trainings at a time.")

PAPER = pathlib.Path(__file__).with_name("paper_m3s.csv")


def train_all(folders: dict[tuple[str, int], pathlib.Path]) -> None:
  """Trains each (method, seed) in its folder, each process on a core of its own."""
  config = [flag for flag in sys.argv[1:] if flag.startswith("--config")]
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  free = list(range(_PROCESSES.value))

  def train_one(item):
    (method, seed), folder = item
    slot = free.pop()
    command = [
      sys.executable, "-m", "experiments.train", *config, f"--data_dir={_DATA_DIR.value}",
      f"--workdir={folder}", f"--method={method}", f"--missing_rate={_MISSING_RATE.value}",
      f"--seed={seed}",
    ]  # fmt: skip
    alone = _PROCESSES.value > 1 and cores
    pin = (lambda: os.sched_setaffinity(0, {cores[slot % len(cores)]})) if alone else None
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=pin, check=False)
    free.append(slot)
    if done.returncode:
      raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    print(f"{method}, seed {seed}: {done.stdout.splitlines()[0]}", flush=True)

  with futures.ThreadPoolExecutor(_PROCESSES.value) as pool:
    list(pool.map(train_one, folders.items()))


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  out = pathlib.Path(_OUT.value)
  test_rate = _TEST_RATE.value or _MISSING_RATE.value
  keys = [(method, seed) for seed in range(_SEEDS.value) for method in _METHODS.value]
  folders = {(m, s): out / f"{m}-{_MISSING_RATE.value}" / f"seed-{s}" for m, s in keys}
  train_all(folders)
  condition = evaluate.rate_condition(*(float(rate) for rate in test_rate.split(",")))
  grid = [condition, *evaluate.parse_rates("0:0.9:0.1")]
  rows = []
  for (method, seed), folder in folders.items():
    run, best = run_lib.load_run(folder, _DATA_DIR.value)
    found = evaluate.robustness(
      run.recipe.system, best["params"], best["extra"], run.dataset.test, run.dataset.spec,
      grid, range(_MASK_SEEDS.value), mask_of=run_lib.make_mask_of(run.config),
    )  # fmt: skip
    rows += [{"method": run_lib.METHODS[method], "seed": seed, **row} for row in found]
  report.robustness(rows, out, by=("method", "kind", "condition"), lines="method")
  paper = pd.read_csv(PAPER)
  report.comparison(
    [row for row in rows if row["condition"] == condition.name], out,
    paper[paper["input_rate"].eq(_MISSING_RATE.value.replace(",", "-"))
          & paper["test_rate"].eq(test_rate.replace(",", "-"))],
    model=_CONFIG.value.model.name, dataset=_CONFIG.value.data.name,
  )  # fmt: skip


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "out"])
  app.run(main)
