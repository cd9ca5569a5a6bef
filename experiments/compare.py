"""Compares training methods over seeds: the protocol of the M³S paper's tables and figures.

python -m experiments.compare --config=self_mm:sims --data_dir=data --out=runs/self_mm \\
    --missing_rate=0.4,0.6 --test_rate=0.4,0.6 --test_rate=0.6,0.8 --seeds=5

Trains every (missing rate, method, seed) that is not finished yet and evaluates the epoch that
is best on validation. Both rates may be given several times. Writes comparison.{csv,md,tex}
(mean ± std, difference to ORIG, p-values raw and Holm-corrected, the paper's values),
robustness.* (test rates 0-0.9), missing_data.* (what exactly was missing),
epochs_{valid,test}.png (metrics against the epoch) and report.html with all of it.
"""

import itertools
import pathlib
import shlex
import sys
from collections.abc import Sequence

import numpy as np
import pandas as pd
from absl import flags

from mmjax import data, evaluate, masking, meta, types

from . import build, cli, engines, processes, settings, study
from .report import charts, constant, methods, page, rates

_FLAGS = flags.FlagValues()
_CONFIG, _SET = cli.define_config(_FLAGS)
_DATA_DIR = flags.DEFINE_string(
  "data_dir", "data", "Folder of the converted datasets.", flag_values=_FLAGS
)
_OUT = flags.DEFINE_string("out", "", "Folder of the runs and tables.", flag_values=_FLAGS)
_METHODS = flags.DEFINE_list(
  "methods",
  list(meta.METHODS),
  "Methods; orig, or else the first, is the baseline.",
  flag_values=_FLAGS,
)
_MISSING_RATE = flags.DEFINE_multi_string(
  "missing_rate", None, "Missing rate in training; the config's if unset.", flag_values=_FLAGS
)
_TEST_RATE = flags.DEFINE_multi_string(
  "test_rate", [], "Missing rate in testing; as in training if unset.", flag_values=_FLAGS
)
_SEEDS = flags.DEFINE_string("seeds", "3", cli.SEEDS_HELP, flag_values=_FLAGS)
_MASK_SEEDS = flags.DEFINE_string("mask_seeds", "3", cli.SEEDS_HELP, flag_values=_FLAGS)
study.define_schedule(_FLAGS)
engines.define(_FLAGS)

FEW = 5  # runs, below which a p-value says little


def make_variants(training_rates: Sequence[str | None]) -> list[study.Variant]:
  """A line for each missing rate and method."""
  sets, found = cli.entries(_SET.value), []
  names = cli.lookup_all("methods", "method", _METHODS.value)
  taken = {n: settings.takes("method", f) for n, f in names.items()}

  def serves(entry, name):  # settings of one method are none of another's
    section, _, setting = entry.partition(".")
    known = taken[name]
    if section != "method" or setting == "name" or known is None:
      return True
    return setting.partition(".")[0] in known

  for entry in sets:
    if not any(serves(entry, name) for name in names):
      raise types.UsageError(f"--set={entry}=…: none of {', '.join(names)} takes it.")
  for text, name in itertools.product(training_rates, names):
    config = settings.load(_CONFIG.value)
    config.train.log_test = True
    short = {"method.name": name, "mask.rate": cli.rate("missing_rate", text)}
    cli.change(config, short, {e: v for e, v in sets.items() if serves(e, name)})
    rate = text or cli.rate_text(settings.plain(config.mask.get("rate", ())))
    columns = {"missing_rate": rate.replace(",", "-"), "method": build.title(config)}
    folder = f"{name.replace(':', '.')}-{rate}"
    found.append(study.Variant(f"{name}, {rate}", config, columns, folder))
  return found


