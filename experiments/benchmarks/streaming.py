"""What does a training split on disk cost? Steps over a stream and over memory, in turn.

python -m experiments.benchmarks.streaming --json=streaming.json

Makes a synthetic dataset of CMU-MOSEI's size and shapes (aligned; 2.9 GB of TFRecords in a
temporary folder, removed at the end) and trains Self-MM and MISA with M³S on it.
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
_FORMAT = flags.DEFINE_enum("file_format", "tfrecord", builder.FILE_FORMATS, "Of the dataset.")
_JSON = flags.DEFINE_string("json", None, "File for all numbers.")

SHAPES = {"text": (50, 768), "audio": (50, 74), "vision": (50, 35)}
KEY = jax.random.key(0)


def write(folder: str, rows: int) -> None:
  """The synthetic dataset: noise in the MMSA layout."""
  random = np.random.default_rng(0)

  def split(count):
    fields = {"id": np.array([str(n) for n in range(count)], object)}
    for name, shape in SHAPES.items():
      fields[name] = random.standard_normal((count, *shape), np.float32)
    return {**fields, "regression_labels": random.uniform(-3, 3, count).astype(np.float32)}

  arrays = {"train": split(rows), "valid": split(8), "test": split(8)}
  path = builder.write(arrays, pathlib.Path(folder), "mosei", _FORMAT.value)
  (path / data.CARD).write_text("{}", encoding="utf-8")  # marks it as complete


def compare(model: str, held: data.Dataset, streamed: data.Dataset) -> dict:
  """Seconds a step over memory and over the stream."""
  inner = dict(optimizer=dict(name="sgd", learning_rate=1e-3))
  recipe = train.Recipe(
    system=models.MODELS[model](),
    method=meta.METHODS["m3s"](masking.span((0.4, 0.6)), **inner),
    optimizers={"main": optim.make(learning_rate=1e-4)},
    batch_size=_BATCH_SIZE.value,
  )
  advance = train.make_advance(recipe, recipe.system.phases[0])
  sides = {}
  for name, dataset in (("memory", held), ("stream", streamed)):
    source = sources.as_source(dataset.train).place(None)
    progress = train.start(recipe, source, streamed.spec, KEY)
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
  memory_s, stream_s = (statistics.median(times[name]) for name in ("memory", "stream"))
  return {
    "model": model,
    "rows": sources.as_source(streamed.train).rows,
    "batch_size": _BATCH_SIZE.value,
    "memory_s": memory_s,
    "stream_s": stream_s,
    "speed": memory_s / stream_s,
  }


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  with tempfile.TemporaryDirectory() as folder:
    write(folder, _ROWS.value)
    held, streamed = data.load(folder, "mosei"), stream.open_dataset(folder, "mosei")
    rows = [compare(model, held, streamed) for model in ("self_mm", "misa")]
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps({"rows": rows}, indent=1) + "\n")
  print(tabulate.tabulate(rows, headers="keys", floatfmt=".3g"))
  print(f"device: {jax.devices()[0].device_kind}; seconds a step; speed = memory / stream")


if __name__ == "__main__":
  app.run(main)
