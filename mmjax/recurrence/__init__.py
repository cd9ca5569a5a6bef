"""LSTM and GRU: a loop on a CPU (`scan`), one kernel on a GPU or TPU (`kernel`).

So is a decoder that attends (`attending`). All of them keep the states alone and have a backward
pass of their own. Which of both runs is decided as a program is compiled for a device
(`jax.lax.platform_dependent`). A process that has no accelerator traces the loop alone, which takes
less time, unless it is told that its programs are for others: `with portable():`. `with plain():`
traces a plain scan instead, on every device, to compare.
"""

import contextlib
import contextvars
import functools
import math

import chex
import jax
import jax.numpy as jnp

from mmjax import parallel, types
from mmjax.recurrence import attending, kernel, scan

Array = types.Array
Weights = tuple[Array, Array, Array]
GruWeights = tuple[Array, Array, Array, Array]

_PLAIN = contextvars.ContextVar("mmjax_plain_recurrence", default=False)
_PORTABLE = contextvars.ContextVar("mmjax_portable_recurrence", default=False)


def plain() -> contextlib.AbstractContextManager[None]:
  """What is traced inside runs recurrences as plain scans, differentiated by JAX itself."""
  return _within(_PLAIN)


def portable() -> contextlib.AbstractContextManager[None]:
  """What is traced inside can be compiled for accelerators that this process does not have."""
  return _within(_PORTABLE)


@contextlib.contextmanager
def _within(variable):
  token = variable.set(True)
  try:
    yield
  finally:
    variable.reset(token)


def lstm(
  x: Array, valid: Array, w_ih: Array, w_hh: Array, bias: Array, *, reverse: bool = False
) -> tuple[Array, Array]:
  """Runs an LSTM of gates i, f, g, o over sequences whose padding keeps the state.

  Args:
    x: [L, B, D], the steps first.
    valid: [L, B] bool.
    w_ih: [D, 4H].
    w_hh: [H, 4H].
    bias: [4H].
    reverse: from the last step to the first.

  Returns:
    Outputs [L, B, H], zero on padding, and the final state [B, H].
  """
  chex.assert_rank([x, valid, w_ih, w_hh, bias], [3, 2, 2, 2, 1])
  chex.assert_shape(valid, x.shape[:2])
  x, *weights = _alike(x, w_ih, w_hh, bias)
  states, final = _run(x, valid[:, :, None], weights, reverse)
  return jnp.where(valid[:, :, None], states, 0), final


