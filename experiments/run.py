"""From a config to everything that a training run needs; shared by all binaries."""

import functools
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import ml_collections
import tqdm

from experiments import workdir
from mmjax import (
  checkpoint,
  data,
  evaluate,
  masking,
  meta,
  metrics,
  models,
  optim,
  parallel,
  stream,
  train,
  types,
)

# The training methods and how the paper writes them.
METHODS = {"orig": "ORIG", "spl": "SPL-TRN", "m3s": "M3S"}
SELECTIONS = ("validation", "test_oracle")


class Interrupted(Exception):
  """A signal asked the run to stop; its state is saved."""


class Run(NamedTuple):
  """A training run that has been set up but not begun.

  Attributes:
    config: what it was made of.
    dataset: the data.
    recipe: how to train.
    validate: `(params, extra) -> metrics` on the validation split.
    test: the same on the test split; it selects nothing.
    key: the run's key.
  """

  config: ml_collections.ConfigDict
  dataset: data.Dataset
  recipe: train.Recipe
  validate: Callable
  test: Callable
  key: types.PRNGKey


def load_data(config: ml_collections.ConfigDict, data_dir: str) -> data.Dataset:
  """The dataset that `config.data` describes."""
  settings = config.data.to_dict()
  load = stream.open_dataset if settings.pop("stream", False) else data.load
  return load(data_dir, settings.pop("name"), **settings)


def make_system(config: ml_collections.ConfigDict) -> types.System:
  """The model that `config.model` names."""
  settings = config.model.to_dict()
  name = settings.pop("name")
  if name not in models.MODELS:
    raise ValueError(f"unknown model {name!r}, expected one of {sorted(models.MODELS)}.")
  return models.MODELS[name](**settings)


def make_mask_of(
  config: ml_collections.ConfigDict, *, training: bool = False
) -> Callable[[object], types.MaskFn]:
  """`rates -> MaskFn` of the kind that `config.mask` names, for training or for evaluation."""
  share = config.mask.get("complete_share", 0.0) if training else 0.0
  kind, removed = config.mask.kind, tuple(config.mask.get("drop", ()))
  kinds = {
    "span": functools.partial(masking.span, axis=config.mask.axis),
    "bernoulli": functools.partial(masking.bernoulli, complete_share=share),
  }
  if kind not in kinds:
    raise ValueError(f"unknown mask kind {kind!r}, expected one of {list(kinds)}.")
  if not removed:
    return kinds[kind]
  return lambda rates: masking.compose(kinds[kind](rates), masking.drop(*removed))


def make_method(
  config: ml_collections.ConfigDict, method: str, missing_rate: tuple[float, float]
) -> types.Method:
  """The training method by its name."""
  mask = make_mask_of(config, training=True)(missing_rate)
  settings = config.m3s.to_dict() if method == "m3s" else {}
  return meta.METHODS[method](mask, **settings)


def make_run(
  config: ml_collections.ConfigDict,
  dataset: data.Dataset,
  *,
  method: str,
  missing_rate: tuple[float, float],
  seed: int,
) -> Run:
  """Sets a training run up.

  Args:
    config: see `experiments/configs/common.py`.
    dataset: the data.
    method: "orig", "spl" or "m3s".
    missing_rate: lowest and highest missing rate, in training and validation.
    seed: of everything random in the run.

  Returns:
    The run.
  """
  system = make_system(config)
  settings = config.train
  rows = dataset.spec.num_train
  overrides = config.get("phase_optimizer", ml_collections.ConfigDict()).to_dict()
  if settings.get("selection", "validation") not in SELECTIONS:
    raise ValueError(f"selection is {settings.selection!r}, expected one of {SELECTIONS}.")
  oracle = settings.get("selection") == "test_oracle"
  recipe = train.Recipe(
    system=system,
    method=make_method(config, method, missing_rate),
    optimizers={
      phase.name: optim.make(
        total_steps=train.total_steps(phase, settings.epochs, rows, settings.batch_size),
        **{**config.optimizer.to_dict(), **overrides.get(phase.name, {})},
      )
      for phase in system.phases
    },
    batch_size=settings.batch_size,
    epochs=settings.epochs,
    select=settings.select,
    larger_is_better=settings.select not in metrics.LOWER_IS_BETTER,
    patience=settings.patience or None,
    also=tuple(metrics.names(dataset.spec)) if oracle else (),
  )
  validate, test = (
    evaluate.make_validator(
      system,
      split,
      dataset.spec,
      evaluate.rate_condition(*(settings.get("valid_rate", ()) or missing_rate)),
      mask_of=make_mask_of(config),
      seed=seed,
    )
    for split in (dataset.valid, dataset.test)
  )
  if oracle:
    validate = test
  return Run(config, dataset, recipe, validate, test, jax.random.key(seed))


