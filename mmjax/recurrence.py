"""The LSTM's recurrence, with a backward pass of its own.

The derivative of a plain `lax.scan` keeps every gate of every step and adds up the weights'
gradients step by step. Here the forward pass keeps the states alone; the backward pass recomputes
the gates of a chunk of steps in one matrix product and gets the weights' gradients of a chunk in
another, so that only dgates @ w_hhᵀ waits its turn. It is ordinary differentiable code: second
derivatives go through it, and recompute one chunk at a time.

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

from mmjax import types

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
  """Runs an LSTM in each direction, side by side: one loop over wide matrices, not two.

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
  hidden = forward[1].shape[0]
  # the backward sequence begins with padding, which keeps the state at zero
  both = jnp.concatenate([x, x[::-1]], -1)
  seen = jnp.stack([valid, valid[::-1]], -1)
  weights = tuple(_beside(*pair) for pair in zip(forward, backward, strict=True))
  states, final = _run(both, jnp.repeat(seen, hidden, -1), weights, False)
  states = states[:, :, :hidden], states[::-1, :, hidden:]
  outputs = tuple(jnp.where(valid[:, :, None], s, 0) for s in states)
  return outputs, (final[:, :hidden], final[:, hidden:])


def _beside(one: Array, other: Array) -> Array:
  """Block-diagonal weights [D₁ + D₂, 4 (H₁ + H₂)], gate by gate; biases side by side."""
  gates = [w.reshape(*w.shape[:-1], 4, -1) for w in (one, other)]
  if one.ndim == 1:
    return jnp.concatenate(gates, -1).reshape(-1)
  (rows, _, width), (more, _, wider) = (w.shape for w in gates)
  upper = jnp.pad(gates[0], ((0, more), (0, 0), (0, wider)))
  lower = jnp.pad(gates[1], ((rows, 0), (0, 0), (width, 0)))
  return (upper + lower).reshape(rows + more, -1)


def _run(x, valid, weights, reverse):
  """h [L, B, H] after each step, and the final h; valid broadcasts against [L, B, H]."""
  if _PLAIN.get():
    (final, _), (states, _) = _scan(_start(x, weights[1]), x, valid, weights, reverse)
    return states, final
  steps = x.shape[0]
  size = _chunk_size(steps)
  padding = -steps % size  # invalid steps at the end change nothing, in either direction
  chunked = [
    jnp.pad(a, ((0, padding), *((0, 0),) * (a.ndim - 1))).reshape(-1, size, *a.shape[1:])
    for a in (x, valid)
  ]
  states, final = _chunked(*chunked, weights, reverse)
  return states.reshape(-1, *states.shape[2:])[:steps], final


def _chunk_size(steps: int) -> int:
  """Steps recomputed at once: about √L, so that chunks and their number grow alike."""
  chunks = max(round(math.sqrt(steps / 2)), 1)
  return -(-steps // chunks)


def _start(x, w_hh):
  zero = jnp.zeros((x.shape[-2], w_hh.shape[0]), jnp.result_type(x, w_hh))
  return zero, zero


def _activate(gates):
  """σ, σ, tanh, σ of the gates [..., 4H], as one tanh over all: σ(x) = (1 + tanh(x / 2)) / 2.

  Four functions of four slices vectorize badly on a CPU where H is small.
  """
  half = np.array([[0.5], [0.5], [1.0], [0.5]], gates.dtype)
  scale = np.repeat(half, gates.shape[-1] // 4, 1).ravel()
  return jnp.split(jnp.tanh(gates * scale) * scale + (1 - scale), 4, axis=-1)


def _scan(carry, x, valid, weights, reverse):
  """(h, c), x [T, B, D] -> the last (h, c), and [T, B, H] (h, c) after each step."""
  w_ih, w_hh, bias = weights

  def step(carry, inputs):
    h, c = carry
    x, valid = inputs
    # x @ w_ih in here, not for all steps at once: XLA makes slow code of gates that are sliced
    # out of a large array (three times as slow on a CPU)
    i, f, g, o = _activate(x @ w_ih + h @ w_hh + bias)
    c_next = f * c + i * g
    h_next = o * jnp.tanh(c_next)
    carry = jnp.where(valid, h_next, h), jnp.where(valid, c_next, c)
    return carry, carry

  return jax.lax.scan(step, carry, (x, valid), reverse=reverse)


def _forward(x, valid, weights, reverse):
  """x [N, T, B, D] -> (h, c) after each step, [N, T, B, H], and the final (h, c)."""

  @jax.checkpoint
  def chunk(carry, inputs):
    return _scan(carry, *inputs, weights, reverse)

  final, states = jax.lax.scan(chunk, _start(x, weights[1]), (x, valid), reverse=reverse)
  return states, final


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunked(x, valid, weights, reverse):
  """x [N, T, B, D], valid [N, T, B, H or 1] -> h [N, T, B, H] after each step, final h [B, H]."""
  (h, _), (final, _) = _forward(x, valid, weights, reverse)
  return h, final


def _chunked_fwd(x, valid, weights, reverse):
  (h, c), (final, _) = _forward(x, valid, weights, reverse)
  return (h, final), (x, valid, weights, h, c)


def _before(states, reverse):
  """The states before each step from those after it."""
  flat = states.reshape(-1, *states.shape[2:])
  zero = jnp.zeros_like(flat[:1])
  moved = (flat[1:], zero) if reverse else (zero, flat[:-1])
  return jnp.concatenate(moved).reshape(states.shape)


def _chunked_bwd(reverse, kept, cotangents):
  x, valid, weights, h, c = kept
  w_ih, w_hh, bias = weights
  d_states, d_final = cotangents

  @jax.checkpoint
  def chunk(carry, inputs):
    x, valid, h, c, d_states = inputs  # h, c: before each step
    i, f, g, o = _activate(x @ w_ih + h @ w_hh + bias)
    tanh_c = jnp.tanh(f * c + i * g)
    factors = (  # an array each: slices of a common one would make slow code
      g * i * (1 - i), c * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o),
      o * (1 - tanh_c * tanh_c),
    )  # fmt: skip
    factors = tuple(jnp.where(valid, factor, 0) for factor in factors)

    def step(carry, inputs):
      d_h, d_c = carry
      d_state, i_by_c, f_by_c, g_by_c, o_by_h, c_by_h, c_by_c, h_by_h = inputs
      d_h = d_h + d_state
      d_c = d_c + d_h * c_by_h
      d_gates = jnp.concatenate([d_c * i_by_c, d_c * f_by_c, d_c * g_by_c, d_h * o_by_h], -1)
      return (d_gates @ w_hh.T + d_h * h_by_h, d_c * c_by_c), d_gates

    state, d_weights = carry
    kept = (jnp.where(valid, f, 1), jnp.where(valid, 0, jnp.ones_like(f)))
    state, d_gates = jax.lax.scan(step, state, (d_states, *factors, *kept), reverse=not reverse)
    flat = d_gates.reshape(-1, d_gates.shape[-1])
    now = (
      x.reshape(-1, x.shape[-1]).T @ flat,
      h.reshape(-1, h.shape[-1]).T @ flat,
      flat.sum(0),
    )
    return (state, jax.tree.map(jnp.add, d_weights, now)), d_gates @ w_ih.T

  zeros = jax.tree.map(jnp.zeros_like, weights)
  start = ((d_final, jnp.zeros_like(d_final)), zeros)
  inputs = (x, valid, _before(h, reverse), _before(c, reverse), d_states)
  (_, d_weights), d_x = jax.lax.scan(chunk, start, inputs, reverse=not reverse)
  return d_x, None, d_weights


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
