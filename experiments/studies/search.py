"""Each method's own numbers, searched on validation: as many random trials for each method."""

import functools
import json
import math
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mmjax import metrics, types

from .. import build, cli, processes, settings, study, workdir
from . import lines


class Log(NamedTuple):
  """A factor that is drawn evenly on a logarithmic scale."""

  low: float
  high: float


# The outer learning rates, as multiples of the config's, belong to every method.
OUTER = {"optimizer ×": Log(0.25, 4.0)}
SPACES: Mapping[str, Mapping[str, Any]] = {
  "orig": OUTER,
  "spl": OUTER,
  "m3s": {
    **OUTER,
    "method.optimizer ×": Log(0.25, 64.0),
    "method.inner_steps": (1, 3, 5),
    "method.order": ("first", "second"),
    "method.tasks": (1, 2),
  },
}
DRAWS = 1000  # before a search gives up to find a setting that may be tried
SEED = 1000  # of the trials' trainings: none of the study's own


def draw(
  method: str, trial: int, affordable: Callable[[dict[str, Any]], bool] = lambda changes: True
) -> dict[str, Any]:
  """What a trial changes; the first one of each method nothing: the config's own numbers.

  A trial has the same outer rates for all methods, so that none is ahead for those it drew.

  Args:
    method: whose numbers are drawn.
    trial: its number.
    affordable: whether changes may be tried; others are drawn again.

  Raises:
    UsageError: if none of many draws may be.
  """
  if trial == 0:
    return {}
  outer = _draw(OUTER, np.random.default_rng(trial))
  own = {name: one for name, one in SPACES[method].items() if name not in OUTER}
  random = np.random.default_rng([zlib.crc32(method.encode()), trial])
  for _ in range(DRAWS):
    if affordable(found := {**outer, **_draw(own, random)}):
      return found
  raise types.UsageError(f"no setting of {method} costs as little as --gradients allows; raise it.")


def _draw(space, random) -> dict[str, Any]:
  found = {}
  for name, one in space.items():
    if isinstance(one, Log):
      found[name] = round(math.exp(random.uniform(*np.log(one))), 4)
    else:
      found[name] = one[random.integers(len(one))]
  return found


def search(
  config: settings.Config,
  trials: int,
  data_dir: build.Path,
  out: pathlib.Path,
  engine: processes.Engine,
  schedule: str = "processes",
  gradients: float = math.inf,
) -> dict[str, dict[str, Any]]:
  """Trains what is not trained yet, and writes `tuned.json` and `trials.csv` beside the trials.

  Nothing but validation decides, and only it is read.

  Args:
    config: the base of every trial.
    trials: of each method.
    data_dir: folder of the datasets.
    out: the folder of the trials.
    engine: what trains them.
    schedule: see `study.Study.train`; trials that differ in numbers alone are one program.
    gradients: the most that a step of a trial may cost, in gradients of the base's batch; the
      config's own numbers are tried in any case.

  Returns:
    By method the "changes" of its best trial, its "score" and number ("trial").

  Raises:
    UsageError: if no trial of a method came to its end.
  """

  known = settings.flatten(settings.plain(config))
  defaults = {name: value for name, value in lines.PLAIN.items() if name not in known}

  def made_of(method, changes):
    told = defaults if method == "m3s" else {}  # a default that is told is one program with others
    return lines.changed(config, {"method.name": method, **told, **changes})

  def is_affordable(method, changes):
    return lines.cost(made_of(method, changes)).equivalent <= gradients * config.train.batch_size

  tried = {
    (method, n): draw(method, n, functools.partial(is_affordable, method))
    for method in SPACES
    for n in range(trials)
  }
  variants = []
  for (method, n), changes in tried.items():
    made = made_of(method, changes)
    variants.append(study.Variant(f"trial {n} of {method}", made, {}, f"{method}-{n:02d}"))
  runs = study.Study(variants, [SEED], data_dir, out)
  runs.check(lambda config: [])
  spec = runs.dataset(variants[0]).spec
  metric = build.select(config, spec)[0]
  sign = 1 if metrics.info(metric.partition("/")[2]).better == "min" else -1
  try:
    runs.train(schedule, engine, across=True)
  except types.UsageError as error:  # rates that blow up are what a search finds out
    cli.note(str(error))
  rows, found = [], {}
  for (key, changes), variant in zip(tried.items(), variants, strict=True):
    path = runs.path(variant, SEED)
    done = workdir.is_done(path)
    score = json.loads((path / "done.json").read_text())[metric]["score"] if done else math.nan
    rows.append({"method": key[0], "trial": key[1], metric: score, **changes})
    best = found.get(key[0])
    if math.isfinite(score) and (best is None or sign * score < sign * best["score"]):
      found[key[0]] = {"changes": changes, "score": score, "trial": key[1], "trials": trials}
  for method in SPACES:
    if method not in found:
      raise types.UsageError(f"no trial of {method} came to its end; see {out}.")
  _write(rows, found, out)
  return found


def _write(rows, found, out) -> None:
  import pandas as pd

  pd.DataFrame(rows).to_csv(out / "trials.csv", index=False)
  workdir.write_atomically(out / "tuned.json", json.dumps(found, indent=2) + "\n")


def read(path: build.Path) -> dict[str, dict[str, Any]]:
  """What another search found, of its `tuned.json`.

  Raises:
    UsageError: if there is none.
  """
  try:
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except (OSError, json.JSONDecodeError) as error:
    raise types.UsageError(f"--tuned={path} is no tuned.json of this study: {error}") from None