def bilstm(
  x: Array, valid: Array, forward: Weights, backward: Weights
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
  """Runs an LSTM in each direction, side by side: one loop of batched products, not two loops.

  Args:
    x: [L, B, D], the steps first.
    valid: [L, B] bool.
    forward, backward: (w_ih, w_hh, bias) of each direction, see `lstm`.

  Returns:
    Outputs (forward, backward), [L, B, H] each, and final states, [B, H] each.
  """
  if _PLAIN.get():
    (ahead, last), (back, first) = (
      lstm(x, valid, *forward),
      lstm(x, valid, *backward, reverse=True),
    )
    return (ahead, back), (last, first)
  x, *weights = _alike(x, *forward, *backward)
  forward, backward = tuple(weights[:3]), tuple(weights[3:])
  # the longest sequence, turned round, begins at once: chunks of padding alone cost a loop nothing
  last = x.shape[0] - jnp.argmax(valid.any(1)[::-1])
  by_itself = lambda a, **_: a  # noqa: E731 - kernels turn round
  turn = functools.partial(  # its own inverse
    _by_platform,
    (lambda a, **_: jnp.roll(a[::-1], last, 0)) if _scans(kernel.LSTM, x.dtype) else by_itself,
    by_itself,
    *_size(forward[1]),
  )
  both, seen = (jnp.stack([a, turn(a)], 1) for a in (x, valid[:, :, None]))
  weights = tuple(map(jnp.stack, zip(forward, backward, strict=True)))
  states, final = _run(both, seen, weights, False)
  ahead, back = (jnp.where(valid[:, :, None], s, 0) for s in (states[:, 0], turn(states[:, 1])))
  return (ahead, back), (final[0], final[1])


def gru(
  x: Array,
  valid: Array,
  w_ih: Array,
  w_hh: Array,
  b_ih: Array,
  b_hh: Array,
  *,
  reverse: bool = False,
) -> Array:
  """Runs a GRU of gates r, z, n over sequences whose padding keeps the state.

  Args:
    x: [B, L, D].
    valid: [B, L] bool.
    w_ih: [D, 3H].
    w_hh: [H, 3H].
    b_ih, b_hh: [3H].
    reverse: from the last step to the first.

  Returns:
    Outputs [B, L, H], zero on padding.
  """
  chex.assert_rank([x, valid, w_ih, w_hh, b_ih, b_hh], [3, 2, 2, 2, 1, 1])
  chex.assert_shape(valid, x.shape[:2])
  if _gru_scans(w_hh):
    return scan.gru(x, valid, w_ih, w_hh, b_ih, b_hh, reverse)
  steps, seen = x.swapaxes(0, 1), valid.T[:, :, None]
  w, bias = _gru_weights(w_ih, w_hh, b_ih, b_hh)
  states, _ = _in_chunks(steps.astype(w.dtype), seen, w, bias, kernel.GRU, reverse)
  return jnp.where(seen, states, 0).swapaxes(0, 1)


def bigru(x: Array, valid: Array, forward: GruWeights, backward: GruWeights) -> tuple[Array, Array]:
  """Runs a GRU in each direction, on accelerators as one kernel.

  Args:
    x: [B, L, D].
    valid: [B, L] bool.
    forward, backward: (w_ih, w_hh, b_ih, b_hh) of each direction, see `gru`.

  Returns:
    Outputs (forward, backward), [B, L, H] each.
  """
  if _gru_scans(forward[1]):
    return gru(x, valid, *forward), gru(x, valid, *backward, reverse=True)
  w_ih, w_hh, b_ih, b_hh = (jnp.stack(both) for both in zip(forward, backward, strict=True))
  w, bias = _gru_weights(w_ih, w_hh, b_ih, b_hh)
  steps, seen = x.swapaxes(0, 1).astype(w.dtype), valid.T[:, :, None]
  twice, seen_twice = (jnp.stack([a, a], 1) for a in (steps, seen))
  states, _ = _in_chunks(twice, seen_twice, w, bias, kernel.GRU, False)
  ahead, back = (jnp.where(seen, states[:, n], 0).swapaxes(0, 1) for n in range(2))
  return ahead, back


def _gru_scans(w_hh):
  return _PLAIN.get() or (w_hh.dtype.itemsize >= 4 and not _accelerated(w_hh.dtype))


def _gru_weights(w_ih, w_hh, b_ih, b_hh):
  """w [..., D + H, 4H] and bias [..., 4H] of r, z, and the two parts of n: r scales the state's."""
  (w_rz, w_n), (u_rz, u_n), (b_rz, b_n), (c_rz, c_n) = (
    jnp.split(a, [2 * w_hh.shape[-2]], -1) for a in (w_ih, w_hh, b_ih, b_hh)
  )
  w = [[w_rz, w_n, jnp.zeros_like(w_n)], [u_rz, jnp.zeros_like(u_n), u_n]]
  return jnp.block(w), jnp.concatenate([b_rz + c_rz, b_n, c_n], -1)


def attend_and_decode(
  given: Array,
  states: Array,
  keys: Array,
  allowed: Array | bool,
  state: Array,
  w_query: Array,
  v: Array,
  w_context: Array,
) -> tuple[Array, Array]:
  """Runs a decoder that attends to a source at each step; see `attending`.

  Args:
    given: [M, B, 8H], the gates i, f, g, o of both directions, but for what is found.
    states: [B, L, H] of the source.
    keys: [B, L, H], their share of the energies, v · tanh(keys + state @ w_query).
    allowed: [B, L] bool, which of them may be attended to; True: all.
    state: [B, H] to begin at.
    w_query: [H, H].
    v: [H, 1].
    w_context: [H, 8H].

  Returns:
    The state after each step and what the step found in the source, [M, B, H] each.
  """
  chex.assert_rank([given, states, keys, state, w_query, v, w_context], [3, 3, 3, 2, 2, 2, 2])
  fits = len(given) and attending.fits(states.shape[1], state.shape[1])
  if _PLAIN.get() or not (fits and _accelerated(w_query.dtype)):
    return attending.plain(given, states, keys, allowed, state, w_query, v, w_context)
  allowed = jnp.broadcast_to(jnp.asarray(allowed), states.shape[:2])
  run = parallel.by_rows(
    functools.partial(attending.by_kernel, _decode),
    in_axes=(1, 0, 0, 0, 0, None, None, None),
    out_axes=(1, 1),
    rows=len(state),
  )
  return run(given, states, keys, allowed, state, w_query, v, w_context)


@jax.custom_vjp
def _decode(*args):
  """`attending.forward`."""
  return _decode_fwd(*args)[0]


def _decode_fwd(*args):
  found = _by_platform(attending.forward, attending.forward, *_size(args[0][0], 1), *args)
  return found, (*args, found[0])


def _decode_bwd(kept, cotangents):
  size = _size(kept[0][0], 1)
  return _by_platform(attending.backward, attending.backward, *size, *kept, *cotangents)


_decode.defvjp(_decode_fwd, _decode_bwd)


def _alike(*arrays):
  """All in one dtype: features may be of half precision, the weights' own is computed in."""
  with jax.numpy_dtype_promotion("standard"):
    dtype = jnp.result_type(*arrays)
  return [a.astype(dtype) for a in arrays]


def _run(x, valid, weights, reverse):
  """h after each step and the final h.

  Several LSTMs run at once where there is an axis G: x [L, (G,) B, D], valid [L, (G,) B, 1],
  weights [(G,) D, 4H], [(G,) H, 4H], [(G,) 4H] -> [L, (G,) B, H] and [(G,) B, H].
  """
  w_ih, w_hh, bias = weights
  # one product a step, [x, h] @ w, not two; nor x @ w_ih for all steps at once: XLA makes slow
  # code of gates that are sliced out of a large array (three times as slow on a CPU)
  w = jnp.concatenate([w_ih, w_hh], -2)
  if _PLAIN.get():
    return scan.plain(x, valid, w, bias, reverse)
  return _in_chunks(x, valid, w, bias, kernel.LSTM, reverse)


def _in_chunks(x, valid, w, bias, cell, reverse):
  """`_chunked`, x [L, (G,) B, D] -> h after each step, [L, (G,) B, H], and the final h."""
  steps = x.shape[0]
  size = _chunk_size(steps)
  padding = -steps % size  # invalid steps at the end change nothing, in either direction
  chunked = [
    jnp.pad(a, ((0, padding), *((0, 0),) * (a.ndim - 1))).reshape(-1, size, *a.shape[1:])
    for a in (x, valid)
  ]
  rows = x.ndim - 2
  chunks = parallel.by_rows(
    lambda *args: _chunked(*args, cell, reverse),
    in_axes=(rows + 1, rows + 1, None, None),
    out_axes=(rows + 1, rows - 1),
    rows=x.shape[rows],
  )
  states, final = chunks(*chunked, w, bias)
  return states.reshape(-1, *states.shape[2:])[:steps], final


def _chunk_size(steps: int) -> int:
  """Steps recomputed at once: about √L, so that chunks and their number grow alike."""
  chunks = max(round(math.sqrt(steps / 2)), 1)
  return -(-steps // chunks)


def _accelerated(dtype):
  """Whether programs may be for an accelerator, whose kernels know no float64."""
  return dtype.itemsize <= 4 and (_PORTABLE.get() or jax.default_backend() != "cpu")


def _scans(cell, dtype):
  """Whether the loop is `scan`'s: it knows LSTMs alone, and sums up in the dtype of the weights."""
  return cell is kernel.LSTM and dtype.itemsize >= 4


def _unskipped(run, *args, skip=False, **options):
  """`run`, which skips nothing anyway."""
  del skip
  return run(*args, **options)


def _size(w, gates=4):
  """H and dtype of weights [..., gates * H]."""
  return w.shape[-1] // gates, w.dtype


def _by_platform(loop, kernel_of, hidden, dtype, *args):
  """`loop(*args)`; on accelerators `kernel_of(*args, target=…)`, unless H is too large for it."""
  # a linearization keeps its arguments alone: else long sequences take a CPU twice the memory, and
  # an eighth longer
  again = functools.partial(jax.checkpoint, prevent_cse=False)
  if not _accelerated(dtype):
    return again(loop)(*args)
  kernels = {
    platform: functools.partial(kernel_of, target=platform)
    if hidden <= widest
    else again(functools.partial(loop, skip=False))
    for platform, widest in kernel.WIDEST.items()
  }
  return jax.lax.platform_dependent(*args, default=again(loop), **kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(x, valid, w, bias, cell, reverse):
  """x [N, T, (G,) B, D] in chunks of T steps -> h after each step, and the final h."""
  return _chunked_fwd(x, valid, w, bias, cell, reverse)[0]


def _chunked_fwd(x, valid, w, bias, cell, reverse):
  by_cell = functools.partial(kernel.forward, cell)
  loop = scan.forward if _scans(cell, w.dtype) else functools.partial(_unskipped, by_cell)
  loop, of_kernel = (functools.partial(run, reverse=reverse) for run in (loop, by_cell))
  *states, final = _by_platform(loop, of_kernel, *_size(w), x, valid, w, bias)
  return (states[0], final), (x, valid, w, bias, *states)


def _chunked_bwd(cell, reverse, kept, cotangents):
  by_cell = functools.partial(kernel.backward, cell)
  loop = scan.backward if _scans(cell, kept[2].dtype) else functools.partial(_unskipped, by_cell)
  loop, of_kernel = (functools.partial(run, reverse=reverse) for run in (loop, by_cell))
  d_x, d_w, d_bias = _by_platform(loop, of_kernel, *_size(kept[2]), *kept, *cotangents)
  return d_x, None, d_w, d_bias


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
