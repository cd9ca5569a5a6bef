"""The LSTM's recurrence, with a backward pass of its own.

The derivative of a plain `lax.scan` keeps every gate of every step and adds up the weights'
gradients step by step. Here the forward pass keeps the states alone; the backward pass recomputes
the gates of a chunk of steps in one matrix product and gets the weights' gradients of a chunk in
another, so that only dgates @ w_hhᵀ waits its turn. Chunks that are padding in all rows are
skipped. It is ordinary differentiable code: second derivatives go through it, and recompute one
chunk at a time.

`with plain():` traces the plain scan instead, to compare.
"""

import contextlib
import contextvars
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mmjax import parallel, types

Array = types.Array
Weights = tuple[Array, Array, Array]

_PLAIN = contextvars.ContextVar("mmjax_plain_recurrence", default=False)


@contextlib.contextmanager
def plain():
  """What is traced inside runs recurrences as plain scans, differentiated by JAX itself."""
  token = _PLAIN.set(True)
  try:
    yield
  finally:
    _PLAIN.reset(token)


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
  states, final = _run(x, valid[:, :, None], (w_ih, w_hh, bias), reverse)
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
    found = lstm(x, valid, *forward), lstm(x, valid, *backward, reverse=True)
    return tuple(zip(*found, strict=True))
  # the longest sequence, turned round, begins at once: chunks of padding alone cost nothing
  last = x.shape[0] - jnp.argmax(valid.any(1)[::-1])
  turn = lambda a: jnp.roll(a[::-1], last, 0)  # noqa: E731 - its own inverse
  both, seen = (jnp.stack([a, turn(a)], 1) for a in (x, valid[:, :, None]))
  weights = tuple(map(jnp.stack, zip(forward, backward, strict=True)))
  states, final = _run(both, seen, weights, False)
  outputs = states[:, 0], turn(states[:, 1])
  return tuple(jnp.where(valid[:, :, None], s, 0) for s in outputs), tuple(final)


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
    (final, _), (states, _) = _scan(_start(x, w), x, valid, w, bias, reverse)
    return states, final
  steps = x.shape[0]
  size = _chunk_size(steps)
  padding = -steps % size  # invalid steps at the end change nothing, in either direction
  chunked = [
    jnp.pad(a, ((0, padding), *((0, 0),) * (a.ndim - 1))).reshape(-1, size, *a.shape[1:])
    for a in (x, valid)
  ]
  rows = x.ndim - 2
  chunks = parallel.by_rows(
    lambda *args: _chunked(*args, reverse),
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


def _start(x, w):
  zero = jnp.zeros((*x.shape[-w.ndim : -1], w.shape[-1] // 4), jnp.result_type(x, w))
  return zero, zero


def _gates(x, h, w, bias):
  """σ, σ, tanh, σ of x [..., B, D] and h [..., B, H], as one tanh: σ(x) = (1 + tanh(x / 2)) / 2.

  Four functions of four slices vectorize badly on a CPU where H is small.
  """
  gates = jnp.concatenate([x, h], -1) @ w + bias[..., None, :]
  half = np.array([[0.5], [0.5], [1.0], [0.5]], gates.dtype)
  scale = np.repeat(half, gates.shape[-1] // 4, 1).ravel()
  return jnp.split(jnp.tanh(gates * scale) * scale + (1 - scale), 4, axis=-1)


def _scan(carry, x, valid, w, bias, reverse):
  """(h, c), x [T, (G,) B, D] -> the last (h, c), and (h, c) after each step."""

  def step(carry, inputs):
    h, c = carry
    x, valid = inputs
    i, f, g, o = _gates(x, h, w, bias)
    c_next = f * c + i * g
    h_next = o * jnp.tanh(c_next)
    carry = jnp.where(valid, h_next, h), jnp.where(valid, c_next, c)
    return carry, carry

  return jax.lax.scan(step, carry, (x, valid), reverse=reverse)


def _unless_padding(run, rest):
  """A chunk `(carry, (x, valid, …))`, recomputed when differentiated: `rest` if all is padding."""

  @jax.checkpoint
  def chunk(carry, inputs):
    return jax.lax.cond(inputs[1].any(), run, rest, carry, inputs)

  return chunk


def _forward(x, valid, w, bias, reverse):
  """x [N, T, (G,) B, D] -> (h, c) after each step, [N, T, (G,) B, H], and the final (h, c)."""

  def run(carry, inputs):
    return _scan(carry, *inputs, w, bias, reverse)

  def rest(carry, inputs):
    return carry, jax.tree.map(lambda a: jnp.broadcast_to(a, (x.shape[1], *a.shape)), carry)

  chunk = _unless_padding(run, rest)
  final, states = jax.lax.scan(chunk, _start(x, w), (x, valid), reverse=reverse)
  return states, final


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(x, valid, w, bias, reverse):
  """x [N, T, (G,) B, D] in chunks of T steps -> h after each step, and the final h."""
  (h, _), (final, _) = _forward(x, valid, w, bias, reverse)
  return h, final


def _chunked_fwd(x, valid, w, bias, reverse):
  (h, c), (final, _) = _forward(x, valid, w, bias, reverse)
  return (h, final), (x, valid, w, bias, h, c)


def _before(states, reverse):
  """The states before each step from those after it."""
  flat = states.reshape(-1, *states.shape[2:])
  zero = jnp.zeros_like(flat[:1])
  moved = (flat[1:], zero) if reverse else (zero, flat[:-1])
  return jnp.concatenate(moved).reshape(states.shape)


def _outer(x, d):
  """[T, (G,) B, K], [T, (G,) B, M] -> [(G,) K, M], without a transposed copy."""
  if x.ndim == 4:
    return jnp.stack([_outer(x[:, g], d[:, g]) for g in range(x.shape[1])])
  return x.reshape(-1, x.shape[-1]).T @ d.reshape(-1, d.shape[-1])


def _chunked_bwd(reverse, kept, cotangents):
  x, valid, w, bias, h, c = kept
  d_states, d_final = cotangents
  back_to_x, back_to_h = jnp.split(w.mT, [x.shape[-1]], axis=-1)

  def run(carry, inputs):
    x, valid, h, c, d_states = inputs  # h, c: before each step
    i, f, g, o = _gates(x, h, w, bias)
    tanh_c = jnp.tanh(f * c + i * g)
    factors = (  # an array each: slices of a common one would make slow code
      g * i * (1 - i),
      c * f * (1 - f),
      i * (1 - g * g),
      tanh_c * o * (1 - o),
      o * (1 - tanh_c * tanh_c),
    )
    factors = tuple(jnp.where(valid, factor, 0) for factor in factors)

    def step(carry, inputs):
      d_h, d_c = carry
      d_state, i_by_c, f_by_c, g_by_c, o_by_h, c_by_h, c_by_c, h_by_h = inputs
      d_h = d_h + d_state
      d_c = d_c + d_h * c_by_h
      d_gates = jnp.concatenate([d_c * i_by_c, d_c * f_by_c, d_c * g_by_c, d_h * o_by_h], -1)
      return (d_gates @ back_to_h + d_h * h_by_h, d_c * c_by_c), d_gates

    state, d_weights = carry
    kept = (jnp.where(valid, f, 1), jnp.where(valid, 0, jnp.ones_like(f)))
    state, d_gates = jax.lax.scan(step, state, (d_states, *factors, *kept), reverse=not reverse)
    inputs = jnp.concatenate([x, h], -1)
    now = _outer(inputs, d_gates), d_gates.sum((0, -2))
    return (state, jax.tree.map(jnp.add, d_weights, now)), d_gates @ back_to_x

  def rest(carry, inputs):
    (d_h, d_c), d_weights = carry
    x, *_, d_states = inputs
    return ((d_h + d_states.sum(0), d_c), d_weights), jnp.zeros_like(x)

  zeros = jax.tree.map(jnp.zeros_like, (w, bias))
  start = ((d_final, jnp.zeros_like(d_final)), zeros)
  inputs = (x, valid, _before(h, reverse), _before(c, reverse), d_states)
  chunk = _unless_padding(run, rest)
  (_, (d_w, d_bias)), d_x = jax.lax.scan(chunk, start, inputs, reverse=not reverse)
  return d_x, None, d_w, d_bias


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
