"""The trials of an Optuna study, shared by any number of workers: none is lost, none is doubled.

A trial is a run folder. A worker keeps the heartbeats of its trials; one whose heart has stopped is
failed by whoever sees it and put into the queue again, as a new trial of the same values whose
"root" is the number of the first: it goes on in the folder of that. A search is over when as many
roots as asked for are finished.
"""

import contextlib
import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna import distributions
from optuna.trial import FrozenTrial, TrialState

from mmjax import types

from . import settings

RETRIES = 4  # of a trial whose workers die: it may be what kills them
CREATE = 5  # tries to reach the database
EXTRA = {"sqlite": {"connect_args": {"timeout": 60}}, "postgresql": {"pool_pre_ping": True}}


def _quiet():
  """Without warnings that a feature of Optuna is new, and that heartbeats are ours to keep."""
  return warnings.catch_warnings(action="ignore")


@contextlib.contextmanager
def open_study(
  url: str, name: str, better: str, pruner: optuna.pruners.BasePruner, grace: int
) -> Iterator[tuple[optuna.Study, optuna.storages.RDBStorage]]:
  """`with open_study(…) as (study, storage)`: in a database; created where it is not there yet.

  Args:
    url: sqlite:///FILE or postgresql://USER@HOST/DATABASE.
    name: of the study.
    better: "min" or "max".
    pruner: what ends trials early.
    grace: seconds without a heartbeat after which a trial is taken for dead.

  Raises:
    UsageError: if the database cannot be used.
  """
  study, storage = _connect(url, name, better, pruner, grace)
  try:
    yield study, storage
  finally:
    storage.remove_session()
    storage.engine.dispose()


