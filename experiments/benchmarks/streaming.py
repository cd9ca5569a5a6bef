"""What does a training split on disk cost? Steps over memory and over streams, in turn.

python -m experiments.benchmarks.streaming --json=streaming.json

Makes a synthetic dataset of CMU-MOSEI's size and shapes (aligned; 2.9 GB in each file format, in a
temporary folder that is removed at the end) and trains Self-MM and MISA with M³S on it.
"""

import json
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np
import tabulate
from absl import app, flags

from data_prep import builder
from mmjax import data, masking, meta, models, optim, sources, stream, train

_ROWS = flags.DEFINE_integer("rows", 16326, "Training samples; CMU-MOSEI has 16,326.")
_STEPS = flags.DEFINE_integer("steps", 8, "Optimizer steps a measurement.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements of each side.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "B, of the support and of the query set.")
_MODELS = flags.DEFINE_list("models", ["self_mm", "misa"], "Whose steps.")
_JSON = flags.DEFINE_string("json", None, "File for all numbers.")

SHAPES = {"text": (50, 768), "audio": (50, 74), "vision": (50, 35)}
KEY = jax.random.key(0)


def write(folder: str, rows: int, file_format: str) -> None:
  """The synthetic dataset, named as its format: noise in the MMSA layout."""
  random = np.random.default_rng(0)

  def split(count):
    fields = {"id": np.array([str(n) for n in range(count)], object)}
    for name, shape in SHAPES.items():
      fields[name] = random.standard_normal((count, *shape), np.float32)
    return {**fields, "regression_labels": random.uniform(-3, 3, count).astype(np.float32)}

  arrays = {"train": split(rows), "valid": split(8), "test": split(8)}
  path = builder.write(arrays, pathlib.Path(folder), file_format, file_format)
  (path / data.CARD).write_text("{}", encoding="utf-8")  # marks it as complete


def compare(model: str, datasets: dict[str, data.Dataset]) -> list[dict]:
  """Seconds a step over each of the datasets; the first one is in memory."""
  inner = dict(optimizer=dict(name="sgd", learning_rate=1e-3))
  recipe = train.Recipe(
    system=models.MODELS[model](),
    method=meta.METHODS["m3s"](masking.span((0.4, 0.6)), **inner),
    optimizers={"main": optim.make(learning_rate=1e-4)},
    batch_size=_BATCH_SIZE.value,
  )
  advance = train.make_advance(recipe, recipe.system.phases[0])
  sides = {}
  for name, dataset in datasets.items():
    source = sources.as_source(dataset.train).place(None)
    progress = train.start(recipe, source, dataset.spec, KEY)
    run = source.make_steps(advance, recipe.batch_size, recipe.method.draws)
    sides[name] = [run, progress.state, progress.sums["main"]]
  times = {name: [] for name in sides}
  for repeat in range(_REPEATS.value + 1):
    for name, (run, state, sums) in sides.items():
      first = np.int32(repeat * _STEPS.value)
      began = time.perf_counter()
      state, sums, _ = jax.block_until_ready(
        run(state, sums, KEY, np.int32(0), first, np.int32(first + _STEPS.value))
      )
      sides[name][1:] = state, sums
      if repeat:  # the first one compiles
        times[name].append((time.perf_counter() - began) / _STEPS.value)
  found = {name: statistics.median(seconds) for name, seconds in times.items()}
  memory = next(iter(found.values()))
  return [
    {"model": model, "source": name, "step_s": seconds, "speed": memory / seconds}
    for name, seconds in found.items()
  ]


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  asked, there = (_REPEATS.value + 1) * _STEPS.value, _ROWS.value // _BATCH_SIZE.value
  if asked > there:
    raise app.UsageError(f"{asked} steps in all, but an epoch has {there}: set --rows higher.")
  with tempfile.TemporaryDirectory() as folder:
    for name in builder.FILE_FORMATS:
      write(folder, _ROWS.value, name)
    datasets = {"memory": data.load(folder, builder.FILE_FORMATS[0])}
    datasets |= {name: stream.open_dataset(folder, name) for name in builder.FILE_FORMATS}
    rows = [row for model in _MODELS.value for row in compare(model, datasets)]
  if _JSON.value:
    asked = {"rows": _ROWS.value, "batch_size": _BATCH_SIZE.value}
    pathlib.Path(_JSON.value).write_text(json.dumps({**asked, "found": rows}, indent=1) + "\n")
  print(tabulate.tabulate(rows, headers="keys", floatfmt=".3g"))
  print(f"device: {jax.devices()[0].device_kind}; speed: that of memory is 1")


if __name__ == "__main__":
  app.run(main)
