"""The rows of a converted training split, read from disk in a random order, batch by batch.

TFRecords are read through tf.data: from a random place of the files on, shuffled in a buffer.
array_record files have random access and are read through Grain, in the order of a split in memory.
"""

import functools
import importlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from mmjax import data, sources, types

# `(index [B], fields {key: [B, …]}) -> batch`.
Make = Callable[[np.ndarray, dict[str, np.ndarray]], types.Batch]


_ALIGNMENT = 64  # bytes


class Records(Protocol):
  """The rows of a format's files."""

  def passes(
    self,
    key: types.PRNGKey,
    batch_size: int,
    draws: int,
    keys: Sequence[str],
    make: Make,
    skip: int,
    steps: int,
  ) -> Iterator[tuple[types.Batch, ...]]:
    """Passes over all rows, independent and side by side; see `stream.Stream.batches`.

    Args:
      key: of the orders.
      batch_size: B; this process reads its B / processes rows of each batch.
      draws: the number of passes.
      keys: fields that are decoded.
      make: what it is given becomes a batch.
      skip: batches that are left out at the beginning.
      steps: batches that are read as one.
    """
    ...

  def columns(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Some fields of all rows, in order; only these are decoded."""
    ...


class TfRecords:
  """Files that are read in order. With several processes each reads a part of its own.

  Args:
    builder: of TensorFlow Datasets.
    buffer: rows that are shuffled among each other.
  """

  def __init__(self, builder: Any, buffer: int):
    split = builder.info.splits["train"]
    self._features, self._buffer, self._rows = builder.info.features, buffer, split.num_examples
    self._paths = [str(path) for path in split.filepaths]
    self._starts = np.concatenate([[0], np.cumsum(split.shard_lengths)])

  def passes(self, key, batch_size, draws, keys, make, skip, steps):
    """See `Records`."""
    seeds = np.asarray(jax.random.bits(key, (draws, 2), "uint32")).astype(np.int64)
    own, count = batch_size // jax.process_count(), self._rows // batch_size
    parse = functools.partial(self._parse, keys=keys)
    # read and parsed as batches: row by row it takes twice the time
    passes = [
      self._rows_from(turn)
      .shuffle(self._buffer, seed=seed)
      .take(count * own)
      .skip(skip * own)
      .batch(steps * own)
      .map(parse)
      for turn, seed in seeds
    ]
    drawn = type(passes[0]).zip(tuple(passes))
    for fields in drawn.prefetch(1).as_numpy_iterator():
      yield tuple(make(index, rows) for index, rows in fields)

  def columns(self, keys):
    """See `Records`."""
    parse = functools.partial(self._parse, keys=keys)
    parts = self._read(0, self._rows).batch(4096).map(parse).as_numpy_iterator()
    parts = [fields for _, fields in parts]
    return {key: np.concatenate([part[key] for part in parts]) for key in keys}

  def _rows_from(self, turn: int) -> Any:
    """This process's part of the rows, from one of them on and then those before it."""
    hosts, host = jax.process_count(), jax.process_index()
    first, end = (self._rows * n // hosts for n in (host, host + 1))
    turn = first + turn % (end - first)
    rows = self._read(turn, end)
    return rows.concatenate(self._read(first, turn)) if turn > first else rows

  def _read(self, start: int, stop: int) -> Any:
    """The rows [start, stop), each with its number."""
    import tensorflow as tf

    files = [
      tf.data.TFRecordDataset(path)
      .skip(max(start - low, 0))
      .take(min(stop, high) - max(start, low))
      for path, low, high in zip(self._paths, self._starts[:-1], self._starts[1:], strict=True)
      if max(start, low) < min(stop, high)
    ]
    return functools.reduce(tf.data.Dataset.concatenate, files).enumerate(start)

  def _parse(self, index, examples, keys):
    """[B] serialized examples, as `data_prep.builder` writes them -> their fields."""
    import tensorflow as tf

    features = {key: self._features[key] for key in keys}
    layout = {key: tf.io.FixedLenFeature((), tf.string) for key in features}
    fields = tf.io.parse_example(examples, layout)
    for key, feature in features.items():
      kind = tf.as_dtype(feature.np_dtype)
      if kind != tf.string:  # raw bytes
        fields[key] = tf.reshape(tf.io.decode_raw(fields[key], kind), (-1, *feature.shape))
    return index, fields


class ArrayRecords:
  """Files with random access: an epoch's batches are those of the split in memory.

  Args:
    builder: of TensorFlow Datasets.
    buffer: not needed.
  """

  def __init__(self, builder: Any, buffer: int):
    from grain import sources as grain_sources

    del buffer
    split = builder.info.splits["train"]
    self._features, self._rows = builder.info.features, split.num_examples
    paths = [str(path) for path in split.filepaths]
    self._records: Any = grain_sources.ArrayRecordDataSource(paths)

  def passes(self, key, batch_size, draws, keys, make, skip, steps):
    """See `Records`."""
    import grain

    hosts, host = jax.process_count(), jax.process_index()
    count = self._rows // batch_size
    orders = np.asarray(sources.orders(key, self._rows, draws))[:, : count * batch_size]
    own = orders.reshape(draws, count, hosts, -1)[:, skip:, host]  # [draws, steps, B]
    blocks = [own[:, at : at + steps].reshape(draws, -1) for at in range(0, own.shape[1], steps)]

    def read(index):
      return tuple(make(rows, self._read(rows, keys)) for rows in index)

    threads = max(1, min(8, (os.cpu_count() or 1) // 2))  # the others compute
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    return iter(grain.MapDataset.source(blocks).map(read).to_iter_dataset(options))

  def columns(self, keys):
    """See `Records`."""
    return self._read(np.arange(self._rows), keys)

  def _read(self, index, keys):
    # protobuf's own parser: it needs no TensorFlow
    proto: Any = importlib.import_module("tensorflow_datasets.proto.tf_example_generated_pb2")
    features = {key: self._features[key] for key in keys}
    found = {
      key: _empty((len(index), *feature.shape), np.dtype(feature.np_dtype))
      for key, feature in features.items()
    }
    for row, number in enumerate(index):
      example = proto.Example.FromString(self._records[int(number)]).features.feature
      for key, values in found.items():
        (value,) = example[key].bytes_list.value
        if values.dtype != object:  # raw bytes
          value = np.frombuffer(value, values.dtype).reshape(values.shape[1:])
        values[row] = value
    return found


def _empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """`np.empty`, aligned so that JAX takes numbers without a copy on a CPU."""
  if dtype.kind not in "fiub":
    return np.empty(shape, object)
  size = math.prod(shape) * dtype.itemsize
  held = np.empty(size + _ALIGNMENT, np.uint8)
  first = -held.ctypes.data % _ALIGNMENT
  return held[first : first + size].view(dtype).reshape(shape)


# How the files of each format are read.
FORMATS: Mapping[str, Callable[[Any, int], Records]] = {
  "tfrecord": TfRecords,
  "array_record": ArrayRecords,
}


def make(builder: Any, buffer: int) -> Records:
  """The rows of a dataset's training split.

  Args:
    builder: of TensorFlow Datasets.
    buffer: rows that are shuffled among each other, where files are read in order.

  Raises:
    DataError: if its format is not one of `FORMATS`.
  """
  kind = builder.info.file_format.value
  if kind not in FORMATS:
    raise data.DataError(f"{builder.name} is stored as {kind}; what streams are {list(FORMATS)}.")
  return FORMATS[kind](builder, buffer)
