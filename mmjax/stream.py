"""Training splits that stay on disk: TFRecords, read and shuffled while the device computes."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mmjax import data, types


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
    # parsed as batches: row by row it takes twice the time
    passes = [self._rows(*seed).batch(own, drop_remainder=True).map(self._parse) for seed in seeds]
    drawn = type(passes[0]).zip(tuple(passes)).take(self.rows // batch_size).skip(skip)
    for fields in drawn.prefetch(2).as_numpy_iterator():
      yield tuple(self._batch(index, rows) for index, rows in fields)

  def _rows(self, turn, seed):
    """A tf.data.Dataset of this process's (index, example), from row `turn` on, shuffled."""
    import tensorflow as tf

    tfds = data.import_tfds()
    hosts, host = jax.process_count(), jax.process_index()
    first, end = (self.rows * n // hosts for n in (host, host + 1))
    turn = first + turn % (end - first)

    def read(start, stop):
      part = tfds.core.ReadInstruction("train", from_=start, to=stop, unit="abs")
      files = [
        tf.data.TFRecordDataset(file.filename).skip(file.skip).take(file.take)
        for file in self.builder.info.splits[part].file_instructions
      ]
      return functools.reduce(tf.data.Dataset.concatenate, files).enumerate(start)

    rows = read(turn, end)
    rows = rows.concatenate(read(first, turn)) if turn > first else rows
    return rows.shuffle(min(self.buffer, end - first), seed=seed)

  def _parse(self, index, examples):
    """[B] serialized examples, as `data_prep.builder` writes them -> their fields."""
    import tensorflow as tf

    features = dict(self.builder.info.features)
    layout = {key: tf.io.FixedLenFeature((), tf.string) for key in features}
    fields = tf.io.parse_example(examples, layout)
    for key, feature in features.items():
      if (kind := tf.as_dtype(feature.np_dtype)) != tf.string:  # raw bytes
        fields[key] = tf.reshape(tf.io.decode_raw(fields[key], kind), (-1, *feature.shape))
    return index, fields

  def _batch(self, index, fields):
    batch = data.make_split(fields, f"{self.builder.name}/train", **self.options)
    return data.scale(batch._replace(index=index.astype(np.int32)), self.moments)


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
    DataError: if there is no complete dataset of that name in TFRecords, or a key is missing.
  """
  tfds = data.import_tfds()
  builder = tfds.builder_from_directory(str(data.dataset_folder(data_dir, name)))
  if builder.info.file_format is not tfds.core.FileFormat.TFRECORD:
    raise data.DataError(
      f"{name} is stored as {builder.info.file_format.value}; what streams are TFRecords:"
      " python -m data_prep.convert --file_format=tfrecord"
    )
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
  # the few small columns as a whole
  label = "regression_labels" if task == "regression" else "classification_labels"
  decoders = tfds.decode.PartialDecoding({"id": True, label: True})
  columns = data.read_columns(builder, "train", decoders=decoders)
  labels = np.concatenate([columns[label].reshape(-1), valid.label, test.label])
  spec = data.make_spec(example, labels, name, task, label_range, card.get("largest_id"))
  train = Stream(
    builder, len(columns["id"]), example, {"text": text, "task": task}, moments, buffer
  )
  return dataset._replace(
    train=train,
    valid=valid,
    test=test,
    spec=spec._replace(num_train=train.rows),
    ids={**dataset.ids, "train": [str(i) for i in columns["id"]]},
  )
