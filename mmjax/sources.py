"""Training splits as the trainer sees them: they hold the rows, and run the steps over them.

`Resident` and `Conversations` lie on the device, where an epoch is one program; `stream.Stream`
stays on disk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmjax import conversations, parallel, types

# `(state, sums, batch, key) -> (state, sums, finite)`: one step, its metrics added to the sums.
Advance = Callable[[types.TrainState, Any, types.Batch, types.PRNGKey], tuple]
# `(state, sums, key, epoch, start, stop) -> (state, sums, finite)`: the steps [start, stop) of an
# epoch, up to the first that is not finite; state and sums are consumed.
Steps = Callable[..., tuple[types.TrainState, Any, Any]]


class Source(types.Source, Protocol):
  """What the trainer asks of a training split beside `rows` and `read`."""

  def shapes(self, rows: int) -> types.Batch:
    """The shapes and types of a batch of so many samples, or conversations."""
    ...

  def place(self, mesh: Mesh | None) -> "Source":
    """The source with the rows where the steps need them."""
    ...

  def make_steps(
    self,
    advance: Advance,
    batch_size: int,
    draws: int,
    *,
    mesh: Mesh | None = None,
    together: bool = False,
  ) -> Steps:
    """Compiles what runs the steps of an epoch.

    Args:
      advance: one step.
      batch_size: B.
      draws: independent draws of B rows a step.
      mesh: devices that share each batch.
      together: whether state, sums and key have a leading axis of runs that train side by side.

    Returns:
      The steps. Where an epoch is cut does not change a bit of the result.
    """
    ...


class Resident(NamedTuple):
  """A training split in memory.

  Attributes:
    batch: the whole split, N rows.
  """

  batch: types.Batch

  @property
  def rows(self) -> int:
    """N."""
    return self.batch.index.shape[0]

  def shapes(self, rows: int) -> types.Batch:
    """See `Source.shapes`."""
    return shapes(self.batch, rows)

  def read(self) -> types.Batch:
    """The split itself."""
    return self.batch

  def place(self, mesh: Mesh | None) -> "Resident":
    """The split on the device, or on each one of the mesh."""
    return Resident(parallel.replicate(self.batch, mesh))

  def make_steps(
    self,
    advance: Advance,
    batch_size: int,
    draws: int,
    *,
    mesh: Mesh | None = None,
    together: bool = False,
  ) -> Steps:
    """See `Source.make_steps`; any number of steps is one program, the bounds are traced."""

    def take(data, rows):
      return jax.tree.map(lambda a: a[rows], data)

    return _make_steps(self.batch, self.rows, take, advance, batch_size, draws, mesh, together)


class Conversations(NamedTuple):
  """A training split in memory that is passed conversation by conversation.

  A batch has U rows for each of them, see `conversations.take`.

  Attributes:
    batch: the whole split, N rows, with the columns of `conversations.group`.
    table: [V, U] of `conversations.table`.
  """

  batch: types.Batch
  table: Any

  @property
  def rows(self) -> int:
    """V, the number of conversations."""
    return self.table.shape[0]

  def shapes(self, rows: int) -> types.Batch:
    """See `Source.shapes`."""
    example = jax.eval_shape(conversations.take, self.batch, self.table[:1])
    return shapes(example, rows * self.table.shape[1])

  def read(self) -> types.Batch:
    """The split, N utterances."""
    return self.batch

  def place(self, mesh: Mesh | None) -> "Conversations":
    """The split on the device, or on each one of the mesh."""
    return Conversations(*parallel.replicate(tuple(self), mesh))

  def make_steps(
    self,
    advance: Advance,
    batch_size: int,
    draws: int,
    *,
    mesh: Mesh | None = None,
    together: bool = False,
  ) -> Steps:
    """See `Source.make_steps`; any number of steps is one program, the bounds are traced."""

    def take(data, rows):
      return conversations.take(data.batch, data.table[rows])

    return _make_steps(self, self.rows, take, advance, batch_size, draws, mesh, together)


def shapes(example: types.Batch, rows: int) -> types.Batch:
  """The shapes of a batch of so many rows like those of an example."""
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct((rows, *a.shape[1:]), jax.dtypes.canonicalize_dtype(a.dtype)),
    example,
  )


def _make_steps(data, count, take, advance, batch_size, draws, mesh, together) -> Steps:
  """Steps over permutations of `count`, of which `take(data, rows [draws · B])` makes batches."""

  def steps(state, sums, data, key, epoch, start, stop):
    order = orders(order_key(key, epoch), count, draws)

    def unfinished(carry):
      _, _, at, finite = carry
      return (at < stop) & finite

    def body(carry):
      state, sums, at, _ = carry
      rows = jax.lax.dynamic_slice_in_dim(order, at * batch_size, batch_size, axis=1)
      state, sums, finite = advance(state, sums, take(data, rows.reshape(-1)), key)
      return state, sums, at + 1, finite

    state, sums, _, finite = jax.lax.while_loop(
      unfinished, body, (state, sums, start, jnp.bool_(True))
    )
    return state, sums, finite

  if together:
    steps = jax.vmap(steps, in_axes=(0, 0, None, 0, None, None, None))
  program = parallel.Program(steps, mesh)
  return lambda state, sums, *when: program(state, sums, data, *when)


def as_source(train: types.Batch | Source) -> Source:
  """A split in memory as a source, of its conversations if it is grouped; others as they are."""
  if not isinstance(train, types.Batch):
    return train
  if conversations.is_grouped(train):
    return Conversations(train, conversations.table(train))
  return Resident(train)


# The constant that is folded into a run's key for the order of its data.
DATA = 1


def orders(key: types.PRNGKey, rows: int, draws: int) -> types.Array:
  """[draws, N] the orders in which the draws of an epoch take the rows; see `order_key`."""
  keys = jax.random.split(key, draws)
  return jax.vmap(lambda k: jax.random.permutation(k, rows))(keys)


def order_key(key: types.PRNGKey, epoch: Any) -> types.PRNGKey:
  """The key of an epoch's order, from the run's."""
  return jax.random.fold_in(jax.random.fold_in(key, DATA), epoch)
