"""Training splits that stay on disk: read and shuffled while the device computes."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmjax import check, data, parallel, records, sources, types

_BLOCK = 1 << 27  # bytes that are read as one: small ones cost more than the steps on them


class Stream(NamedTuple):
  """The training split of a converted dataset, batch by batch. Build it with `open_dataset`.

  Each draw passes the split once an epoch, in an order that hangs on the files' format, see
  `records`.

  Attributes:
    builder: of TensorFlow Datasets.
    rows: N.
    example: the first row as a batch.
    options: "text" and "task", see `data.from_arrays`.
    moments: what features are standardized by, or nothing.
    buffer: rows of TFRecords that are shuffled among each other, in the host's memory.
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
    """See `sources.Source.make_steps`; a program runs the steps of what is read as one."""
    program = make_program(advance, mesh, together=together)
    leaves = jax.tree.leaves(self.shapes(batch_size * draws))
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves)
    steps = max(1, min(_BLOCK // size, self.rows // batch_size))
    return _Steps(self, program, batch_size, draws, steps, mesh, together)

  def batches(
    self, key: types.PRNGKey, batch_size: int, draws: int, skip: int = 0, steps: int = 1
  ) -> Iterator[tuple[types.Batch, ...]]:
    """One epoch, a function of the key alone.

    Args:
      key: of the order.
      batch_size: B; this process gives its B / processes rows of each batch.
      draws: independent passes side by side: 2 for M³S.
      skip: batches that are left out at the beginning.
      steps: S, batches that are read as one.

    Yields:
      A batch of S · B rows on the host for each draw, less at the end; N // B batches in all.
    """
    unread = {*check.STRINGS, *(("text",) if self.options["text"] == "tokens" else ())}
    keys = [key for key in self.builder.info.features if key not in unread]
    rows = records.make(self.builder, self.buffer)
    return rows.passes(key, batch_size, draws, keys, self._batch, skip, steps)

  def _batch(self, index, fields):
    batch = data.make_split(fields, f"{self.builder.name}/train", **self.options)
    return data.scale(batch._replace(index=index.astype(np.int32)), self.moments)


def make_program(
  advance: sources.Advance, mesh: Mesh | None, *, together: bool = False
) -> Callable[..., tuple]:
  """The jitted `(state, sums, block, key, start, stop) -> (state, sums, finite)`.

  It runs the steps [start, stop) of a block, up to the first that is not finite.

  Args:
    advance: a step; state and sums are consumed.
    mesh: devices that share the rows of each batch.
    together: whether state, sums, block and key have a leading axis of runs.
  """

  def run(state, sums, block, key, start, stop):
    def join(at, *draws):
      # stacked, as `meta` takes them apart again: rows that are concatenated would change devices
      rows = jnp.stack([jax.lax.dynamic_index_in_dim(a, at, keepdims=False) for a in draws])
      return rows.reshape(-1, *rows.shape[2:])

    def unfinished(carry):
      return (carry[2] < stop) & carry[3]

    def body(carry):
      state, sums, at, _ = carry
      batch = jax.tree.map(functools.partial(join, at), *block)
      state, sums, finite = advance(state, sums, batch, key)
      return state, sums, at + 1, finite

    state, sums, _, finite = jax.lax.while_loop(
      unfinished, body, (state, sums, start, jnp.bool_(True))
    )
    return state, sums, finite

  if together:
    run = jax.vmap(run, in_axes=(0, 0, 0, 0, None, None))
  return parallel.Program(run, mesh)


class _Steps:
  """Runs the steps of block after block; the next one is read while the device computes.

  It remembers where the last call ended, so that going on there reads nothing twice.
  """

  def __init__(self, stream, program, batch_size, draws, steps, mesh, together):
    self._stream, self._program, self._mesh = stream, program, mesh
    self._batch_size, self._draws, self._size = batch_size, draws, steps
    self._together = together
    self._place, self._begin = None, 0
    self._block, self._upcoming, self._blocks = None, None, iter(())

  def __call__(self, state, sums, key, epoch, start, stop):
    at, finite = int(start), np.bool_(True)
    if self._place != (int(epoch), at):
      self._blocks, self._begin = self._read(key, epoch, at), at
      self._block, self._upcoming = next(self._blocks), None
    while np.all(finite) and at < stop:
      if at == self._begin + self._size:
        self._block = self._upcoming or next(self._blocks)
        self._begin, self._upcoming = at, None
      first, end = at - self._begin, min(stop - self._begin, self._size)
      state, sums, finite = self._program(
        state, sums, self._block, key, np.int32(first), np.int32(end)
      )
      at = self._begin + end
      if self._upcoming is None:  # while the device computes
        self._upcoming = next(self._blocks, None)
    self._place = (int(epoch), at)
    return state, sums, finite

  def _read(self, key, epoch, skip):
    passes = [
      self._stream.batches(
        sources.order_key(one, epoch), self._batch_size, self._draws, skip, self._size
      )
      for one in (key if self._together else [key])
    ]
    if self._together:
      return (
        jax.tree.map(lambda *runs: jnp.stack(runs), *map(self._shape, runs))
        for runs in zip(*passes, strict=True)
      )
    return (parallel.assemble(self._shape(drawn), self._mesh, axis=1) for drawn in passes[0])

  def _shape(self, drawn):
    """[S · B, …] -> [S, B, …], filled up at the end of an epoch: one program for all."""
    own = self._batch_size // jax.process_count()
    lack = self._size * own - drawn[0].index.shape[0]

    def shape(a):
      a = np.pad(a, [(0, lack)] + [(0, 0)] * (a.ndim - 1)) if lack else a
      return a.reshape(self._size, own, *a.shape[1:])

    return jax.tree.map(shape, drawn)


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
  rows = records.make(builder, buffer)  # refuses other formats at once
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
  columns = rows.columns(["id", data.label_key(builder.info.features, task)])
  labels = [data.read_labels(columns, f"{name}/train", task), valid.label, test.label]
  labels = np.concatenate(labels)
  spec = data.make_spec(example, labels, name, task, label_range, card.get("largest_id"))
  return dataset._replace(
    train=train,
    valid=valid,
    test=test,
    spec=spec._replace(num_train=train.rows),
    moments=moments,
    ids={**dataset.ids, "train": [_text(i) for i in columns["id"]]},
  )


def _text(value) -> str:
  return value.decode() if isinstance(value, bytes) else str(value)