def execute(
  run: Run,
  folder: workdir.Workdir,
  *,
  checkpoint_every: float = 60.0,
  should_stop=lambda: False,
  log_test: bool = False,
  show_progress: bool = True,
) -> train.Progress:
  """Trains a run to its end in its folder, from wherever the folder stands, on all devices.

  Args:
    run: the run.
    folder: its folder.
    checkpoint_every: seconds between two checkpoints, at least.
    should_stop: asked between stretches of steps; True saves and raises `Interrupted`.
    log_test: whether to log the test split's metrics too, for figures.
    show_progress: whether to draw a progress bar.

  Returns:
    The final progress; `.best` holds the parameters selected on validation.
  """
  dataset, batch_size = run.dataset, min(run.recipe.batch_size, run.dataset.spec.num_train)
  recipe = run.recipe._replace(mesh=parallel.make_mesh(batch_size))
  progress = train.start(recipe, dataset.train, dataset.spec, run.key)
  progress = folder.restore(progress) or progress
  saved = time.monotonic()

  def pause(progress):
    nonlocal saved
    stop = parallel.agree(should_stop())
    if stop or parallel.agree(time.monotonic() - saved) > checkpoint_every:
      folder.save(progress)
      saved = time.monotonic()
    if stop:
      raise Interrupted

  bar = tqdm.tqdm(
    total=recipe.epochs,
    initial=int(progress.epoch),
    unit="epoch",
    disable=not show_progress or jax.process_index() > 0,
    dynamic_ncols=True,
  )
  with bar:
    reports = train.fit(recipe, dataset.train, run.validate, progress, run.key, pause=pause)
    for report in reports:
      progress = report.progress
      folder.log(report, _test(run, report) if log_test else None)
      loss = next(v for k, v in report.train.items() if k.endswith("loss"))
      bar.set_postfix(
        {
          "loss": f"{loss:.4f}",
          recipe.select: f"{report.valid[recipe.select]:.4f}",
          "best": int(progress.best_epoch),
        }
      )
      bar.update()
      pause(progress)
  folder.finish(progress)
  return progress


def _test(run: Run, report: train.EpochReport) -> dict[str, float]:
  return run.test(*parallel.local((report.progress.state.params, report.progress.state.extra)))


def execute_together(
  runs: Sequence[Run],
  folders: Sequence[workdir.Workdir],
  path: pathlib.Path,
  *,
  checkpoint_every: float = 60.0,
  log_test: bool = False,
) -> None:
  """Trains runs that differ in their seed only side by side, as one program.

  Args:
    runs: the runs.
    folders: their folders; each ends up as `execute` would have left it.
    path: folder of the common checkpoints; it is removed at the end.
    checkpoint_every: seconds between two checkpoints, at least.
    log_test: whether to log the test split's metrics too, for figures.
  """
  recipe, dataset = runs[0].recipe, runs[0].dataset
  if isinstance(dataset.train, stream.Stream):
    raise ValueError("runs that train together cannot stream: set --schedule=processes.")
  progresses = tuple(train.start(recipe, dataset.train, dataset.spec, run.key) for run in runs)
  checkpoints = checkpoint.manager(path)
  progresses = checkpoint.restore(checkpoints, progresses) or progresses
  for folder, progress in zip(folders, progresses, strict=True):
    folder.rewind(int(progress.epoch))
  saved, progresses = time.monotonic(), list(progresses)
  validates = [run.validate for run in runs]
  together = train.fit_together(
    recipe, dataset.train, validates, list(progresses), [run.key for run in runs]
  )
  first = max(int(progress.epoch) for progress in progresses)
  with tqdm.tqdm(total=recipe.epochs, initial=first, unit="epoch", dynamic_ncols=True) as bar:
    for reports in together:
      for n, report in enumerate(reports):
        if report is not None:
          progresses[n] = report.progress
          folders[n].log(report, _test(runs[n], report) if log_test else None)
      bar.update()
      if time.monotonic() - saved > checkpoint_every:
        step = max(int(progress.epoch) for progress in progresses)
        checkpoint.save(checkpoints, step, tuple(progresses))
        saved = time.monotonic()
  for folder, progress in zip(folders, progresses, strict=True):
    folder.finish(progress)
  checkpoints.close()
  shutil.rmtree(path)


def load_run(path: str, data_dir: str | None = None) -> tuple[Run, dict]:
  """A finished run and its selected {"params", "extra"}.

  Args:
    path: its folder.
    data_dir: folder of the datasets; where the training found it by default.

  Returns:
    The run, and the parameters and extra of the epoch that is best on validation.
  """
  found = workdir.read_config(path)
  asked, data_dir = found["run"], data_dir or found["data_dir"]
  config = ml_collections.ConfigDict(asked["config"])
  dataset = load_data(config, data_dir)
  run = make_run(
    config,
    dataset,
    method=asked["method"],
    missing_rate=tuple(asked["missing_rate"]),
    seed=asked["seed"],
  )
  folder = workdir.Workdir(path, asked, data_dir)
  best = read_best(run, folder)[None]
  folder.close()
  return run, best


def read_best(run: Run, folder: workdir.Workdir) -> dict[str | None, dict]:
  """The selected {"params", "extra"} of a run in its folder, as [None]; an oracle's, by metric."""

  @jax.eval_shape
  def template():
    params, extra = run.recipe.system.init(run.key, run.dataset.spec)
    return {"params": params, "extra": extra}

  best = folder.read_best(template, run.recipe.also)
  if best is None:
    raise workdir.WorkdirError(f"{folder.path} holds no checkpoint yet.")
  return best


def describe(
  config: ml_collections.ConfigDict,
  data_dir: str,
  *,
  method: str,
  missing_rate: tuple[float, float],
  seed: int,
) -> dict:
  """What a run is asked for, as its folder records it."""
  return {
    "config": config.to_dict(),
    "method": method,
    "missing_rate": list(missing_rate),
    "seed": seed,
    "data": data.read_card(data_dir, config.data.name)["sha256"],
  }


def parse_interval(text: str) -> tuple[float, float]:
  """ "0.4,0.6" -> (0.4, 0.6); a single rate is an interval of its own."""
  low, *high = (float(rate) for rate in text.split(","))
  if len(high) > 1:
    raise ValueError(f"missing rate {text!r} is neither one number nor two.")
  return low, *(high or [low])
