"""Robust evaluation of many systems under the same missing data: the LNLN paper's protocol.

python -m experiments.robustness --configs=lnln,almt,misa --dataset=mosi --data_dir=data \\
    --out=runs/robust --seeds=1111,1112,1113 --conditions=rates,modalities

Trains what is not finished yet, under the same kind of training masks for all, and evaluates
missing rates 0.0-0.9 and the six sets of missing modalities. Every model sees the same missing
data: masks depend on the condition, the mask seed and the sample alone. Writes tables with the
paper's values beside ours, curves, confusion matrices, a "laziness" figure, and `report.html`.
"""

import ast
import importlib
import os
import pathlib
import shlex
import sys

import ml_collections
import numpy as np
from absl import app, flags

from experiments import jobs, robust_report
from experiments import run as run_lib
from experiments import workdir as workdir_lib
from mmjax import data, evaluate, metrics, models

_CONFIGS = flags.DEFINE_list("configs", list(models.MODELS), "Systems, by their config's name.")
_DATASET = flags.DEFINE_string("dataset", "mosi", "Name of the converted dataset.")
_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Folder of the converted datasets.")
_OUT = flags.DEFINE_string("out", None, "Folder of the runs and of the report.")
_METHOD = flags.DEFINE_enum("method", "spl", list(run_lib.METHODS), "Training method of all.")
_MISSING_RATE = flags.DEFINE_string("missing_rate", "0,1", "Missing rate in training, of all.")
_VALID_RATE = flags.DEFINE_string("valid_rate", "0.5", "Missing rate at which epochs are selected.")
_MASK = flags.DEFINE_enum("mask", "bernoulli", ("span", "bernoulli"), "Kind of missing data.")
_COMPLETE_SHARE = flags.DEFINE_float(
  "complete_share", 0.5, "Share of complete samples in training, per modality (bernoulli)."
)
_SEEDS = flags.DEFINE_list("seeds", ["1111", "1112", "1113"], "Training seeds.")
_MASK_SEEDS = flags.DEFINE_integer("mask_seeds", 3, "Test masks per run.", lower_bound=1)
_CONDITIONS = flags.DEFINE_list("conditions", ["rates", "modalities"], "What to evaluate.")
_SELECTION = flags.DEFINE_enum(
  "selection", "validation", run_lib.SELECTIONS,
  "test_oracle picks epochs by the test split, as the published code does.",
)  # fmt: skip
_SET = flags.DEFINE_multi_string("set", [], "Config entry of all systems, `train.epochs=20`.")
_PROCESSES = flags.DEFINE_integer("processes", os.cpu_count(), "Trainings at a time.")

MISSING = ("l", "a", "v", "la", "lv", "av")
SHOWN = (0.0, 0.5, 0.9)  # rates whose predictions are shown


def overrides() -> dict[str, object]:
  """The config entries that all systems share, by dotted name."""
  found = {
    "mask.kind": _MASK.value,
    "mask.complete_share": _COMPLETE_SHARE.value,
    "train.valid_rate": run_lib.parse_interval(_VALID_RATE.value),
    "train.selection": _SELECTION.value,
  }
  for text in _SET.value:
    name, separator, value = text.partition("=")
    if not separator:
      raise ValueError(f"--set={text}: expected NAME=VALUE, as train.epochs=20.")
    try:
      found[name] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      found[name] = value
  return found


def make_config(name: str) -> ml_collections.ConfigDict:
  """A system's config with the shared entries."""
  try:
    module = importlib.import_module(f"experiments.configs.{name}")
  except ModuleNotFoundError:
    raise ValueError(f"there is no experiments/configs/{name}.py.") from None
  config = module.get_config(_DATASET.value)
  config.update_from_flattened_dict(overrides())
  return config


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  out, rate = pathlib.Path(_OUT.value), run_lib.parse_interval(_MISSING_RATE.value)
  seeds = [int(seed) for seed in _SEEDS.value]
  try:
    configs = {name: make_config(name) for name in _CONFIGS.value}

    def open_folder(name, seed):
      asked = run_lib.describe(
        configs[name], _DATA_DIR.value, method=_METHOD.value, missing_rate=rate, seed=seed
      )
      return workdir_lib.Workdir(out / "runs" / name / f"seed-{seed}", asked, _DATA_DIR.value)

    shared = [f"--config.{name}={value}" for name, value in overrides().items()]
    left = [
      jobs.Job(
        f"{name}, seed {seed}",
        (f"--config=experiments/configs/{name}.py:{_DATASET.value}", *shared), _DATA_DIR.value,
        out / "runs" / name / f"seed-{seed}", _METHOD.value, _MISSING_RATE.value, seed,
      )
      for name in configs for seed in seeds if not open_folder(name, seed).is_done
    ]  # fmt: skip
    jobs.run(left, _PROCESSES.value)
    rows, shown = [], {}
    for name, config in configs.items():
      dataset = run_lib.load_data(config, _DATA_DIR.value)
      found = evaluate_system(config, dataset, {s: open_folder(name, s) for s in seeds}, rate)
      rows += [{"model": name, **row} for row in found[0]]
      shown[name] = found[1]
  except ValueError as error:
    sys.exit(f"error: {error}")
  protocol = {
    "command": shlex.join(["python", "-m", "experiments.robustness", *sys.argv[1:]]),
    "training": f"{run_lib.METHODS[_METHOD.value]}, missing rate {_MISSING_RATE.value}, "
    f"{_MASK.value} masks, seeds {', '.join(_SEEDS.value)}",
    "selection": robust_report.selection_in_words(_SELECTION.value, _VALID_RATE.value),
    "test": f"{_MASK_SEEDS.value} masks per run and condition, the same for all systems",
    "data": f"{_DATASET.value}, SHA-256 {read_sha(_DATASET.value)}",
  }
  label = np.asarray(dataset.test.label)
  robust_report.write(rows, shown, label, dataset.spec, out, protocol, dataset=_DATASET.value)


def read_sha(dataset: str) -> str:
  return data.read_card(_DATA_DIR.value, dataset)["sha256"]


def evaluate_system(config, dataset, folders, rate):
  """Rows of every condition and seed, and the first seed's predictions at `SHOWN` rates."""
  conditions = []
  if "rates" in _CONDITIONS.value:
    conditions += evaluate.parse_rates("0:0.9:0.1")
  if "modalities" in _CONDITIONS.value:
    conditions += [evaluate.missing_condition(letters) for letters in MISSING]
  system, mask_seeds = run_lib.make_system(config), list(range(_MASK_SEEDS.value))
  grid = evaluate.make_grid(system, dataset.test, run_lib.make_mask_of(config))
  rates = np.stack([condition.rates for condition in conditions])
  rows, shown = [], {}
  for seed, folder in folders.items():
    run = run_lib.make_run(
      config, dataset, method=_METHOD.value, missing_rate=rate, seed=seed
    )
    predictions = np.asarray(grid(**run_lib.read_best(run, folder), rates=rates, seeds=mask_seeds))
    folder.close()
    for c, condition in enumerate(conditions):
      for s in mask_seeds:
        found = metrics.compute(dataset.spec, predictions[c, s], dataset.test.label)
        told = {"kind": condition.kind, "condition": condition.name}
        rows.append({**told, "seed": seed, "mask_seed": s, **found})
      if condition.kind == "rate" and float(condition.name) in SHOWN:
        shown.setdefault(condition.name, predictions[c, 0])
  return rows, shown


if __name__ == "__main__":
  flags.mark_flags_as_required(["out"])
  app.run(main)
