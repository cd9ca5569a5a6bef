"""Variants of systems, trained and evaluated under the very same missing data.

Shared by `experiments.robustness` (many systems) and `experiments.ablate` (one system with
changes), with the flags that both have.
"""

import ast
import importlib
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np
import tqdm
from absl import flags

from experiments import jobs, robust_report
from experiments import run as run_lib
from experiments import workdir as workdir_lib
from mmjax import data, evaluate, metrics

_DATASET = flags.DEFINE_string("dataset", "mosi", "Name of the converted dataset.")
_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Folder of the converted datasets.")
_OUT = flags.DEFINE_string("out", None, "Folder of the runs and of the report.", required=True)
_METHOD = flags.DEFINE_enum("method", "spl", list(run_lib.METHODS), "Training method of all.")
_MISSING_RATE = flags.DEFINE_string("missing_rate", "0,1", "Missing rate in training.")
_VALID_RATE = flags.DEFINE_string("valid_rate", "0.5", "Missing rate at which epochs are selected.")
_MASK = flags.DEFINE_enum("mask", "bernoulli", ("span", "bernoulli"), "Kind of missing data.")
_COMPLETE_SHARE = flags.DEFINE_float(
  "complete_share", 0.5, "Share of complete samples in training, per modality (bernoulli)."
)
_SEEDS = flags.DEFINE_list("seeds", ["1111", "1112", "1113"], "Training seeds.")
_MASK_SEEDS = flags.DEFINE_integer("mask_seeds", 3, "Test masks per run.", lower_bound=1)
_CONDITIONS = flags.DEFINE_list(
  "conditions", ["rates", "modalities"], "What to evaluate: rates, modalities or both."
)
_SHOWN = flags.DEFINE_string("shown", "0,0.5,0.9", "Rates whose predictions are drawn.")
_FEATURE = flags.DEFINE_string(
  "feature", "feature", "Which of a model's outputs the 2-D view shows, `corrected` of LNLN."
)
_SELECTION = flags.DEFINE_enum(
  "selection",
  "validation",
  run_lib.SELECTIONS,
  "test_oracle picks, for each metric, the epoch that is best on test, as the published code.",
)
_SET = flags.DEFINE_multi_string(
  "set", [], "Config entry of all variants, train.epochs=9, or of a model's, lnln/train.epochs=9."
)
_PROCESSES = flags.DEFINE_integer("processes", os.cpu_count(), "Trainings at a time.")

MISSING = ("l", "a", "v", "la", "lv", "av")


class Variant(NamedTuple):
  """One line of the tables.

  Attributes:
    name: how it is called.
    model: its config's name, as in experiments/configs/MODEL.py.
    changes: config entries by dotted name; "missing_rate" is the training's.
  """

  name: str
  model: str
  changes: Mapping[str, object]


def parse_change(text: str) -> tuple[str, object]:
  """ "train.epochs=20" -> ("train.epochs", 20)."""
  name, separator, value = text.partition("=")
  if not separator:
    raise ValueError(f"{text!r} is no change of a config: expected NAME=VALUE, train.epochs=20.")
  try:
    return name, ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return name, value


def shared_changes(model: str) -> dict[str, object]:
  """The config entries that all variants of a model share, from the flags."""
  own = [text.removeprefix(f"{model}/") for text in _SET.value]
  return {
    "mask.kind": _MASK.value,
    "mask.complete_share": _COMPLETE_SHARE.value,
    "train.valid_rate": run_lib.parse_interval(_VALID_RATE.value),
    "train.selection": _SELECTION.value,
    **dict(parse_change(text) for text in own if "/" not in text.partition("=")[0]),
  }


def _check_set(models) -> None:
  for text in _SET.value:
    model, separator, _ = text.partition("=")[0].partition("/")
    if separator and model not in models:
      raise ValueError(f"--set={text}: {model!r} is none of {', '.join(sorted(models))}.")


def config_module(model: str):
  """experiments/configs/MODEL.py."""
  try:
    return importlib.import_module(f"experiments.configs.{model}")
  except ModuleNotFoundError as error:
    if error.name != f"experiments.configs.{model}":
      raise
    raise ValueError(f"there is no experiments/configs/{model}.py.") from None


class _Plan(NamedTuple):
  """A variant with all that its runs need."""

  variant: Variant
  config: ml_collections.ConfigDict
  flags: tuple[str, ...]
  missing_rate: str

  @classmethod
  def of(cls, variant):
    changes = {**shared_changes(variant.model), **variant.changes}
    missing_rate = str(changes.pop("missing_rate", _MISSING_RATE.value))
    config = config_module(variant.model).get_config(_DATASET.value)
    try:
      config.update_from_flattened_dict(changes)
    except (KeyError, TypeError) as error:
      raise ValueError(f"{variant.name}: the config of {variant.model} refuses {error}.") from None
    file = f"--config=experiments/configs/{variant.model}.py:{_DATASET.value}"
    own = tuple(f"--config.{name}={value}" for name, value in changes.items())
    return cls(variant, config, (file, *own), missing_rate)

  def path(self, seed):
    return pathlib.Path(_OUT.value) / "runs" / self.variant.name.replace("/", "") / f"seed-{seed}"

  def open(self, seed):
    asked = run_lib.describe(
      self.config,
      _DATA_DIR.value,
      method=_METHOD.value,
      missing_rate=run_lib.parse_interval(self.missing_rate),
      seed=seed,
    )
    return workdir_lib.Workdir(self.path(seed), asked, _DATA_DIR.value)

  def job(self, seed):
    return jobs.Job(
      f"{self.variant.name}, seed {seed}",
      self.flags,
      _DATA_DIR.value,
      self.path(seed),
      _METHOD.value,
      self.missing_rate,
      seed,
    )