def _connect(url, name, better, pruner, grace):
  import sqlalchemy.exc

  directions = optuna.study.StudyDirection
  direction = directions.MINIMIZE if better == "min" else directions.MAXIMIZE
  kind, _, rest = url.partition("://")
  driver = "postgresql+psycopg" if kind == "postgresql" else kind  # the one of the extra `tune`
  for attempt in range(CREATE):  # two workers that create the tables at once disturb each other
    try:
      with _quiet():
        storage = optuna.storages.RDBStorage(
          f"{driver}://{rest}",
          engine_kwargs=EXTRA.get(kind),
          heartbeat_interval=max(grace // 3, 1),
          grace_period=grace,
        )
      study = optuna.create_study(
        storage=storage, study_name=name, direction=direction, pruner=pruner, load_if_exists=True
      )
      return study, storage
    except (ImportError, sqlalchemy.exc.ArgumentError) as error:
      raise types.UsageError(f"--storage: {error}") from None
    except sqlalchemy.exc.SQLAlchemyError as error:
      if attempt == CREATE - 1:
        told = str(error).splitlines()[0]
        raise types.UsageError(f"--storage: the database cannot be used: {told}") from None
      time.sleep(1)
  raise AssertionError


def agree(study: optuna.Study, asked: Mapping[str, Any]) -> None:
  """Notes what a study is of.

  Raises:
    UsageError: if it is of something else.
  """
  new = settings.flatten(json.loads(json.dumps(asked)))
  old = settings.flatten(study.user_attrs.get("asked", asked))
  changed = [
    f"  {name}: {old.get(name)!r} there, {new.get(name)!r} asked for"
    for name in sorted(old.keys() | new.keys())
    if old.get(name) != new.get(name)
  ]
  if "asked" in study.user_attrs and changed:
    raise types.UsageError(
      f"the study {study.study_name!r} is another search; choose another --out or --study:\n"
      + "\n".join(changed)
    )
  study.set_user_attr("asked", dict(asked))


def root(trial: FrozenTrial) -> int:
  """The number of a trial's first try."""
  return trial.user_attrs.get("root", trial.number)


def told(trials: Sequence[FrozenTrial]) -> dict[int, FrozenTrial]:
  """Root -> the try with a result, or else the newest; without what was too much."""
  tries = sorted(trials, key=lambda t: (not is_open(t), t.number))
  return {root(t): t for t in tries if not _surplus(t)}


def is_open(trial: FrozenTrial) -> bool:
  """Whether a try has not come to a result: it runs, waits, or was lost."""
  lost = trial.state == TrialState.FAIL and "error" not in trial.user_attrs
  return lost or not trial.state.is_finished()


def _goes_on(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
  """Whether a trial may still have a result: not if its tries die without an epoch more."""
  tries = [one for one in trials if root(one) == root(trial)]
  died = [len(t.intermediate_values) for t in tries if not _surplus(t) and not _stopped(t)]
  given_up = trial.state == TrialState.FAIL and len(died) - len(set(died)) >= RETRIES
  return is_open(trial) and not given_up


def _stopped(trial: FrozenTrial) -> bool:
  return bool(trial.user_attrs.get("stopped"))


def _surplus(trial: FrozenTrial) -> bool:
  return bool(trial.user_attrs.get("surplus"))


class Queue:
  """What a worker asks for trials and tells their results.

  Args:
    study, storage: from `open_study`.
    space: the space.
    budget: how many trials the search has, of all workers together.
    seed: of the sampler.
    grace: seconds without a heartbeat after which a trial is taken for dead.
  """

  def __init__(self, study, storage, space, budget: int, seed: int, grace: int):
    self.study, self._storage, self._space = study, storage, space
    self._budget, self._seed, self._grace = budget, seed, grace
    self._beaten = 0.0

  def trials(self) -> list[FrozenTrial]:
    """All there are now."""
    return self.study.get_trials(deepcopy=False)

  def is_over(self) -> bool:
    """Whether every trial has its result."""
    trials = self.trials()
    newest = told(trials)
    return len(newest) >= self._budget and not any(_goes_on(t, trials) for t in newest.values())

  def beat(self, running: Sequence[optuna.Trial]) -> None:
    """To be called often: keeps running trials alive, and takes up those of dead workers."""
    if time.monotonic() - self._beaten < max(self._grace / 3, 1):
      return
    self._beaten = time.monotonic()
    for trial in running:
      self._storage.record_heartbeat(trial._trial_id)
    with _quiet():
      optuna.storages.fail_stale_trials(self.study)
    self.recover()

  def recover(self) -> None:
    """Puts trials that were lost into the queue again."""
    for one in self.trials():
      if "begun" not in one.user_attrs and one.state == TrialState.RUNNING:
        begun = one.datetime_start  # its worker may have died before the first heartbeat
        if begun is None or time.time() - begun.timestamp() > self._grace:
          self.study.tell(one.number, state=TrialState.FAIL, skip_if_finished=True)
    trials = self.trials()
    for number, one in told(trials).items():
      if one.state == TrialState.FAIL and _goes_on(one, trials):
        # two workers may do so at once: `_is_surplus` lets one of the two be
        self.study.enqueue_trial(one.params, user_attrs={"root": number})

  def ask(self) -> tuple[optuna.Trial, dict[str, Any]] | None:
    """The next trial with its values by config entry; None if there is nothing to do now."""
    trials = self.trials()
    waits = any(one.state == TrialState.WAITING for one in trials)
    if not waits and len(told(trials)) >= self._budget:
      return None
    with _quiet():
      trial = self.study.ask()
    self._storage.record_heartbeat(trial._trial_id)
    trial.set_user_attr("begun", True)
    if self._is_surplus(trial):
      trial.set_user_attr("surplus", True)
      self.study.tell(trial, state=TrialState.FAIL)
      return None
    # of its number, so that no two workers draw the same, and one alone draws the same again
    seed = (1000 * self._seed + trial.number) % 2**32
    with _quiet():
      self.study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return trial, {name: _suggest(trial, name, one) for name, one in self._space.items()}

  def _is_surplus(self, trial: optuna.Trial) -> bool:
    """Whether several workers asked at once for the last place, or for the same lost trial."""
    trials = [one for one in self.trials() if not _surplus(one)]
    number = trial.user_attrs.get("root", trial.number)
    twins = [one for one in trials if root(one) == number and one.number < trial.number]
    lost = lambda one: one.state == TrialState.FAIL and is_open(one)  # noqa: E731
    before = {root(one) for one in trials if root(one) < number}
    return len(before) >= self._budget or not all(map(lost, twins))

  def tell(
    self,
    trial: optuna.Trial,
    value: float | None = None,
    *,
    state: TrialState = TrialState.COMPLETE,
    error: str | None = None,
    stopped: bool = False,
  ) -> None:
    """Tells how a trial ended; a failed one without an error is tried again.

    Args:
      trial: it.
      value: what it reached.
      state: how it ended.
      error: why it failed.
      stopped: whether a signal asked for its end, which says nothing against it.
    """
    if error is not None:
      trial.set_user_attr("error", error)
    if stopped:
      trial.set_user_attr("stopped", True)
    self.study.tell(trial, value, state=state, skip_if_finished=True)


def _suggest(trial: optuna.Trial, name: str, one: distributions.BaseDistribution) -> Any:
  if isinstance(one, distributions.CategoricalDistribution):
    return trial.suggest_categorical(name, one.choices)
  if isinstance(one, distributions.IntDistribution):
    return trial.suggest_int(name, one.low, one.high, step=one.step, log=one.log)
  assert isinstance(one, distributions.FloatDistribution)
  return trial.suggest_float(name, one.low, one.high, step=one.step, log=one.log)
