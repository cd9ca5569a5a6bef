"""From a config to everything that a run needs; nothing here writes a file."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from mmjax import (
  conversations,
  data,
  evaluate,
  masking,
  metrics,
  models,
  optim,
  registry,
  runs,
  sources,
  stream,
  systems,
  train,
  types,
)

from . import settings

Config = settings.Config
Path = str | os.PathLike
Evaluator = Callable[[types.Params, types.Extra], Mapping[str, float]]


class Run(NamedTuple):
  """A training run that has been set up but not begun.

  Attributes:
    config: what it was made of.
    dataset: the data, grouped if the system reads conversations.
    recipe: how to train.
    evaluators: split -> `(params, extra) -> metrics` on it, called after each epoch.
    key: the run's key.
  """

  config: Config
  dataset: data.Dataset
  recipe: train.Recipe
  evaluators: dict[str, Evaluator]
  key: types.PRNGKey


def load_data(config: Config, data_dir: Path) -> data.Dataset:
  """The dataset that `config.data` describes."""
  given = settings.plain(config.data)
  load = stream.open_dataset if given.pop("stream") else data.load
  return load(str(data_dir), given.pop("name"), **given)


def _call(section: str, name: str, factory: Callable[..., Any], /, *args, **given) -> Any:
  """`registry.call` of a section of the config."""
  return registry.call(section, name, factory, settings.takes(section, factory), *args, **given)


def make_system(config: Config) -> types.System:
  """The model that `config.model` names, in the precision of `config.train`."""
  made = models.make(**settings.plain(config.model))
  return systems.in_precision(made, config.train.get("precision", systems.PRECISIONS[0]))


def make_mask(config: Config) -> types.MaskFn:
  """The missing data of training."""
  return _mask(settings.plain(config.mask), takes_rate(config))


def takes_rate(config: Config) -> bool:
  """Whether the config's mask has a missing rate."""
  return masking.takes_rate(settings.factory(config, "mask"))


def _mask(given: dict[str, Any], rated: bool) -> types.MaskFn:
  """The mask of settings, without the modalities that are never seen."""
  removed = given.pop("drop", ())
  if not rated:
    given.pop("rate", None)
  mask = masking.make(**given)
  return masking.compose([mask, masking.drop(removed)]) if removed else mask


def test_settings(config: Config) -> dict[str, Any]:
  """The mask's settings in validation and testing, where entries of `config.valid` hold."""
  taken = settings.takes("mask", settings.factory(config, "mask"))
  own = {k: v for k, v in settings.plain(config.valid).items() if taken is None or k in taken}
  return settings.plain(config.mask) | own


def test_mask(
  config: Config, other: Mapping[str, Any] | None = None
) -> Callable[..., types.MaskFn]:
  """`rate -> MaskFn` in validation and testing.

  Args:
    config: of the run; the modalities that its model never sees are missing in any case.
    other: settings of another mask than the config's `test_settings`.
  """
  given = dict(other or test_settings(config))
  given["drop"] = settings.plain(config.mask.get("drop", ()))
  if not masking.takes_rate(registry.lookup("mask", masking.MASKS, given["name"])):
    raise types.UsageError(
      f"mask {given['name']!r} takes no rate, and cannot be tested at several: name another one."
    )
  _mask({"rate": 0.0, **given}, True)  # what it refuses is told before any work

  def mask(rate):
    return _mask({**given, "rate": rate}, True)

  return mask


def valid_condition(config: Config) -> evaluate.Condition:
  """The missing data of validation: the training's, but for the entries of `config.valid`."""
  given = test_settings(config)
  if not takes_rate(config):
    return evaluate.Condition("mask", config.mask.name, lambda: _mask(dict(given), False), {})
  rate = given["rate"]
  if isinstance(rate, Mapping):  # by modality
    pairs = [np.broadcast_to(np.float32(rate.get(m, 0.0)), 2) for m in types.MODALITIES]
    return evaluate.Condition("rate", str(rate), test_mask(config), {"rate": np.stack(pairs)})
  ends = rate if isinstance(rate, tuple) else (rate,)
  return evaluate.rate_condition(*ends, mask=test_mask(config))


def make_method(config: Config) -> types.Method:
  """The training method that `config.method` names, over the missing data of training."""
  given = settings.plain(config.method)
  name, factory = given.pop("name"), settings.factory(config, "method")
  taken = settings.takes("method", factory)
  if takes_rate(config) and "at_rate" in (registry.settings_of(factory) or ()):

    def at_rate(rate):
      return _mask({**settings.plain(config.mask), "rate": rate}, True)

    factory = functools.partial(factory, at_rate=at_rate)
  return registry.call("method", name, factory, taken, make_mask(config), **given)


def title(config: Config) -> str:
  """How tables write the config's method."""
  return make_method(config).title or config.method.name


def make_optimizers(
  config: Config, system: types.System, rows: int
) -> dict[str, optax.GradientTransformation]:
  """The optimizer of each phase: `config.optimizer`, changed by `config.phase_optimizer`."""
  own = settings.plain(config.get("phase_optimizer", {}))
  phases = [phase.name for phase in system.phases]
  for name in own:
    if name not in phases:
      raise types.UsageError(
        f"config.phase_optimizer.{name}: {config.model.name} has the phases {', '.join(phases)}."
      )

  def make(phase):
    steps = train.total_steps(phase, config.train.epochs, rows, config.train.batch_size)
    given = {**settings.plain(config.optimizer), **own.get(phase.name, {})}
    return _call("optimizer", phase.name, functools.partial(optim.make, total_steps=steps), **given)

  return {phase.name: make(phase) for phase in system.phases}


