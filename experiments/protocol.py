"""Variants of systems under the very same missing data, and one report of them.

Shared by `robustness` (many systems) and `ablate` (one system with changes): their flags, the
configs that these and a protocol (`protocols.PROTOCOLS`) make, and the way from a study's results
to the report.
"""

import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from mmjax import data, evaluate, masking, registry, types

from . import build, cli, engines, processes, protocols, settings, study
from .configs import common
from .report import charts, constant, page, predictions

SELECTIONS = ("validation", "test_oracle")


def define(flag_values: flags.FlagValues) -> None:
  """Defines the flags that both binaries have; what is unset is the protocol's."""
  string = lambda *a: flags.DEFINE_string(*a, flag_values=flag_values)  # noqa: E731
  string("protocol", "lnln", f"Whose missing data: {', '.join(protocols.PROTOCOLS)}.")
  string("dataset", "mosi", "Name of the converted dataset.")
  string("data_dir", "data", "Folder of the converted datasets.")
  string("out", "", "Folder of the runs and of the report.")
  string("method", None, f"{cli.METHOD_HELP} Of all; the protocol's if unset.")
  string("missing_rate", None, "Missing rate in training, one or LOW,HIGH.")
  string("valid_rate", None, "Missing rate at which epochs are selected, one or LOW,HIGH.")
  string("mask", None, f"Kind of missing data in training: {', '.join(masking.MASKS)}.")
  flags.DEFINE_float(
    "complete_share",
    None,
    "Share of complete samples in training, per modality, of masks that have one.",
    lower_bound=0.0,
    upper_bound=1.0,
    flag_values=flag_values,
  )
  string("seeds", None, cli.SEEDS_HELP)
  string("mask_seeds", None, f"Test masks per run. {cli.SEEDS_HELP}")
  flags.DEFINE_list(
    "conditions",
    None,
    "What to evaluate, as rates or modalities; all that the protocol has if unset.",
    flag_values=flag_values,
  )
  string("baseline", None, "System with which the others are compared by t-tests.")
  string("shown", None, "Rates whose predictions and representations are drawn.")
  string(
    "feature", "feature", "Which output of the models the 2-D view shows, `corrected` of LNLN."
  )
  string("view", None, f"How the 2-D view is made: {', '.join(predictions.VIEWS)}.")
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
  study.define_schedule(flag_values)
  engines.define(flag_values)


def ablations(model: str) -> dict[str, Any]:
  """Name -> line -> config entries: the sets of changes that a model has."""
  return common.ABLATIONS | getattr(settings.module_of(model), "ABLATIONS", {})


