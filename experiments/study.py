"""The one study engine: variants × seeds -> train what is missing -> evaluate -> rows.

`compare`, `robustness` and `ablate` are protocols over it: which variants, which missing data,
which report.
"""

import itertools
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from absl import flags

from mmjax import data, evaluate, metrics, train, types

from . import build, interrupts, loop, processes, settings, together, workdir

SCHEDULES = ("auto", "together", "processes")
# the test conditions of a config; they hang on its mask alone
Conditions = Callable[[settings.Config], list[evaluate.Condition]]


def define_schedule(flag_values: flags.FlagValues) -> None:
  """Defines the flag of a binary that trains by `Study.train`."""
  flags.DEFINE_enum(
    "schedule",
    "auto",
    SCHEDULES,
    "All seeds of a line as one program, or a process per run; auto: together on accelerators.",
    flag_values=flag_values,
  )


class Variant(NamedTuple):
  """One line of a study's tables.

  Attributes:
    name: how it is called in messages.
    config: of its runs, but for the seed.
    columns: what its rows are told apart by.
    folder: of its runs, below the study's.
  """

  name: str
  config: settings.Config
  columns: dict[str, str]
  folder: str


class Evaluated(NamedTuple):
  """What one run gave.

  Attributes:
    variant, seed: which one.
    run: it.
    best: its selected epoch; an oracle's by its first metric.
    rows: per condition and mask seed: the variant's columns, "split", "selection" (what picked
      the epoch), "seed", "kind", "condition", "mask_seed" and the metrics.
    predictions: (kind, condition) -> [N, ...] of `best`, under the first test mask.
    seconds: of the last evaluation of the whole grid.
  """

  variant: Variant
  seed: int
  run: build.Run
  best: train.Best
  rows: list[dict[str, Any]]
  predictions: dict[tuple[str, str], np.ndarray]
  seconds: float


