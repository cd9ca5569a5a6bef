"""The LNLN paper's protocol: variants of systems under the very same missing data, one report.

Shared by `robustness` (many systems) and `ablate` (one system with changes): their flags, the
configs that these make, and the way from a study's results to the report.
"""

import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from mmjax import data, evaluate, masking, registry, types

from . import build, cli, engines, processes, settings, study
from .report import page

MISSING = ("l", "a", "v", "la", "lv", "av")
CONDITIONS = ("rates", "modalities")
SELECTIONS = ("validation", "test_oracle")
# What the published protocol sets, where no flag says otherwise.
DEFAULTS = {"method.name": "spl", "mask.name": "bernoulli", "mask.rate": (0.0, 1.0)}
COMPLETE_SHARE = 0.5
VALID_RATE = "0.5"


def define(flag_values: flags.FlagValues) -> None:
  """Defines the flags that both binaries have."""
  string = lambda *a: flags.DEFINE_string(*a, flag_values=flag_values)  # noqa: E731
  string("dataset", "mosi", "Name of the converted dataset.")
  string("data_dir", "data", "Folder of the converted datasets.")
  string("out", "", "Folder of the runs and of the report.")
  string("method", None, f"{cli.METHOD_HELP} Of all; spl if unset.")
  string("missing_rate", None, "Missing rate in training, one or LOW,HIGH; 0,1 if unset.")
  string("valid_rate", VALID_RATE, "Missing rate at which epochs are selected, one or LOW,HIGH.")
  string("mask", None, f"Kind of missing data, {', '.join(masking.MASKS)}; bernoulli if unset.")
  flags.DEFINE_float(
    "complete_share",
    None,
    f"Share of complete samples in training, per modality; {COMPLETE_SHARE} of bernoulli if unset.",
    lower_bound=0.0,
    upper_bound=1.0,
    flag_values=flag_values,
  )
  string("seeds", "1111,1112,1113", cli.SEEDS_HELP)
  string("mask_seeds", "3", f"Test masks per run. {cli.SEEDS_HELP}")
  flags.DEFINE_list(
    "conditions",
    list(CONDITIONS),
    "What to evaluate: rates, modalities or both.",
    flag_values=flag_values,
  )
  string("shown", "0,0.5,0.9", "Rates whose predictions are drawn.")
  string(
    "feature", "feature", "Which output of the models the 2-D view shows, `corrected` of LNLN."
  )
  flags.DEFINE_enum(
    "selection",
    None,
    SELECTIONS,
    "validation; test_oracle picks, for each metric, the epoch that is best on test, as the"
    " published code.",
    flag_values=flag_values,
  )
  cli.define_set(
    flag_values,
    "Config entry of all variants, train.epochs=9, or of a model's, lnln/train.epochs=9;"
    " --config.train.epochs=9 is the same.",
  )
  engines.define(flag_values)