def main(binary: str, variants: Sequence[Variant], *, baseline: str | None = None) -> None:
  """Trains what is not finished, evaluates every variant, and writes the report.

  Args:
    binary: name of the calling binary.
    variants: the tables' lines.
    baseline: the variant that the others are compared with, if any.
  """
  jobs.cores_as_devices()
  seeds = [int(seed) for seed in _SEEDS.value]
  try:
    _check_set({variant.model for variant in variants})
    plans = [_Plan.of(variant) for variant in variants]
    left = [plan.job(s) for plan in plans for s in seeds if not _is_done(plan, s)]
    jobs.run(left, _PROCESSES.value)
    dataset = run_lib.load_data(plans[0].config, _DATA_DIR.value)
    results = robust_report.Results([], {}, {}, {})
    bar = tqdm.tqdm(total=len(plans) * len(seeds), unit="run", desc="evaluated", dynamic_ncols=True)
    with bar:
      for plan in plans:
        _evaluate(plan, dataset, seeds, results, bar)
  except ValueError as error:
    sys.exit(f"error: {error}")
  sha256 = data.read_card(_DATA_DIR.value, _DATASET.value)["sha256"]
  protocol = {
    "command": shlex.join(["python", "-m", f"experiments.{binary}", *sys.argv[1:]]),
    "training": f"{run_lib.METHODS[_METHOD.value]}, missing rate {_MISSING_RATE.value}, "
    f"{_MASK.value} masks, seeds {', '.join(_SEEDS.value)}",
    "selection": robust_report.selection_in_words(_SELECTION.value, _VALID_RATE.value),
    "test": f"{_MASK_SEEDS.value} masks per run and condition, the same for all variants",
    "data": f"{_DATASET.value}, SHA-256 {sha256}",
  }
  robust_report.write(
    results,
    np.asarray(dataset.test.label),
    dataset.spec,
    pathlib.Path(_OUT.value),
    protocol,
    dataset=_DATASET.value,
    baseline=baseline,
  )


def _is_done(plan, seed) -> bool:
  folder = plan.open(seed)
  folder.close()
  return folder.is_done


def _conditions() -> list[evaluate.Condition]:
  unknown = set(_CONDITIONS.value) - {"rates", "modalities"}
  if unknown or not _CONDITIONS.value:
    raise ValueError(f"--conditions={','.join(_CONDITIONS.value)}: expected rates, modalities.")
  found = evaluate.parse_rates("0:0.9:0.1") if "rates" in _CONDITIONS.value else []
  if "modalities" in _CONDITIONS.value:
    found += [evaluate.missing_condition(letters) for letters in MISSING]
  return found


def _evaluate(plan, dataset, seeds, results: robust_report.Results, bar: tqdm.tqdm) -> None:
  """Adds a variant's results; its whole grid is one compiled program."""
  name, conditions, mask_seeds = plan.variant.name, _conditions(), list(range(_MASK_SEEDS.value))
  mask_of = run_lib.make_mask_of(plan.config)
  rates = np.stack([condition.rates for condition in conditions])
  run = run_lib.make_run(  # what is read of it is the same for all seeds
    plan.config,
    dataset,
    method=_METHOD.value,
    missing_rate=run_lib.parse_interval(plan.missing_rate),
    seed=seeds[0],
  )
  grid = evaluate.make_grid(run.recipe.system, dataset.test, mask_of)
  represent = evaluate.make_grid(run.recipe.system, dataset.test, mask_of, output=_FEATURE.value)
  for seed in seeds:
    folder = plan.open(seed)
    # selected once for all metrics, or by each metric for itself (the oracle)
    selected = run_lib.read_best(run, folder)
    folder.close()
    predictions = {}
    for metric, best in selected.items():
      began = time.perf_counter()
      predictions[metric] = np.asarray(grid(**best, rates=rates, seeds=mask_seeds))
      results.seconds[name] = time.perf_counter() - began  # the last one is compiled
    for c, condition in enumerate(conditions):
      for s in mask_seeds:
        found = {
          metric: metrics.compute(dataset.spec, values[c, s], dataset.test.label, swapped=True)
          for metric, values in predictions.items()
        }
        told = {"kind": condition.kind, "condition": condition.name, "seed": seed, "mask_seed": s}
        own = {metric: found[metric][metric] for metric in run.recipe.also}
        results.rows.append({"model": name, **told, **found[None], **own})
    if seed == seeds[0]:
      _show(plan, selected[None], grid, represent, results)
    bar.update()


def _show(plan, best, grid, represent, results) -> None:
  """Predictions and representations of one run at the rates that are drawn."""
  conditions = evaluate.parse_rates(_SHOWN.value)
  rates = np.stack([condition.rates for condition in conditions])
  for kept, make in ((results.shown, grid), (results.features, represent)):
    try:
      values = np.asarray(make(**best, rates=rates, seeds=[0]))[:, 0]
    except KeyError:
      raise ValueError(f"{plan.variant.model} has no output {_FEATURE.value!r}.") from None
    values = values if kept is results.shown else values.reshape(*values.shape[:2], -1)
    kept[plan.variant.name] = {c.name: v for c, v in zip(conditions, values, strict=True)}