def words(config: settings.Config, seeds: Sequence[int], mask_seeds: Sequence[int]):
  """What was done, for the report."""
  valid, test = build.valid_condition(config), build.test_settings(config)
  told = masking.describe(**{k: v for k, v in test.items() if k not in ("rate", "drop")})
  sha256 = data.sha256(_DATA_DIR.value, config.data.name)
  return {
    "protocol": "The M³S paper's comparison: training methods under the same missing data",
    "command": cli.told(shlex.join(["python", "-m", "experiments.compare", *sys.argv[1:]])),
    "training": f"seeds {', '.join(map(str, seeds))}, {config.mask.name} masks",
    "missing in testing": f"{told}. The rate is {masking.quantity(test['name'])}.",
    "selection": page.selection_in_words(build.is_oracle(config), f"{valid.kind} {valid.name}"),
    "test": f"{len(mask_seeds)} masks per run and condition, the same for all methods",
    "data": f"{config.data.name}, SHA-256 {sha256}",
  }


@cli.binary(_FLAGS, __doc__, required=["config", "out", "methods"])
def main():
  charts.check()
  processes.cores_as_devices()
  engine = engines.make(_FLAGS)
  seeds, mask_seeds = (cli.seeds(f.name, f.value) for f in (_SEEDS, _MASK_SEEDS))
  variants = make_variants(_MISSING_RATE.value or [None])
  trained = [cli.rate_text(settings.plain(v.config.mask.get("rate", ()))) for v in variants]
  asked = _TEST_RATE.value or list(dict.fromkeys(trained))
  tested = [rate for text in asked if (rate := cli.rate("test_rate", text))]

  def conditions(config):
    mask = build.test_mask(config)
    own = [evaluate.rate_condition(*rate, mask=mask) for rate in tested]
    names = [condition.name for condition in own]
    curve = evaluate.parse_rates("0:0.9:0.1", mask=mask)
    return own + [condition for condition in curve if condition.name not in names]

  runs = study.Study(variants, seeds, _DATA_DIR.value, _OUT.value)
  runs.check(conditions)
  if len(seeds) < FEW:
    cli.note(f"{len(seeds)} runs per method are few: p-values and std say little below {FEW}.")
  runs.train(str(_FLAGS["schedule"].value), engine)
  rows, predictions = [], {}
  names = rates.line_names(pd.DataFrame([variant.columns for variant in variants]))
  named = dict(zip([variant.folder for variant in variants], names, strict=True))
  for one in runs.evaluate(conditions, mask_seeds):
    rows += one.rows
    if one.seed == seeds[0]:
      predictions[named[one.variant.folder]] = one.predictions
  for variant in {variant.columns["missing_rate"]: variant for variant in variants}.values():
    same = constant.rows(runs.dataset(variant), conditions(variant.config), column="method")
    rows += [{"missing_rate": variant.columns["missing_rate"], **row} for row in same]
  out, titles = pathlib.Path(_OUT.value), [variant.columns["method"] for variant in variants]
  by = ("missing_rate", "method", "split", "selection", "kind", "condition")
  test, config = build.test_settings(variants[0].config), variants[0].config
  quantity, dataset = masking.quantity(test["name"]), runs.dataset(variants[0])
  rates.write(rows, out, by=by, lines="method", quantity=quantity)
  missing = rates.missing(runs.missing(conditions, mask_seeds), out, [test])
  epochs = rates.epochs(runs.epochs(), out)
  asked = [evaluate.rate_condition(*rate).name for rate in tested]
  compared = methods.comparison(
    rows,
    out,
    pd.read_csv(methods.PAPER),
    conditions=asked,
    model=config.model.name,
    dataset=config.data.name,
    baseline="ORIG" if "ORIG" in titles else titles[0],
  )
  methods.write_page(
    rows,
    compared,
    predictions,
    np.asarray(dataset.test.label),
    dataset.spec,
    dataset.ids["test"],
    out,
    words(config, seeds, mask_seeds),
    title=f"Training methods of {config.model.name} on {config.data.name}",
    conditions=asked,
    epochs=epochs,
    missing=missing,
    quantity=quantity,
  )


if __name__ == "__main__":
  main()
