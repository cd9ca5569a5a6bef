"""The space of a search: config entries, each with a distribution of Optuna's.

SPACE = {
  "optimizer.learning_rate": FloatDistribution(1e-5, 1e-2, log=True),
  "method.inner_steps": IntDistribution(1, 5),
  "mask.rate": CategoricalDistribution(("0.2,0.4", "0.4,0.6")),  # an interval as a text
}
"""

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from optuna import distributions

from mmjax import types

from . import build, settings

Space = Mapping[str, distributions.BaseDistribution]
EXAMPLE = "optuna.distributions, such as FloatDistribution(1e-5, 1e-2, log=True)"
# what trials are compared on, and by
FIXED = {
  "seed": "luck is nothing to tune",
  "valid": "trials are compared on the same missing data",
  "data.name": "trials are compared on the same data",
  "data.task": "trials are compared on the same data",
  "train.select": "trials are compared by one metric",
  "train.log_test": "the test split is no part of a search",
  "mask.name": "trials are compared on the same missing data",
}


SPACES = pathlib.Path(__file__).with_name("spaces")


def load(path: str) -> Space:
  """The `SPACE` of a Python file, or of one that comes with the project, as "m3s".

  Raises:
    UsageError: if there is none, or it is no dict of distributions.
  """
  file = pathlib.Path(path) if path.endswith(".py") else SPACES / f"{path}.py"
  try:
    found = getattr(settings.read_module(file), "SPACE", None)
  except FileNotFoundError:
    own = ", ".join(sorted(f.stem for f in SPACES.glob("[!_]*.py")))
    raise types.UsageError(f"--space={path}: expected a file SPACE.py, or one of {own}.") from None
  if not isinstance(found, Mapping) or not found:
    raise types.UsageError(f"--space={path}: expected SPACE = {{config entry: distribution}}.")
  for name, one in found.items():
    if not isinstance(one, distributions.BaseDistribution):
      raise types.UsageError(f"--space={path}: {name!r} is {one!r}; expected one of {EXAMPLE}.")
  return dict(found)


def check_selection(config: settings.Config) -> None:
  """Raises a `UsageError` if the test split would have a say in which trial is best."""
  if build.is_oracle(config) or config.train.log_test:
    entry = "select" if build.is_oracle(config) else "log_test"
    raise types.UsageError(
      f"config.train.{entry}={config.train[entry]}: a search reads the validation split alone."
    )


def check(
  space: Space, config: settings.Config, given: Mapping[str, Any], make: Callable[..., build.Run]
) -> None:
  """Tries the ends of each distribution; nothing is trained or written.

  Args:
    space: the space.
    config: of what is outside of the space.
    given: the entries that the user has set: they cannot be in the space too.
    make: config -> run.

  Raises:
    UsageError: on what cannot be searched, see `FIXED`, or what no run can have.
  """
  check_selection(config)
  for name in space:
    section, _, entry = name.partition(".")
    if why := FIXED.get(name) or FIXED.get(section):
      raise types.UsageError(f"the space has {name!r}: {why}.")
    if section == "mask" and entry.partition(".")[0] not in config.valid:
      raise types.UsageError(
        f"the space has {name!r}, with which validation would change from trial to trial:"
        f" --config.valid.{entry}=… fixes it there."
      )
    if name in given:
      raise types.UsageError(f"config.{name} is {given[name]!r} by a flag, and in the space too.")
  for number, values in enumerate(_corners(space)):
    try:
      run = make(changed(config, values))
      if number == 0:
        build.trace(run)
    except types.UsageError as error:
      told = ", ".join(f"{name}={value}" for name, value in values.items())
      raise types.UsageError(f"the space cannot have {told}: {error}") from None


def changed(config: settings.Config, values: Mapping[str, Any]) -> settings.Config:
  """A copy of a config with the entries of a trial."""
  config = settings.from_json(settings.plain(config))
  settings.assign_all(config, values)
  settings.check(config)
  return config


def _corners(space: Space) -> Iterator[dict[str, Any]]:
  """All at their lowest and all at their highest; every choice once."""
  ends = {name: _ends(one) for name, one in space.items()}
  lowest = {name: values[0] for name, values in ends.items()}
  yield lowest
  yield {name: values[-1] for name, values in ends.items()}
  for name, values in ends.items():
    yield from ({**lowest, name: value} for value in values[1:-1])


def _ends(one: distributions.BaseDistribution) -> tuple[Any, ...]:
  if isinstance(one, distributions.CategoricalDistribution):
    return tuple(one.choices)
  assert isinstance(one, distributions.FloatDistribution | distributions.IntDistribution)
  return one.low, one.high