class Asked:
  """What the flags ask for, checked.

  Args:
    flag_values: of the binary, parsed.
    models: the configs, names or files, that may be addressed by `--set=NAME/ENTRY=VALUE`.
  """

  def __init__(self, flag_values: flags.FlagValues, models: Sequence[str]):
    charts.check()
    self._value: dict[str, Any] = {name: flag_values[name].value for name in flag_values}
    self.protocol: protocols.Protocol = protocols.PROTOCOLS[
      cli.some_of("protocol", [self._value["protocol"]], list(protocols.PROTOCOLS))[0]
    ]
    for name in ("seeds", "mask_seeds", "shown", "view"):
      if self._value[name] is None:
        self._value[name] = getattr(self.protocol, name)
    self.dataset, self.data_dir = self._value["dataset"], self._value["data_dir"]
    self.out = pathlib.Path(self._value["out"])
    self.seeds = cli.seeds("seeds", self._value["seeds"])
    self.mask_seeds = cli.seeds("mask_seeds", self._value["mask_seeds"])
    groups = list(self.protocol.tests)
    asked = self._value["conditions"]
    self._asked = cli.some_of("conditions", groups if asked is None else asked, groups)
    cli.some_of("view", [self._value["view"]], list(predictions.VIEWS))
    self._engine = engines.make(flag_values)
    for text in self._value["set"]:
      model, separator, _ = settings.parse(text)[0].partition("/")
      known = [pathlib.Path(one).stem for one in models]
      if separator and model not in known:
        near = registry.nearest(model, known)
        raise types.UsageError(f"--set={text}: {model!r}{near} is none of {', '.join(known)}.")

  def variant(self, name: str, model: str, changes: Mapping[str, Any]) -> study.Variant:
    """A line of the tables: the config of a model with changes of its own, by dotted name."""
    config, value = settings.load(model, self.dataset), self._value
    config.train.log_test = True
    short = {
      "method.name": value["method"],
      "mask.name": value["mask"],
      "mask.rate": cli.rate("missing_rate", value["missing_rate"]),
      "mask.complete_share": value["complete_share"],
    }
    short = {entry: given for entry, given in short.items() if given is not None}
    own = {**self.protocol.entries, **self.protocol.datasets.get(self.dataset, {})}
    names = {entry: given for entry, given in {**own, **short}.items() if entry.endswith(".name")}
    settings.assign_all(config, names)
    settings.assign_all(config, {k: v for k, v in own.items() if self._serves(config, k)})
    settings.assign_all(config, short)
    self._set_valid_rate(config)
    if value["selection"] == "test_oracle":
      short["train.select"] = "test/mae" if config.data.task == "regression" else "test/f1"
    own_prefix = f"{pathlib.Path(model).stem}/"
    sets = dict(settings.parse(text.removeprefix(own_prefix)) for text in value["set"])
    cli.change(config, short, {k: v for k, v in sets.items() if "/" not in k})
    try:
      settings.assign_all(config, changes)
    except types.UsageError as error:
      raise types.UsageError(f"{name}: {error}") from None
    return study.Variant(name, config, {"model": name}, name.replace("/", ""))

  def _serves(self, config, entry: str) -> bool:
    """Whether a config takes an entry of the protocol: another mask may have been asked for."""
    section, _, setting = entry.partition(".")
    if section not in settings.REGISTRIES:
      return True
    taken = settings.takes(section, settings.factory(config, section))
    return setting != "name" and (taken is None or setting in taken)

  def _set_valid_rate(self, config) -> None:
    given, own = self._value["valid_rate"], self.protocol.valid_rate
    if given is not None:
      settings.assign(config, "valid.rate", cli.rate("valid_rate", given))
    elif own is not None and build.takes_rate(config):
      config.valid.rate = cli.rate("valid_rate", own)

  def conditions(self, config: settings.Config) -> list[evaluate.Condition]:
    """The missing data of the tests; groups with the same mask are one family."""
    made, found = {}, []
    for tests in (self.protocol.tests[name] for name in self._asked):
      key = str(tests.mask)
      made[key] = made.get(key) or tests.factory(config)
      found += tests.conditions(made[key])
    return found

  def run(self, binary: str, variants: Sequence[study.Variant], baseline: str | None = None):
    """Trains what is not finished, evaluates every variant, and writes the report.

    Args:
      binary: name of the calling binary.
      variants: the tables' lines.
      baseline: the variant that the others are compared with, if `--baseline` names none.
    """
    processes.cores_as_devices()
    baseline, names = self._value["baseline"] or baseline, [variant.name for variant in variants]
    if baseline is not None:
      cli.some_of("baseline", [baseline], names)
    runs = study.Study(variants, self.seeds, self.data_dir, self.out / "runs")
    rated = self.protocol.tests.get("rates") or next(iter(self.protocol.tests.values()))
    evaluate.parse_rates(self._value["shown"])  # before any work
    runs.check(self.conditions)
    for variant in variants:
      evaluate.parse_rates(self._value["shown"], mask=rated.factory(variant.config))
      self._check_feature(runs.run(variant, self.seeds[0]), variant)
    runs.train(self._value["schedule"], self._engine)
    results = page.Results([], {}, {}, {}, {})
    for one in runs.evaluate(self.conditions, self.mask_seeds, swapped=True):
      results.rows.extend(one.rows)
      results.seconds[one.variant.name] = one.seconds
      if one.seed == self.seeds[0]:
        results.tested[one.variant.name] = one.predictions
        self._draw(results, one, rated)
    dataset, config = runs.dataset(variants[0]), variants[0].config
    tested, told = self.conditions(config), protocols.describe(self.protocol, self._asked, config)
    results.rows.extend(constant.rows(dataset, tested, column="model", swapped=True))
    page.write(
      results,
      np.asarray(dataset.test.label),
      dataset.spec,
      dataset.ids["test"],
      self.out,
      self._words(binary, config, told),
      dataset=self.dataset,
      quantity=masking.quantity(rated.settings(config)["name"]),
      missing=runs.missing(self.conditions, self.mask_seeds),
      protocol=self.protocol,
      paper=None if self.protocol.paper is None else self.protocol.paper(config),
      view=self._value["view"],
      baseline=baseline,
    )

  def _draw(self, results: page.Results, one: study.Evaluated, rated: protocols.Tests) -> None:
    """Keeps a run's predictions and representations at the rates that are drawn."""
    tested = evaluate.parse_rates(self._value["shown"], mask=rated.factory(one.run.config))
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

  def _check_feature(self, run: build.Run, variant: study.Variant) -> None:
    name, outputs = self._value["feature"], build.outputs(run)
    if name not in outputs:
      near = registry.nearest(name, outputs)
      raise types.UsageError(
        f"--feature: {variant.name} has no output {name!r}{near}; it has {', '.join(outputs)}."
      )

  def _words(self, binary: str, config: settings.Config, told: dict[str, str]) -> dict[str, str]:
    sha256 = data.sha256(self.data_dir, self.dataset)
    mask = settings.plain(config.mask)
    rate = f", missing rate {cli.rate_text(mask['rate'])}" if "rate" in mask else ""
    valid = build.valid_condition(config)
    seeds = ", ".join(str(seed) for seed in self.seeds)
    mask = {k: v for k, v in mask.items() if k != "drop"}
    return {
      "command": cli.told(shlex.join(["python", "-m", f"experiments.{binary}", *sys.argv[1:]])),
      "protocol": self.protocol.title,
      "training": f"{build.title(config)}{rate}, {config.mask.name} masks, seeds {seeds}",
      "missing in training": f"{masking.describe(**mask)}",
      "selection": page.selection_in_words(
        build.is_oracle(config), f"{valid.kind.replace('rate', 'missing rate')} {valid.name}"
      ),
      "test": f"{len(self.mask_seeds)} masks per run and condition, the same for all variants",
      **{f"missing in testing, {name}": text for name, text in told.items()},
      "data": f"{self.dataset}, SHA-256 {sha256}",
    }