class Study:
  """Variants × seeds in their folders.

  Args:
    variants: the lines of the tables.
    seeds: of the trainings of each.
    data_dir: folder of the datasets.
    root: folder of all runs.
  """

  def __init__(
    self,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    data_dir: build.Path,
    root: build.Path,
  ):
    self.variants, self.seeds = list(variants), list(seeds)
    self.data_dir, self.root = pathlib.Path(data_dir), pathlib.Path(root)
    self._datasets: dict[str, data.Dataset] = {}

  def path(self, variant: Variant, seed: int) -> pathlib.Path:
    """The folder of a run."""
    return self.root / variant.folder / f"seed-{seed}"

  def run(self, variant: Variant, seed: int) -> build.Run:
    """A run, set up."""
    config = settings.from_json(settings.plain(variant.config))
    config.seed = seed
    return build.make_run(config, self.dataset(variant))

  def dataset(self, variant: Variant) -> data.Dataset:
    """The data of a variant; read once."""
    asked = json.dumps(settings.plain(variant.config.data), sort_keys=True)
    if asked not in self._datasets:
      self._datasets[asked] = build.load_data(variant.config, self.data_dir)
    return self._datasets[asked]

  def check(self, conditions: Conditions) -> None:
    """Raises a `UsageError` on whatever cannot be trained or tested; writes nothing.

    Every variant that has a run to train is traced; the first of those that differ in numbers
    alone.
    """
    traced = set()
    folders = [variant.folder for variant in self.variants]
    if twice := {folder for folder in folders if folders.count(folder) > 1}:
      raise types.UsageError(f"{', '.join(sorted(twice))}: there is more than one of this name.")
    for variant in self.variants:
      conditions(variant.config)
      runs = [self.run(variant, seed) for seed in self.seeds]
      for run, seed in zip(runs, self.seeds, strict=True):
        workdir.check(self.path(variant, seed), build.describe(run.config, self.data_dir))
      if not all(workdir.is_done(self.path(variant, seed)) for seed in self.seeds):
        if (shape := together.shape_of(runs[0])) not in traced:
          build.trace(runs[0])
        traced.add(shape)

  def train(self, schedule: str, engine: processes.Engine, *, across: bool = False) -> None:
    """Trains every run that is not finished; after a signal it exits, and the same command goes on.

    Args:
      schedule: "processes": one for each run; "together": all seeds of a variant as one program,
        here; "auto": together on this machine's accelerators.
      engine: what trains the processes.
      across: "together": variants that differ in numbers alone are one program, too.

    Raises:
      UsageError: if a run could not be trained as asked, after the others; NonFiniteLoss too, if
        it trained together with nothing but its own seeds.
    """
    pairs = itertools.product(self.variants, self.seeds)
    left = [(v, seed) for v, seed in pairs if not workdir.is_done(self.path(v, seed))]
    if not left:
      return
    if schedule == "auto":
      here = isinstance(engine, processes.Processes)
      schedule = "together" if here and jax.default_backend() != "cpu" else "processes"
    told = "Stopping the trainings after this stretch of steps"
    with interrupts.Watch(told) as watch:
      try:
        if schedule == "together":
          self._train_together(left, engine, watch, across)
        else:
          self._train_in_processes(left, engine, watch)
      except interrupts.Interrupted:
        assert watch.signal is not None
        print(f"Interrupted; saved in {self.root}. The same command goes on from there.")
        sys.exit(128 + watch.signal)

  def _train_in_processes(self, left, engine, watch) -> None:
    trainings = []
    for variant, seed in left:
      path, run = self.path(variant, seed), self.run(variant, seed)
      workdir.prepare(path, build.describe(run.config, self.data_dir), self.data_dir)
      name = f"{variant.name}, seed {seed}"
      trainings.append(processes.Training(name, path, run.config.train.epochs))
    processes.run(trainings, engine, watch)

  def _train_together(self, left, engine, watch, across) -> None:
    runs = [self.run(*pair) for pair in left]
    if across:
      groups = together.Groups().of(runs)
    else:
      by_folder = itertools.groupby(range(len(left)), key=lambda n: left[n][0].folder)
      groups = [list(ones) for _, ones in by_folder]
    failed = []
    for ones in groups:
      pairs = [left[n] for n in ones]
      common = self.root / pairs[0][0].folder / "together"
      names = ", ".join(dict.fromkeys(variant.name for variant, _ in pairs))
      try:
        loop.execute_together(
          [runs[n] for n in ones],
          [self.path(*pair) for pair in pairs],
          self.data_dir,
          common,
          should_stop=lambda: watch.signal is not None,
        )
      except train.NonFiniteLoss:
        if not across:
          raise
        shutil.rmtree(common, ignore_errors=True)
        try:  # one of them spoilt it: alone, each has the end that is its own
          self._train_in_processes(pairs, engine, watch)
        except types.UsageError as error:
          failed.append(error)
      else:
        print(f"{names}, seeds {sorted({seed for _, seed in pairs})}", flush=True)
    if failed:
      raise failed[0]

  def evaluate(
    self, conditions: Conditions, mask_seeds: Sequence[int], *, swapped: bool = False
  ) -> Iterator[Evaluated]:
    """Tests every run, variant by variant.

    Variants of the same model and mask share one compiled grid.

    Args:
      conditions: of a config.
      mask_seeds: test masks of each run.
      swapped: also the F1 with swapped arguments, see `metrics.sentiment`.
    """
    grids: dict[str, evaluate.Grid] = {}
    total = len(self.variants) * len(self.seeds)
    bar = tqdm.tqdm(
      total=total, unit="run", desc="evaluated", disable=not sys.stderr.isatty(), dynamic_ncols=True
    )
    with bar:
      for variant in self.variants:
        tested = conditions(variant.config)
        for seed in self.seeds:
          run = self.run(variant, seed)
          parts = (run.config[name] for name in ("model", "data", "mask", "valid"))
          asked = json.dumps([settings.plain(part) for part in parts], sort_keys=True)
          if asked not in grids:
            grids[asked] = evaluate.make_grid(
              run.recipe.system, run.dataset.test, tested, mask_seeds
            )
          yield self._evaluate(variant, seed, run, grids[asked], tested, mask_seeds, swapped)
          bar.update()

  def _evaluate(self, variant, seed, run, grid, tested, mask_seeds, swapped) -> Evaluated:
    selected, predictions, seconds = build.read_best(run, self.path(variant, seed)), {}, 0.0
    for name, best in selected.items():
      began = time.perf_counter()
      predictions[name] = np.asarray(grid(best.params, best.extra))
      seconds = time.perf_counter() - began
    spec, label = run.dataset.spec, run.dataset.test.label
    selection, rows = build.selection(run.config, spec), []
    for (c, condition), (s, mask_seed) in itertools.product(
      enumerate(tested), enumerate(mask_seeds)
    ):
      found = [
        metrics.compute(spec, values[c, s], label, swapped=swapped)
        for values in predictions.values()
      ]
      # an oracle's metrics are each of its own epoch
      names = [name.partition("/")[2] for name in predictions]
      own = {name: one[name] for name, one in zip(names, found, strict=True)}
      told = {"split": "test", "selection": selection}
      told |= {"seed": seed, "kind": condition.kind, "condition": condition.name}
      rows.append({**variant.columns, **told, "mask_seed": mask_seed, **found[0], **own})
    first = run.recipe.select[0]
    kept = {(one.kind, one.name): predictions[first][c, 0] for c, one in enumerate(tested)}
    return Evaluated(variant, seed, run, selected[first], rows, kept, seconds)

  def missing(self, conditions: Conditions, mask_seeds: Sequence[int]) -> list[dict[str, Any]]:
    """What the tests hide, counted (`evaluate.count_missing`), for each set of variants alike."""
    groups: dict[str, list[Variant]] = {}
    for variant in self.variants:
      parts = (settings.plain(variant.config[name]) for name in ("data", "mask", "valid"))
      groups.setdefault(json.dumps([*parts], sort_keys=True), []).append(variant)
    rows = []
    for group in groups.values():
      tested, test = conditions(group[0].config), self.dataset(group[0]).test
      names = ", ".join(variant.name for variant in group) if len(groups) > 1 else "all"
      counted = evaluate.count_missing(test, tested, mask_seeds)
      rows += [{"tests of": names, "masks": len(mask_seeds), **row} for row in counted]
    return rows

  def epochs(self) -> list[dict[str, Any]]:
    """Rows of every run, epoch and split in the logs, with its metrics and "train_loss"."""
    rows = []
    for variant, seed in itertools.product(self.variants, self.seeds):
      for line in workdir.history(self.path(variant, seed)):
        loss = next(value for name, value in reversed(line["train"].items()) if "loss" in name)
        for split in ("valid", "test"):
          told = {**variant.columns, "seed": seed, "split": split, "epoch": line["epoch"]}
          rows.append({**told, "train_loss": loss, **line.get(split, {})})
    return rows
