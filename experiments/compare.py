"""Compares training methods over seeds: the protocol of the M³S paper's tables and figures.

python -m experiments.compare --config=experiments/configs/self_mm.py:sims --data_dir=data \\
    --out=runs/self_mm --missing_rate=0.4,0.6 --test_rate=0.4,0.6 --test_rate=0.6,0.8 --seeds=5

Trains every (missing rate, method, seed) that is not finished yet and evaluates the epoch that
is best on validation. Both rates may be given several times. Writes comparison.{csv,md,tex}
(mean ± std, difference to ORIG, p-values, the paper's values), robustness.* (test rates 0-0.9)
and epochs_{valid,test}.png (metrics against the epoch).
"""

import itertools
import os
import pathlib
import sys
from collections.abc import Sequence

import jax
import pandas as pd
from absl import app, flags
from ml_collections import config_flags

from experiments import jobs, report
from experiments import run as run_lib
from experiments import workdir as workdir_lib
from mmjax import evaluate

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, `misa.py:mosi`.")
_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Folder of the converted datasets.")
_OUT = flags.DEFINE_string("out", None, "Folder of the runs and of the tables.")
_METHODS = flags.DEFINE_list("methods", list(run_lib.METHODS), "Methods; ORIG is the baseline.")
_MISSING_RATE = flags.DEFINE_multi_string("missing_rate", "0.4,0.6", "Missing rate in training.")
_TEST_RATE = flags.DEFINE_multi_string("test_rate", [], "Missing rate in testing; as in training.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Number of runs per method.", lower_bound=1)
_MASK_SEEDS = flags.DEFINE_integer("mask_seeds", 3, "Test masks per run.", lower_bound=1)
_SCHEDULE = flags.DEFINE_enum(
  "schedule",
  "auto",
  ("auto", "together", "processes"),
  "All seeds of a method as one program, or a process per run; auto: together on accelerators.",
)
_PROCESSES = flags.DEFINE_integer("processes", os.cpu_count(), "Trainings at a time.")

PAPER = pathlib.Path(__file__).with_name("paper_m3s.csv")


def folder_of(rate: str, method: str, seed: int) -> pathlib.Path:
  return pathlib.Path(_OUT.value) / f"{method}-{rate}" / f"seed-{seed}"


def open_folder(rate: str, method: str, seed: int) -> workdir_lib.Workdir:
  """The folder of a run; it refuses to serve another config."""
  asked = run_lib.describe(
    _CONFIG.value,
    _DATA_DIR.value,
    method=method,
    seed=seed,
    missing_rate=run_lib.parse_interval(rate),
  )
  return workdir_lib.Workdir(folder_of(rate, method, seed), asked, _DATA_DIR.value)


def train_in_processes(left: Sequence[tuple[str, str, int]]) -> None:
  """Trains each (rate, method, seed) in its folder."""
  config = tuple(flag for flag in sys.argv[1:] if flag.startswith("--config"))
  jobs.run(
    [
      jobs.Job(
        f"{method}, {rate}, seed {seed}",
        config,
        _DATA_DIR.value,
        folder_of(rate, method, seed),
        method,
        rate,
        seed,
      )
      for rate, method, seed in left
    ],
    _PROCESSES.value,
  )


def train_together(left: Sequence[tuple[str, str, int]], dataset) -> None:
  """Trains the seeds of each (rate, method) as one program."""
  for (rate, method), keys in itertools.groupby(left, key=lambda key: key[:2]):
    keys = list(keys)
    runs = [
      run_lib.make_run(
        _CONFIG.value,
        dataset,
        method=method,
        seed=seed,
        missing_rate=run_lib.parse_interval(rate),
      )
      for _, _, seed in keys
    ]
    folders = [open_folder(*key) for key in keys]
    path = folder_of(*keys[0]).parent / "together"
    run_lib.execute_together(runs, folders, path, log_test=True)
    for folder in folders:
      folder.close()
    print(f"{method}, {rate}, seeds {[seed for _, _, seed in keys]}", flush=True)


def evaluate_all(keys: Sequence[tuple[str, str, int]], dataset) -> tuple[list[dict], list[dict]]:
  """Rows of every test condition, and of every epoch in the logs; one compiled program."""
  config = _CONFIG.value
  tested = [
    evaluate.rate_condition(*run_lib.parse_interval(rate))
    for rate in _TEST_RATE.value or _MISSING_RATE.value
  ]
  robustness = evaluate.make_robustness(
    run_lib.make_system(config),
    dataset.test,
    dataset.spec,
    [*tested, *evaluate.parse_rates("0:0.9:0.1")],
    range(_MASK_SEEDS.value),
    mask_of=run_lib.make_mask_of(config),
  )
  rows, epochs = [], []
  for rate, method, seed in keys:
    run = run_lib.make_run(
      config, dataset, method=method, seed=seed, missing_rate=run_lib.parse_interval(rate)
    )
    folder = open_folder(rate, method, seed)
    told = {"missing_rate": rate.replace(",", "-"), "method": run_lib.METHODS[method], "seed": seed}
    rows += [{**told, **row} for row in robustness(**run_lib.read_best(run, folder)[None])]
    for line in folder.history():
      loss = next(value for name, value in reversed(line["train"].items()) if "loss" in name)
      for split in ("valid", "test"):
        told_epoch = {**told, "split": split, "epoch": line["epoch"], "train_loss": loss}
        epochs.append({**told_epoch, **line.get(split, {})})
    folder.close()
  return rows, epochs


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  jobs.cores_as_devices()
  try:
    keys = list(itertools.product(_MISSING_RATE.value, _METHODS.value, range(_SEEDS.value)))
    left = [key for key in keys if not open_folder(*key).is_done]
    dataset = run_lib.load_data(_CONFIG.value, _DATA_DIR.value)
    if left:
      together = _SCHEDULE.value == "together"
      if _SCHEDULE.value == "auto":
        together = jax.default_backend() != "cpu"
      train_together(left, dataset) if together else train_in_processes(left)
    rows, epochs = evaluate_all(keys, dataset)
  except ValueError as error:
    sys.exit(f"error: {error}")
  out = pathlib.Path(_OUT.value)
  by = ("missing_rate", "method", "kind", "condition")
  report.robustness(rows, out, by=by, lines="method")
  report.epochs(epochs, out)
  report.comparison(
    rows,
    out,
    pd.read_csv(PAPER),
    model=_CONFIG.value.model.name,
    dataset=_CONFIG.value.data.name,
  )


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "out"])
  app.run(main)
