"""Trains what `build` set up: resumes, checkpoints, stops on a signal; runs side by side."""

import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence

import jax
import tqdm

from mmjax import checkpoint, parallel, sources, train, types

from . import build, interrupts, workdir

COMPILING = "compiling, kept for next time"


def make_bar(total: int, initial: int = 0, **options) -> tqdm.tqdm:
  """A progress bar of epochs; none where the output is no terminal."""
  quiet = not sys.stderr.isatty() or jax.process_index() > 0
  return tqdm.tqdm(
    total=total, initial=initial, unit="epoch", dynamic_ncols=True, disable=quiet, **options
  )


def _announce() -> None:
  if jax.process_index() == 0:
    print(f"{COMPILING[0].upper()}{COMPILING[1:]} …", file=sys.stderr, flush=True)


class _Clock:
  """Says when the time for the next checkpoint has come; all processes agree."""

  def __init__(self, seconds: float):
    self._seconds, self._saved = seconds, time.monotonic()

  def is_due(self) -> bool:
    return parallel.agree(time.monotonic() - self._saved) > self._seconds

  def restart(self) -> None:
    self._saved = time.monotonic()


def execute(
  run: build.Run,
  path: build.Path,
  data_dir: build.Path,
  *,
  checkpoint_every: float = 60.0,
  should_stop: Callable[[], bool] = lambda: False,
  tracker: str = "tensorboard",
) -> train.Progress:
  """Trains a run to its end in its folder, from wherever the folder stands, on all devices.

  Nothing is written before the run's steps were traced: a run that cannot train leaves nothing.

  Args:
    run: the run.
    path: its folder.
    data_dir: where its data lie.
    checkpoint_every: seconds between two checkpoints, at least.
    should_stop: asked between stretches of steps; True saves and raises `Interrupted`.
    tracker: where the epochs' numbers go too, see `trackers`.

  Returns:
    The final progress; `.best` holds what was selected.

  Raises:
    RunError: if the folder cannot serve the run.
    NonFiniteLoss: from the trainer; the folder is closed.
  """
  dataset, rows = run.dataset, sources.as_source(run.dataset.train).rows
  recipe, asked = run.recipe, build.describe(run.config, data_dir)
  workdir.check(path, asked)
  recipe = recipe._replace(mesh=parallel.make_mesh(min(recipe.batch_size, rows)))
  progress = train.start(recipe, dataset.train, dataset.spec, run.key)
  folder = workdir.Workdir(path, asked, data_dir, build.reading(run), tracker)
  try:
    progress = folder.restore(progress) or progress
    bar, clock = make_bar(recipe.epochs, int(progress.epoch)), _Clock(checkpoint_every)

    def pause(progress):
      bar.set_description(None)
      stop = parallel.agree(should_stop())
      if stop or clock.is_due():
        folder.save(progress)
        clock.restart()
      if stop:
        raise interrupts.Interrupted

    with bar:
      if int(progress.epoch) < recipe.epochs and not workdir.is_done(path):
        _announce() if bar.disable else bar.set_description(COMPILING)
      reports = train.fit(recipe, dataset.train, run.evaluators, progress, run.key, pause=pause)
      for report in reports:
        progress = report.progress
        folder.log(report)
        bar.set_postfix(_postfix(recipe, report))
        bar.update()
        pause(progress)
    folder.finish(progress)
  finally:
    folder.close()
  return progress


def _postfix(recipe, report) -> dict[str, str | int]:
  first = recipe.select[0]
  split, _, metric = first.partition("/")
  loss = next(value for name, value in report.train.items() if name.endswith("loss"))
  return {
    "loss": f"{loss:.4f}",
    first: f"{report.evaluated[split][metric]:.4f}",
    "best": int(report.progress.best[first].epoch),
  }


def execute_together(
  runs: Sequence[build.Run],
  paths: Sequence[build.Path],
  data_dir: build.Path,
  common: pathlib.Path,
  *,
  checkpoint_every: float = 60.0,
  should_stop: Callable[[], bool] = lambda: False,
) -> None:
  """Trains runs that differ in their seed only side by side, as one program.

  Args:
    runs: the runs.
    paths: their folders; each ends up as `execute` would have left it.
    data_dir: where their data lie.
    common: folder of the common checkpoints; it is removed at the end.
    checkpoint_every, should_stop: as of `execute`.
  """
  recipe, dataset = runs[0].recipe, runs[0].dataset
  if runs[0].config.data.stream:
    raise types.UsageError("runs that train together cannot stream: set --schedule=processes.")
  progresses = [train.start(recipe, dataset.train, dataset.spec, run.key) for run in runs]
  folders = [
    workdir.Workdir(path, build.describe(run.config, data_dir), data_dir, build.reading(run))
    for run, path in zip(runs, paths, strict=True)
  ]
  checkpoints = checkpoint.manager(common)
  progresses = list(checkpoint.restore(checkpoints, tuple(progresses)) or progresses)
  for folder, progress in zip(folders, progresses, strict=True):
    folder.rewind(int(progress.epoch))
  bar = make_bar(recipe.epochs, max(int(progress.epoch) for progress in progresses))
  clock = _Clock(checkpoint_every)

  def pause(progresses):
    bar.set_description(None)
    stop = should_stop()
    if stop or clock.is_due():
      step = max(int(progress.state.step) for progress in progresses)
      if step not in checkpoints.all_steps():
        checkpoint.save(checkpoints, step, tuple(progresses))
      clock.restart()
    if stop:
      raise interrupts.Interrupted

  try:
    with bar:
      _announce() if bar.disable else bar.set_description(COMPILING)
      together = train.fit(
        recipe,
        dataset.train,
        [run.evaluators for run in runs],
        list(progresses),
        [run.key for run in runs],
        pause=pause,
      )
      for reports in together:
        for n, report in enumerate(reports):
          if report is not None:
            progresses[n] = report.progress
            folders[n].log(report)
        bar.update()
        pause(progresses)
    for folder, progress in zip(folders, progresses, strict=True):
      folder.finish(progress)
  finally:
    for folder in folders:
      folder.close()
    checkpoints.close()
  shutil.rmtree(common)
