"""A worker of a search: trains trials in their folders, prunes them, tells what they gave."""

import json
import math
import pathlib
import pprint
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import optuna
import pandas as pd
import tqdm
from optuna.trial import TrialState

from mmjax import metrics, plots, types

from . import build, cli, interrupts, processes, settings, space, study, trials, workdir

LOOK_S = 0.5  # between two looks at the logs of the trials, or for a next trial


class _Running(NamedTuple):
  trial: optuna.Trial
  values: dict[str, Any]
  training: processes.Training
  first: int  # epoch that may be selected


class Search:
  """A search that this worker takes part in.

  Args:
    config: of what is outside of the space.
    entries: the space.
    budget: how many trials there are, of all workers together.
    data_dir, root: folders of the datasets and of the search.
  """

  def __init__(
    self,
    config: settings.Config,
    entries: space.Space,
    budget: int,
    data_dir: build.Path,
    root: build.Path,
  ):
    self.config, self.entries, self.budget = config, entries, budget
    self.data_dir, self.root = pathlib.Path(data_dir), pathlib.Path(root)
    self._study = study.Study([], [], data_dir, root)
    spec = self._study.dataset(study.Variant("", config, {}, "")).spec
    self.metric = build.select(config, spec)[0]
    self.better = metrics.info(self.metric.partition("/")[2]).better
    self._running: list[_Running] = []
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
        queue.beat([one.trial for one in self._running])
        while self._bug is None and crew.is_free() and (one := self._next(queue)):
          crew.start(one)
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
    if not self._is_due():
      return None
    if (found := queue.ask()) is None:
      self._asked = time.monotonic()
      return None
    trial, values = found
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
      return self._next(queue)
    epochs = run.config.train.epochs
    first = min(run.recipe.system.phases[-1].epochs[0], epochs - 1)
    training = processes.Training(f"trial {number}", path, epochs)
    self._running.append(_Running(trial, values, training, first))
    return training

  def _look(self, crew: processes.Crew) -> None:
    """Reports new epochs, and stops what is not promising."""
    if time.monotonic() - self._looked < LOOK_S:
      return
    self._looked = time.monotonic()
    for one in self._running:
      number = one.trial.number
      if number not in self._pruned and self._report(one) and one.trial.should_prune():
        self._pruned.add(number)
        crew.stop(one.training)

  def _report(self, one: _Running) -> bool:
    """Whether a trial had new epochs; one told twice is what it was."""
    split, _, metric = self.metric.partition("/")
    known = self._epochs.get(one.trial.number, -1)
    new = [line for line in workdir.history(one.training.path) if line["epoch"] > known]
    for line in new:
      value = line[split][metric]
      if line["epoch"] >= one.first and math.isfinite(value):
        one.trial.report(value, line["epoch"])
      self._epochs[one.trial.number] = line["epoch"]
    return bool(new)

  def _end(self, queue, training, ended, interrupted: bool) -> None:
    one = next(one for one in self._running if one.training == training)
    self._running.remove(one)
    if ended.code == 0:
      self._report(one)
      done = json.loads((training.path / "done.json").read_text(encoding="utf-8"))
      best = done[self.metric]
      if math.isfinite(best["score"]):
        one.trial.set_user_attr("epoch", best["epoch"])
        queue.tell(one.trial, best["score"])
        told = processes.first_line(ended)
      else:
        told = "no epoch has a finite score"
        queue.tell(one.trial, state=TrialState.FAIL, error=told)
    elif one.trial.number in self._pruned:
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
    tqdm.tqdm.write(f"{training.name} ({values}): {told}", file=sys.stdout)

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
