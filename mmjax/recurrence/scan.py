"""The LSTM's recurrence as a loop, with a backward pass of its own.

The derivative of a plain `lax.scan` keeps every gate of every step and adds up the weights'
gradients step by step. Here the forward pass keeps the states alone; the backward pass recomputes
the gates of a chunk of steps in one matrix product and gets the weights' gradients of a chunk in
another, so that only dgates @ w_hhᵀ waits its turn. Chunks that are padding in all rows are
skipped, but not on an accelerator: a GPU would wait for its host at each condition. It is ordinary
differentiable code: second derivatives go through it, and recompute one chunk at a time.

Shapes: x [N, T, (G,) B, D], valid [N, T, (G,) B, 1] in N chunks of T steps; w [(G,) D + H, 4H],
bias [(G,) 4H]; G are LSTMs that run at once.
"""

import jax
import jax.numpy as jnp
import numpy as np


def plain(x, valid, w, bias, reverse):
  """A plain scan, x [L, B, D] -> h after each step and the final h."""
  (final, _), (states, _) = _scan(_start(x, w), x, valid, w, bias, reverse)
  return states, final


def _start(x, w):
  zero = jnp.zeros((*x.shape[-w.ndim : -1], w.shape[-1] // 4), x.dtype)
  return zero, zero


def _gates(x, h, w, bias):
  """σ, σ, tanh, σ of x [..., B, D] and h [..., B, H], as one tanh: σ(x) = (1 + tanh(x / 2)) / 2.

  Four functions of four slices vectorize badly on a CPU where H is small.
  """
  gates = jnp.concatenate([x, h], -1) @ w
  gates = gates + jax.lax.broadcast_to_rank(bias[..., None, :], gates.ndim)
  half = np.array([[0.5], [0.5], [1.0], [0.5]], gates.dtype)
  scale = np.repeat(half, gates.shape[-1] // 4, 1).ravel()
  scale, rest = (jax.lax.broadcast_to_rank(a, gates.ndim) for a in (scale, 1 - scale))
  return jnp.split(jnp.tanh(gates * scale) * scale + rest, 4, axis=-1)


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


def _unless_padding(run, rest, skip):
  """A chunk `(carry, (x, valid, …))`, recomputed when differentiated: `rest` if all is padding."""

  @jax.checkpoint
  def chunk(carry, inputs):
    return jax.lax.cond(inputs[1].any(), run, rest, carry, inputs) if skip else run(carry, inputs)

  return chunk


def forward(x, valid, w, bias, reverse, skip=True):
  """-> h and c after each step, [N, T, (G,) B, H] each, and the final h, [(G,) B, H]."""

  def run(carry, inputs):
    x, valid = inputs
    return _scan(carry, x, valid, w, bias, reverse)

  def rest(carry, inputs):
    return carry, jax.tree.map(lambda a: jnp.broadcast_to(a, (x.shape[1], *a.shape)), carry)

  chunk = _unless_padding(run, rest, skip)
  (final, _), (h, c) = jax.lax.scan(chunk, _start(x, w), (x, valid), reverse=reverse)
  return h, c, final


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


def backward(x, valid, w, bias, h, c, d_states, d_final, reverse, skip=True):
  """The gradients for x, w and bias, given those for h after each step and for the final h."""
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
  chunk = _unless_padding(run, rest, skip)
  (_, (d_w, d_bias)), d_x = jax.lax.scan(chunk, start, inputs, reverse=not reverse)
  return d_x, d_w, d_bias


def gru(x, valid, w_ih, w_hh, b_ih, b_hh, reverse):
  """A plain scan, x [B, L, D] -> outputs [B, L, H]; see `recurrence.gru`."""

  def step(h, inputs):
    projected, valid = inputs
    r, z, n = jnp.split(projected, 3, -1)
    h_r, h_z, h_n = jnp.split(h @ w_hh + b_hh[None], 3, -1)
    z = jax.nn.sigmoid(z + h_z)
    new = (1 - z) * jnp.tanh(n + jax.nn.sigmoid(r + h_r) * h_n) + z * h
    valid = valid[:, None]
    return jnp.where(valid, new, h), jnp.where(valid, new, 0)

  projected = (x @ w_ih + b_ih[None, None]).swapaxes(0, 1)
  zero = jnp.zeros((x.shape[0], w_hh.shape[0]), projected.dtype)
  return jax.lax.scan(step, zero, (projected, valid.T), reverse=reverse)[1].swapaxes(0, 1)
