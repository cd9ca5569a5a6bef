"""Training splits that stay on disk: read and shuffled while the device computes."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmjax import data, parallel, sources, types


class Stream(NamedTuple):
  """The training split of a converted dataset, batch by batch. Build it with `open_dataset`.

  Rows are shuffled in a buffer, from a random place of the files on: each draw passes the split
  once an epoch, whatever the buffer's size. With several processes each reads a part of its own.

  Attributes:
    builder: of TensorFlow Datasets.
    rows: N.
    example: the first row as a batch.
    options: "text" and "task", see `data.from_arrays`.
    moments: what features are standardized by, or nothing.
    buffer: rows that are shuffled among each other; they are held in the host's memory.
  """

  builder: Any
  rows: int
  example: types.Batch
  options: Mapping[str, str]
  moments: Mapping[str, tuple[np.ndarray, np.ndarray]]
  buffer: int

  def read(self) -> types.Batch:
    """The whole split as one batch of N rows: it must fit the host's memory."""
    columns = data.read_columns(self.builder, "train")
    return self._batch(np.arange(self.rows), columns)

  def shapes(self, rows: int) -> types.Batch:
    """See `sources.Source.shapes`."""
    return sources.shapes(self.example, rows)

  def place(self, mesh: Mesh | None) -> "Stream":
    """The stream itself: each batch is placed when it is read."""
    del mesh
    return self

  def make_steps(
    self,
    advance: sources.Advance,
    batch_size: int,
    draws: int,
    *,
    mesh: Mesh | None = None,
    together: bool = False,
  ) -> sources.Steps:
    """See `sources.Source.make_steps`; a step is a program of its own."""
    program = make_program(advance, mesh, together=together)
    return _Steps(self, program, batch_size, draws, mesh, together)

  def batches(
    self, key: types.PRNGKey, batch_size: int, draws: int, skip: int = 0
  ) -> Iterator[tuple[types.Batch, ...]]:
    """One epoch, a function of the key alone.

    Args:
      key: of the order.
      batch_size: B; this process gives its B / processes rows of each batch.
      draws: independent passes side by side: 2 for M³S.
      skip: batches that are left out at the beginning.

    Yields:
      A batch of host arrays for each draw; N // B times in all.
    """
    seeds = np.asarray(jax.random.bits(key, (draws, 2), "uint32")).astype(np.int64)
    own = batch_size // jax.process_count()
    serialized = _reader(self.builder)
    # read and parsed as batches: row by row it takes twice the time
    passes = [
      serialized(*self._part(turn), self.buffer, seed, own).map(self._parse) for turn, seed in seeds
    ]
    drawn = type(passes[0]).zip(tuple(passes)).take(self.rows // batch_size).skip(skip)
    for fields in drawn.prefetch(2).as_numpy_iterator():
      yield tuple(self._batch(index, rows) for index, rows in fields)

  def _part(self, turn: int) -> tuple[int, int, int]:
    """This process's part of the rows: first, the one to begin at, end."""
    hosts, host = jax.process_count(), jax.process_index()
    first, end = (self.rows * n // hosts for n in (host, host + 1))
    return first, first + turn % (end - first), end

  def columns(self, keys: Sequence[str], size: int = 4096) -> dict[str, np.ndarray]:
    """Some fields of all rows, in order; only these are decoded, `size` rows at a time."""
    serialized = _reader(self.builder)
    parse = functools.partial(self._parse, keys=keys)
    parts = [
      fields
      for _, fields in serialized(0, 0, self.rows, 1, 0, size, whole=False)
      .map(parse)
      .as_numpy_iterator()
    ]
    return {key: np.concatenate([part[key] for part in parts]) for key in keys}

  def _parse(self, index, examples, keys=None):
    """[B] serialized examples, as `data_prep.builder` writes them -> their fields."""
    import tensorflow as tf

    features = self.builder.info.features
    features = {key: features[key] for key in (features if keys is None else keys)}
    layout = {key: tf.io.FixedLenFeature((), tf.string) for key in features}
    fields = tf.io.parse_example(examples, layout)
    for key, feature in features.items():
      if (kind := tf.as_dtype(feature.np_dtype)) != tf.string:  # raw bytes
        fields[key] = tf.reshape(tf.io.decode_raw(fields[key], kind), (-1, *feature.shape))
    return index, fields

  def _batch(self, index, fields):
    batch = data.make_split(fields, f"{self.builder.name}/train", **self.options)
    return data.scale(batch._replace(index=index.astype(np.int32)), self.moments)


def _tfrecords(builder: Any) -> Callable:
  """`(first, turn, end, buffer, seed, own, whole) -> Dataset` of [own] indices with their rows.

  The rows [turn, end) and then [first, turn), shuffled in a buffer and serialized; a file is read
  in order. `whole` leaves out a last batch of less than `own` rows.
  """
  import tensorflow as tf

  split = builder.info.splits["train"]
  paths = [str(path) for path in split.filepaths]
  starts = np.concatenate([[0], np.cumsum(split.shard_lengths)])

  def read(start, stop):
    files = [
      tf.data.TFRecordDataset(path)
      .skip(max(start - low, 0))
      .take(min(stop, high) - max(start, low))
      for path, low, high in zip(paths, starts[:-1], starts[1:], strict=True)
      if max(start, low) < min(stop, high)
    ]
    return functools.reduce(tf.data.Dataset.concatenate, files).enumerate(start)

  def serialized(first, turn, end, buffer, seed, own, whole=True):
    rows = read(turn, end)
    rows = rows.concatenate(read(first, turn)) if turn > first else rows
    return rows.shuffle(min(buffer, end - first), seed=seed).batch(own, drop_remainder=whole)

  return serialized


def _array_records(builder: Any) -> Callable:
  """`_tfrecords` of files with random access, in the same order: row numbers are shuffled."""
  import tensorflow as tf
  from array_record.python import array_record_data_source

  paths = [str(path) for path in builder.info.splits["train"].filepaths]
  records = array_record_data_source.ArrayRecordDataSource(paths)

  def fetch(index):
    return np.array(records.__getitems__(index.tolist()), object)

  def serialized(first, turn, end, buffer, seed, own, whole=True):
    rows = tf.data.Dataset.range(turn, end).concatenate(tf.data.Dataset.range(first, turn))
    index = rows.shuffle(min(buffer, end - first), seed=seed).batch(own, drop_remainder=whole)

    def with_rows(index):
      found = tf.numpy_function(fetch, [index], tf.string)
      return index, tf.ensure_shape(found, index.shape)

    return index.map(with_rows)

  return serialized


# How the files of each format are read.
FORMATS: Mapping[str, Callable[[Any], Callable]] = {
  "tfrecord": _tfrecords,
  "array_record": _array_records,
}


def _reader(builder: Any) -> Callable:
  kind = builder.info.file_format.value
  if kind not in FORMATS:
    raise data.DataError(f"{builder.name} is stored as {kind}; what streams are {list(FORMATS)}.")
  return FORMATS[kind](builder)


def make_program(
  advance: sources.Advance, mesh: Mesh | None, *, together: bool = False
) -> Callable[..., tuple]:
  """The jitted `(state, sums, drawn, key) -> (state, sums, finite)` of one step of a stream.

  Args:
    advance: the step; state and sums are consumed.
    mesh: devices that share the rows of each draw.
    together: whether all arguments have a leading axis of runs.
  """

  def one(state, sums, drawn, key):
    # stacked, as `meta` takes them apart again: rows that are concatenated would change devices
    join = lambda *parts: jnp.stack(parts).reshape(-1, *parts[0].shape[1:])  # noqa: E731
    return advance(state, sums, jax.tree.map(join, *drawn), key)

  return parallel.Program(jax.vmap(one) if together else one, mesh)


class _Steps:
  """Runs steps one by one; the next batch is read while the device computes.

  It remembers where the last call ended, so that going on there reads nothing twice.
  """

  def __init__(self, stream, program, batch_size, draws, mesh, together):
    self._stream, self._program, self._mesh = stream, program, mesh
    self._batch_size, self._draws, self._together = batch_size, draws, together
    self._place, self._upcoming, self._batches = None, None, iter(())

  def __call__(self, state, sums, key, epoch, start, stop):
    at, finite = int(start), np.bool_(True)
    if self._place != (int(epoch), at):
      self._batches = self._read(key, epoch, at)
      self._upcoming = next(self._batches)
    while np.all(finite) and at < stop:
      state, sums, finite = self._program(state, sums, self._upcoming, key)
      at, self._upcoming = at + 1, next(self._batches, None)  # while the device computes
    self._place = (int(epoch), at)
    return state, sums, finite

  def _read(self, key, epoch, skip):
    passes = [
      self._stream.batches(sources.order_key(one, epoch), self._batch_size, self._draws, skip=skip)
      for one in (key if self._together else [key])
    ]
    if self._together:
      return (
        jax.tree.map(lambda *rows: jnp.stack(rows), *runs) for runs in zip(*passes, strict=True)
      )
    return (parallel.assemble(drawn, self._mesh) for drawn in passes[0])


def open_dataset(
  data_dir: str,
  name: str,
  *,
  text: str = "features",
  task: str = "regression",
  standardize: bool = False,
  label_range: tuple[float, float] | None = None,
  buffer: int = 1024,
) -> data.Dataset:
  """`data.load`, but the training split is a `Stream` and never in memory as a whole.

  Args:
    data_dir: folder of the datasets.
    name: the dataset's name.
    text, task, standardize, label_range: see `data.from_arrays`.
    buffer: see `Stream`.

  Raises:
    DataError: if there is no complete dataset of that name, or a key is missing.
  """
  tfds = data.import_tfds()
  builder: Any = tfds.builder_from_directory(str(data.dataset_folder(data_dir, name)))
  _reader(builder)  # refuses other formats at once
  held = data.read_arrays(data_dir, name, splits=("valid", "test"))
  arrays = {"train": data.read_columns(builder, "train[:1]"), **held}
  dataset = data.make_dataset(arrays, name=name, text=text, task=task)
  card, moments = data.read_card(data_dir, name), {}
  if standardize:
    known = card["standardize"]
    moments = {m: data.as_moments(**known[m]) for m in data.STANDARDIZED if m in known}
  example, valid, test = (
    data.scale(batch, moments) for batch in (dataset.train, dataset.valid, dataset.test)
  )
  train = Stream(
    builder,
    builder.info.splits["train"].num_examples,
    example,
    {"text": text, "task": task},
    moments,
    buffer,
  )
  # the few small columns as a whole
  label = "regression_labels" if task == "regression" else "classification_labels"
  columns = train.columns(["id", label])
  labels = np.concatenate([columns[label].reshape(-1), valid.label, test.label])
  spec = data.make_spec(example, labels, name, task, label_range, card.get("largest_id"))
  return dataset._replace(
    train=train,
    valid=valid,
    test=test,
    spec=spec._replace(num_train=train.rows),
    ids={**dataset.ids, "train": [_text(i) for i in columns["id"]]},
  )


def _text(value) -> str:
  return value.decode() if isinstance(value, bytes) else str(value)