def select(config: Config, spec: types.Spec) -> tuple[str, ...]:
  """What picks the epoch, as "split/metric".

  On the test split each metric picks its own; the first one drives patience and plateaus.

  Raises:
    UsageError: on a metric that the data have not, with those there are.
  """
  known = metrics.names(spec)
  asked = config.train.select or ("f1" if spec.num_classes else "mae")
  split, slash, metric = asked.rpartition("/")
  split = split if slash else "valid"
  if split not in ("valid", "test") or metric not in known:
    raise types.UsageError(
      f"config.train.select={asked}{registry.nearest(metric, known)}: expected valid/METRIC (or the"
      f" oracle test/METRIC) of {', '.join(known)}."
    )
  if split == "valid":
    return (f"valid/{metric}",)
  return tuple(f"test/{name}" for name in (metric, *(n for n in known if n != metric)))


def is_oracle(config: Config) -> bool:
  """Whether the test split selects the epochs."""
  return config.train.select.startswith("test/")


def selection(config: Config, spec: types.Spec) -> str:
  """What picked the epoch, as every row of a table says: "valid/mae at rate 0.5"."""
  condition = valid_condition(config)
  oracle = " (TEST ORACLE: each metric its own epoch)" if is_oracle(config) else ""
  return f"{select(config, spec)[0]} at {condition.kind} {condition.name}{oracle}"


def make_run(config: Config, dataset: data.Dataset) -> Run:
  """Sets a training run up.

  Args:
    config: see `experiments/configs/common.py`.
    dataset: the data.

  Returns:
    The run.

  Raises:
    UsageError: on what the config cannot have.
  """
  settings.check(config)
  system = make_system(config)
  if system.conversations:
    dataset = conversations.group(dataset)
  recipe = _make_recipe(config, system, dataset)
  splits = ("valid", "test") if config.train.log_test or is_oracle(config) else ("valid",)
  condition = valid_condition(config)
  evaluators: dict[str, Evaluator] = {
    split: evaluate.make_validator(
      system, getattr(dataset, split), dataset.spec, condition, seed=config.seed
    )
    for split in splits
  }
  return Run(config, dataset, recipe, evaluators, jax.random.key(config.seed))


def _make_recipe(config: Config, system: types.System, dataset: data.Dataset) -> train.Recipe:
  return train.Recipe(
    system=system,
    method=make_method(config),
    optimizers=make_optimizers(config, system, sources.as_source(dataset.train).rows),
    batch_size=config.train.batch_size,
    epochs=config.train.epochs,
    select=select(config, dataset.spec),
    patience=config.train.patience or None,
  )


def recipe_of(run: Run) -> Callable[[Mapping[str, Any]], train.Recipe]:
  """The recipe as a function of numbers of the config, by dotted name, which may be traced."""

  def make(numbers):
    tree = settings.plain(run.config)
    for name, number in numbers.items():
      tree = settings.put(tree, name, number)
    config = settings.from_json(tree)
    return _make_recipe(config, make_system(config), run.dataset)

  return make


def trace(run: Run) -> train.Progress:
  """The shapes of a run's progress, from tracing its steps: what cannot train fails here."""
  recipe = run.recipe._replace(mesh=None)
  start = lambda: train.start(recipe, run.dataset.train, run.dataset.spec, run.key)  # noqa: E731
  return jax.eval_shape(start)


def outputs(run: Run) -> list[str]:
  """The names of what a run's system predicts."""
  spec = run.dataset.spec

  def predict():
    params, extra = run.recipe.system.init(run.key, spec)
    return run.recipe.system.predict(params, types.example_batch(spec), extra)

  return list(jax.eval_shape(predict))


def describe(config: Config, data_dir: Path) -> dict[str, Any]:
  """What a run is asked for, as its folder records it."""
  sha256 = data.sha256(str(data_dir), config.data.name)
  return {"config": settings.plain(config), "data": sha256}


def reading(run: Run) -> runs.Reading:
  """What the folder of a run keeps, to predict without the data."""
  model, drop = settings.plain(run.config.model), run.config.mask.get("drop", ())
  return runs.reading_of(run.dataset, model, drop, run.recipe.select)


def read_best(run: Run, path: Path) -> dict[str, train.Best]:
  """The epochs that a run in its folder has selected so far, by the entry of `Recipe.select`."""
  params, extra = jax.eval_shape(lambda: run.recipe.system.init(run.key, run.dataset.spec))
  best = train.Best(np.float32(0), np.int32(0), params, extra)
  return runs.read_best(path, dict.fromkeys(run.recipe.select, best))


def load_run(path: Path, data_dir: Path | None = None) -> tuple[Run, dict[str, train.Best]]:
  """A run that was trained, and its selected epochs.

  Args:
    path: its folder.
    data_dir: folder of the datasets; where the training found it by default.

  Returns:
    The run and `read_best` of it.
  """
  found = runs.read_config(path)
  config = settings.from_json(found["run"]["config"])
  run = make_run(config, load_data(config, data_dir or found["data_dir"]))
  return run, read_best(run, path)