class Protocol:
  """What the flags ask for, checked.

  Args:
    flag_values: of the binary, parsed.
    models: names of the configs that may be addressed by `--set=MODEL/ENTRY=VALUE`.
  """

  def __init__(self, flag_values: flags.FlagValues, models: Sequence[str]):
    self._value: dict[str, Any] = {name: flag_values[name].value for name in flag_values}
    self.dataset, self.data_dir = self._value["dataset"], self._value["data_dir"]
    self.out = pathlib.Path(self._value["out"])
    self.seeds = cli.seeds("seeds", self._value["seeds"])
    self.mask_seeds = cli.seeds("mask_seeds", self._value["mask_seeds"])
    self._asked = cli.some_of("conditions", self._value["conditions"], CONDITIONS)
    self._engine = engines.make(flag_values)
    self._valid_rate = cli.rate("valid_rate", self._value["valid_rate"])
    for text in self._value["set"]:
      model, separator, _ = settings.parse(text)[0].partition("/")
      if separator and model not in models:
        near = registry.nearest(model, models)
        raise types.UsageError(f"--set={text}: {model!r}{near} is none of {', '.join(models)}.")

  def variant(self, name: str, model: str, changes: Mapping[str, Any]) -> study.Variant:
    """A line of the tables: the config of a model with changes of its own, by dotted name."""
    config, value = settings.load(model, self.dataset), self._value
    config.train.log_test = True
    settings.assign_all(config, DEFAULTS)
    short = {
      "method.name": value["method"],
      "mask.name": value["mask"],
      "mask.rate": cli.rate("missing_rate", value["missing_rate"]),
      "mask.complete_share": value["complete_share"],
    }
    settings.assign_all(config, {k: v for k, v in short.items() if v is not None})
    taken = settings.takes("mask", settings.factory(config, "mask"))
    if value["complete_share"] is None and taken is not None and "complete_share" in taken:
      settings.assign(config, "mask.complete_share", COMPLETE_SHARE)
    config.valid.rate = self._valid_rate
    if value["selection"] == "test_oracle":
      metric = "f1" if config.data.task == "classification" else "mae"
      short["train.select"] = f"test/{metric}"
    sets = dict(settings.parse(text.removeprefix(f"{model}/")) for text in value["set"])
    cli.change(config, short, {k: v for k, v in sets.items() if "/" not in k})
    try:
      settings.assign_all(config, changes)
    except types.UsageError as error:
      raise types.UsageError(f"{name}: {error}") from None
    return study.Variant(name, config, {"model": name}, name.replace("/", ""))

  def conditions(self, mask) -> list[evaluate.Condition]:
    """The missing data of the tests."""
    found = evaluate.parse_rates("0:0.9:0.1", mask=mask) if "rates" in self._asked else []
    if "modalities" in self._asked:
      found += [evaluate.missing_condition(letters, mask=mask) for letters in MISSING]
    return found

  def run(self, binary: str, variants: Sequence[study.Variant], baseline: str | None = None):
    """Trains what is not finished, evaluates every variant, and writes the report.

    Args:
      binary: name of the calling binary.
      variants: the tables' lines.
      baseline: the variant that the others are compared with, if any.
    """
    processes.cores_as_devices()
    runs = study.Study(variants, self.seeds, self.data_dir, self.out / "runs")
    shown = self._value["shown"]
    evaluate.parse_rates(shown)  # before any work
    runs.check(self.conditions)
    for variant in variants:
      self._check_feature(runs.run(variant, self.seeds[0]), variant)
    runs.train("processes", self._engine)
    results = page.Results([], {}, {}, {})
    for one in runs.evaluate(self.conditions, self.mask_seeds, swapped=True):
      results.rows.extend(one.rows)
      results.seconds[one.variant.name] = one.seconds
      if one.seed == self.seeds[0]:
        mask = build.test_mask(one.run.config)
        tested = evaluate.parse_rates(shown, mask=mask)
        for kept, output in (
          (results.shown, "prediction"),
          (results.features, self._value["feature"]),
        ):
          grid = evaluate.make_grid(
            one.run.recipe.system, one.run.dataset.test, tested, [0], output=output
          )
          values = np.asarray(grid(one.best.params, one.best.extra))[:, 0]
          if output != "prediction":
            values = values.reshape(*values.shape[:2], -1)
          names = [condition.name for condition in tested]
          kept[one.variant.name] = dict(zip(names, values, strict=True))
    dataset = runs.dataset(variants[0])
    page.write(
      results,
      np.asarray(dataset.test.label),
      dataset.spec,
      self.out,
      self._words(binary, variants[0].config),
      dataset=self.dataset,
      baseline=baseline,
    )

  def _check_feature(self, run: build.Run, variant: study.Variant) -> None:
    name, outputs = self._value["feature"], build.outputs(run)
    if name not in outputs:
      near = registry.nearest(name, outputs)
      raise types.UsageError(
        f"--feature: {variant.name} has no output {name!r}{near}; it has {', '.join(outputs)}."
      )

  def _words(self, binary: str, config: settings.Config) -> dict[str, str]:
    sha256 = data.sha256(self.data_dir, self.dataset)
    rate = cli.rate_text(settings.plain(config.mask.get("rate", ())))
    seeds = ", ".join(str(seed) for seed in self.seeds)
    return {
      "command": cli.told(shlex.join(["python", "-m", f"experiments.{binary}", *sys.argv[1:]])),
      "training": f"{build.title(config)}, missing rate {rate}, {config.mask.name} masks, seeds"
      f" {seeds}",
      "selection": page.selection_in_words(build.is_oracle(config), self._value["valid_rate"]),
      "test": f"{len(self.mask_seeds)} masks per run and condition, the same for all variants",
      "data": f"{self.dataset}, SHA-256 {sha256}",
    }
