"""A worker of a search: trains trials in their folders, prunes them, tells what they gave."""

import json
import math
import pathlib
import pprint
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import optuna
import pandas as pd
import tqdm
from optuna.trial import TrialState

from mmjax import metrics, plots, types

from . import (
  build,
  cli,
  interrupts,
  processes,
  settings,
  space,
  study,
  together,
  trials,
  workdir,
)

LOOK_S = 0.5  # between two looks at the logs of the trials, or for a next trial


class _Trial(NamedTuple):
  trial: optuna.Trial
  values: dict[str, Any]
  path: pathlib.Path
  run: build.Run

  @property
  def root(self) -> int:
    """The number of its first try, and of its folder."""
    return int(self.path.name)

  @property
  def first(self) -> int:
    """The epoch from which on one may be selected."""
    recipe = self.run.recipe
    return min(recipe.system.phases[-1].epochs[0], recipe.epochs - 1)


class Search:
  """A search that this worker takes part in.

  Args:
    config: of what is outside of the space.
    entries: the space.
    budget: how many trials there are, of all workers together.
    data_dir, root: folders of the datasets and of the search.
    at_once: how many trials are asked for, to train together if they can.
  """

  def __init__(
    self,
    config: settings.Config,
    entries: space.Space,
    budget: int,
    data_dir: build.Path,
    root: build.Path,
    at_once: int = 1,
  ):
    self.config, self.entries, self.budget = config, entries, budget
    self.data_dir, self.root = pathlib.Path(data_dir), pathlib.Path(root)
    self._study = study.Study([], [], data_dir, root)
    spec = self._study.dataset(study.Variant("", config, {}, "")).spec
    self.metric = build.select(config, spec)[0]
    self.better = metrics.info(self.metric.partition("/")[2]).better
    self._at_once, self._groups = at_once, together.Groups()
    self._trials: dict[processes.Training, list[_Trial]] = {}  # of those that run, or wait
    self._waiting: list[processes.Training] = []
    self._pruned: set[int] = set()
    self._epochs: dict[int, int] = {}  # number of a trial -> the last one that was reported
    self._looked, self._asked = 0.0, 0.0
    self._bug: Exception | None = None

  def run(self, config: settings.Config) -> build.Run:
    """A trial's run, set up."""
    return self._study.run(study.Variant("trial", config, {}, ""), config.seed)

  def check(self, given: Mapping[str, Any]) -> None:
    """Raises a `UsageError` on what cannot be searched, see `space.check`."""
    space.check(self.entries, self.config, given, self.run)

  def describe(self) -> dict[str, Any]:
    """What is searched, JSON values only."""
    found = build.describe(self.config, self.data_dir)
    as_json = optuna.distributions.distribution_to_json
    return {
      **found,
      "metric": self.metric,
      "space": {name: as_json(one) for name, one in self.entries.items()},
    }

  def work(self, queue: trials.Queue, engine: processes.Engine, watch: interrupts.Watch) -> None:
    """Trains trials until the search is over, those of other workers included.

    Args:
      queue: the trials.
      engine: what trains them.
      watch: after a signal the trials save and end, and whoever comes next goes on with them.

    Raises:
      Interrupted: after a signal.
      RuntimeError: if a training failed with a bug, with its output.
    """
    crew = processes.Crew(engine, watch, below=1)
    with _bar(self.budget) as bar:
      while True:
        queue.beat([one.trial for ones in self._trials.values() for one in ones])
        while self._bug is None and crew.is_free() and (one := self._next(queue)):
          crew.start(one)
        if self._bug is not None or watch.signal is not None:
          self._leave(queue)
        self._look(crew)
        for training, ended in crew.wait():
          self._end(queue, training, ended, watch.signal is not None)
          self._asked = 0.0
          self._show(queue, bar)
        if not len(crew) and watch.signal is None:
          if self._bug is not None:
            raise self._bug
          if self._is_due() and queue.is_over():
            break
      self._show(queue, bar)

  def _is_due(self) -> bool:
    return time.monotonic() - self._asked > LOOK_S

  def _next(self, queue) -> processes.Training | None:
    """A training to start; None if there is none now."""
    if not self._waiting and self._is_due():
      self._ask(queue)
    return self._waiting.pop(0) if self._waiting else None

  def _ask(self, queue) -> None:
    """Asks for trials, and has those wait that come together."""
    asked: list[_Trial] = []
    while len(asked) < self._at_once:
      if (found := queue.ask()) is None:
        self._asked = time.monotonic()
        break
      if (one := self._prepare(queue, *found)) is not None:
        asked.append(one)
    fresh = []
    for one in asked:
      if workdir.has_begun(one.path):  # it goes on alone
        self._wait([one])
      else:
        fresh.append(one)
    for numbers in self._groups.of([one.run for one in fresh]):
      self._wait([fresh[n] for n in numbers])

  def _wait(self, ones: Sequence[_Trial]) -> None:
    """Has trials wait for their training, of all of them as one program."""
    epochs, numbers = ones[0].run.recipe.epochs, [str(one.root) for one in ones]
    if len(ones) == 1:
      training = processes.Training(f"trial {numbers[0]}", ones[0].path, epochs)
    else:
      path = self.root / "together" / "-".join(numbers)
      workdir.write_group(path, [one.path for one in ones])
      training = processes.Training(f"trials {', '.join(numbers)}", path, epochs, ones[0].path)
    self._waiting.append(training)
    self._trials[training] = list(ones)

  def _leave(self, queue) -> None:
    """Leaves the trials that wait to whoever comes next."""
    while self._waiting:
      for one in self._trials.pop(self._waiting.pop()):
        queue.tell(one.trial, state=TrialState.FAIL, stopped=True)

  def _prepare(self, queue, trial: optuna.Trial, values: dict[str, Any]) -> _Trial | None:
    """A trial with its folder; None if no run can have its values."""
    number = trial.user_attrs.get("root", trial.number)
    path = self.root / "trials" / f"{number:04d}"
    trial.set_user_attr("folder", str(path))
    try:
      config = space.changed(self.config, values)
      run = self.run(config)
      workdir.prepare(path, build.describe(run.config, self.data_dir), self.data_dir)
    except types.UsageError as error:  # this combination alone: `check` tried the others
      queue.tell(trial, state=TrialState.FAIL, error=str(error))
      print(f"trial {number}: {error}", file=sys.stderr, flush=True)
      return None
    return _Trial(trial, values, path, run)

  def _look(self, crew: processes.Crew) -> None:
    """Reports new epochs, and stops what is not promising."""
    if time.monotonic() - self._looked < LOOK_S:
      return
    self._looked = time.monotonic()
    for training, ones in self._trials.items():
      going = [one for one in ones if one.trial.number not in self._pruned]
      lost = [one for one in going if self._report(one) and one.trial.should_prune()]
      self._pruned.update(one.trial.number for one in lost)
      if lost and len(lost) == len(going):  # beside others it would be no faster without it
        crew.stop(training)

  def _report(self, one: _Trial) -> bool:
    """Whether a trial had new epochs; one told twice is what it was."""
    split, _, metric = self.metric.partition("/")
    known = self._epochs.get(one.trial.number, -1)
    new = [line for line in workdir.history(one.path) if line["epoch"] > known]
    for line in new:
      value = line[split][metric]
      if line["epoch"] >= one.first and math.isfinite(value):
        one.trial.report(value, line["epoch"])
      self._epochs[one.trial.number] = line["epoch"]
    return bool(new)

  def _end(self, queue, training, ended, interrupted: bool) -> None:
    ones = self._trials.pop(training)
    for one in ones:
      pruned, beside = one.trial.number in self._pruned, len(ones) > 1
      if beside and ended.code > 0 and not pruned and not interrupted:
        self._wait([one])  # one of them spoilt it: alone, each has the end that is its own
      else:
        self._end_one(queue, one, training, ended, interrupted, pruned)
    if len(ones) > 1:
      shutil.rmtree(training.path, ignore_errors=True)

  def _end_one(self, queue, one: _Trial, training, ended, interrupted, pruned) -> None:
    beside = training.path != one.path  # the others went on when it was pruned
    # one that was stopped after its last epoch has its result, too
    if workdir.is_done(one.path) and not (pruned and beside):
      self._report(one)
      done = json.loads((one.path / "done.json").read_text(encoding="utf-8"))
      best = done[self.metric]
      if math.isfinite(best["score"]):
        one.trial.set_user_attr("epoch", best["epoch"])
        queue.tell(one.trial, best["score"])
        told = f"{self.metric} = {best['score']:.4f} (epoch {best['epoch']})"
      else:
        told = "no epoch has a finite score"
        queue.tell(one.trial, state=TrialState.FAIL, error=told)
    elif pruned:
      queue.tell(one.trial, state=TrialState.PRUNED)
      told = f"pruned after epoch {self._epochs[one.trial.number]}"
    elif interrupted or ended.code < 0:  # killed from outside: to be tried again
      queue.tell(one.trial, state=TrialState.FAIL, stopped=interrupted)
      told = "interrupted"
    else:
      error = processes.failure(training, ended)
      queue.tell(one.trial, state=TrialState.FAIL, error=str(error).splitlines()[0])
      told = str(error)
      if not isinstance(error, types.UsageError):
        self._bug = error
    values = ", ".join(f"{name}={value}" for name, value in one.values.items())
    tqdm.tqdm.write(f"trial {one.root} ({values}): {told}", file=sys.stdout)

  def _show(self, queue, bar) -> None:
    found = trials.told(queue.trials()).values()
    bar.update(sum(not trials.is_open(one) for one in found) - bar.n)
    if (best := best_of(queue.study)) is not None:
      bar.set_postfix_str(f"best {best.value:.4f}, trial {trials.root(best)}")
      self.write_best(queue.study, best)

  def write_best(self, found: optuna.Study, best: optuna.trial.FrozenTrial) -> None:
    """Writes `best.py`, a config for `train --config=…`."""
    config = settings.plain(space.changed(self.config, best.params))
    text = (
      f'"""The best of {len(trials.told(found.trials))} trials, {trials.root(best)}:'
      f" {self.metric} = {best.value:.4f}.\n\n"
      + cli.told(f"python -m experiments.train --config={self.root / 'best.py'} --workdir=…")
      + '\n"""\n\n'
      "import ml_collections\n\n"
      f"CONFIG = {pprint.pformat(config, width=88, sort_dicts=False)}\n\n\n"
      f"def get_config(dataset={config['data']['name']!r}):\n"
      "  config = ml_collections.ConfigDict(CONFIG)\n"
      "  config.data.name = dataset\n"
      "  return config\n"
    )
    workdir.write_atomically(self.root / "best.py", text)

  def write(self, found: optuna.Study) -> None:
    """Writes the results: `trials.csv`, `history.png` and `importance.png`."""
    results = trials.told(found.trials)
    rows = [
      {
        "trial": number,
        "state": one.state.name.lower(),
        self.metric: one.value,
        "epoch": one.user_attrs.get("epoch"),
        **one.params,
      }
      for number, one in sorted(results.items())
    ]
    pd.DataFrame(rows).to_csv(self.root / "trials.csv", index=False)
    done = {}
    for number, one in results.items():
      if one.state == TrialState.COMPLETE and one.value is not None:
        done[number] = one.value
    plots.search_history(done, self.root / "history.png", self.metric, self.better)
    try:
      evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
      importance = optuna.importance.get_param_importances(found, evaluator=evaluator)
    except (ValueError, RuntimeError):  # too few trials, or all alike
      return
    plots.importance(importance, self.root / "importance.png")


def best_of(found: optuna.Study) -> optuna.trial.FrozenTrial | None:
  """The best trial that was trained to its end."""
  done = found.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
  sign = 1 if found.direction == optuna.study.StudyDirection.MINIMIZE else -1
  return min(done, key=lambda one: sign * (one.value or 0.0), default=None)


def _bar(total: int) -> tqdm.tqdm:
  return tqdm.tqdm(
    total=total,
    unit="trial",
    desc="finished",
    position=0,
    disable=not sys.stderr.isatty(),
    dynamic_ncols=True,
  )
