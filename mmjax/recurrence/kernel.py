"""A whole LSTM or GRU as one kernel, for accelerators: forward, backward, and the tangents of both.

On a GPU a loop over the steps launches several kernels a step, which takes longer than what they
compute; on a TPU it starves the matrix unit. Here the loop is inside of a kernel (`sweep`). What
does not wait for the step before it stays outside, as one product for all steps: the gates' share
of x before the loop, the gradients of x and of the weights after it.

Both passes are sweeps, and so are the tangents of both, all that second order in mixed mode needs.
B is padded to whole tiles and, by zeros in the weights, H to a power of two.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmjax.recurrence.sweep import LEAST, Planes, Sweep, sweep

Array = jax.Array

# The largest H of a kernel: on a GPU weights come from cache in each step; on a TPU all 4H² lie in
# VMEM.
WIDEST = {"cuda": 256, "tpu": 256}
PADDING = -1e30  # in place of a gate's sum: this entry keeps its state


class Cell(NamedTuple):
  """A recurrence.

  Attributes:
    forward: the step, see `Sweep`: its weights are of the state before, its inputs the gates' sums
      without that state.
    backward: the step of the gradient for the gates' sums: its weights are those of `forward`, each
      transposed, its inputs those sums, the last of the states before the step, and the gradient
      for h.
    states: the number of planes that are its state, h first.
  """

  forward: Callable[..., Any]
  backward: Callable[..., Any]
  states: int


def _act(gates: Planes) -> Planes:
  i, f, g, o = gates
  return jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)


def times(a: Array, w: Array) -> Array:
  """a @ w in the dtype of the weights, summed up in that of a."""
  axes = (((1,), (0,)), ((), ()))
  return jax.lax.dot_general(a.astype(w.dtype), w, axes, preferred_element_type=a.dtype)


def lstm_forward(weights, carry, inputs):
  """(h, c) before the step and the gates' sums without h -> (h, c), an output too."""
  (w,), (h, c), (gates,) = weights, carry, inputs
  valid = gates[0] > PADDING / 2
  i, f, g, o = _act(tuple(a + times(h, w_q) for a, w_q in zip(gates, w, strict=True)))
  c_next = f * c + i * g
  h_next = o * jnp.tanh(c_next)
  carry = jnp.where(valid, h_next, h), jnp.where(valid, c_next, c)
  return carry, [carry]


def lstm_backward(weights, carry, inputs):
  """The gradient for the gates' sums, given those sums, c before the step, and h's gradient."""
  (w,), (d_h, d_c), (gates, (c,), (d_state,)) = weights, carry, inputs
  valid = gates[0] > PADDING / 2
  i, f, g, o = _act(gates)
  tanh_c = jnp.tanh(f * c + i * g)
  d_h = d_h + d_state
  d_next = d_c + d_h * o * (1 - tanh_c * tanh_c)
  d_gates = (
    d_next * g * i * (1 - i),
    d_next * c * f * (1 - f),
    d_next * i * (1 - g * g),
    d_h * tanh_c * o * (1 - o),
  )
  d_gates = tuple(jnp.where(valid, d, 0) for d in d_gates)
  i_back, f_back, g_back, o_back = (times(d, w_q) for d, w_q in zip(d_gates, w, strict=True))
  back = i_back + f_back + g_back + o_back
  return (jnp.where(valid, back, d_h), jnp.where(valid, d_next * f, d_c)), [d_gates]


def gru_forward(weights, carry, inputs):
  """The gates' sums are of r, z, and the two parts of n, of x and of h."""
  (w,), (h,), (gates,) = weights, carry, inputs
  valid = gates[0] > PADDING / 2
  r, z, x_n, h_n = (a + times(h, w_q) for a, w_q in zip(gates, w, strict=True))
  z = jax.nn.sigmoid(z)
  h_next = (1 - z) * jnp.tanh(x_n + jax.nn.sigmoid(r) * h_n) + z * h
  carry = (jnp.where(valid, h_next, h),)
  return carry, [carry]


def gru_backward(weights, carry, inputs):
  """As `lstm_backward`."""
  (w,), (d_h,), ((r, z, x_n, h_n), (h,), (d_state,)) = weights, carry, inputs
  valid = r > PADDING / 2
  r, z = jax.nn.sigmoid(r), jax.nn.sigmoid(z)
  n = jnp.tanh(x_n + r * h_n)
  d_h = d_h + d_state
  d_n = d_h * (1 - z) * (1 - n * n)
  d_gates = d_n * h_n * r * (1 - r), d_h * (h - n) * z * (1 - z), d_n, d_n * r
  d_gates = tuple(jnp.where(valid, d, 0) for d in d_gates)
  r_back, z_back, _, n_back = (times(d, w_q) for d, w_q in zip(d_gates, w, strict=True))
  return (jnp.where(valid, r_back + z_back + n_back + d_h * z, d_h),), [d_gates]


LSTM = Cell(lstm_forward, lstm_backward, 2)
GRU = Cell(gru_forward, gru_backward, 1)


def forward(cell, x, valid, w, bias, *, reverse, target="loop", interpret=False):
  """Runs a recurrence, or two in two directions.

  Args:
    cell: `LSTM` or `GRU`.
    x: [N, T, (G,) B, D], N chunks of T steps. Both directions find the steps in their order.
    valid: [N, T, (G,) B, 1].
    w: [(G,) D + H, 4H].
    bias: [(G,) 4H].
    reverse: whether a single one runs from the last step to the first. Of two, the second does.
    target, interpret: see `Sweep`.

  Returns:
    The states after each step, [N, T, (G,) B, H] each, and the final h, [(G,) B, H].
  """
  (_, chunk, *_, batch, width), hidden = x.shape, w.shape[-1] // 4
  shape = *x.shape[:-1], hidden
  backwards, (w, bias) = _directions(reverse, w, bias[..., None, :])
  x, valid = _rows(len(backwards), x, valid)
  w = columns(w)
  gates = _sums(jnp.where(valid, x, 0), valid, w[:, :width], columns(bias))
  how = Sweep(
    cell.forward, cell.states, ((cell.states, w.dtype),), backwards, chunk, target, interpret
  )
  (states,) = sweep(how, [_square(w, width, hidden)], [gates])
  states = [part[:, :, :batch, :hidden] for part in jnp.split(states, cell.states, -1)]
  final = [states[0][g, 0 if turned else -1] for g, turned in enumerate(backwards)]
  final = jnp.stack(final).reshape(*shape[2:])
  return *(a.swapaxes(0, 1).reshape(shape) for a in states), final


def backward(cell, x, valid, w, bias, *states, reverse, target="loop", interpret=False):
  """The gradients for x, w and bias, given those for h after each step and for the final h.

  Arguments are those and the results of `forward`, and gradients for its results.
  """
  *states, d_states, d_final = states
  given, (_, chunk, *_, batch, width), hidden = (x, w, bias), x.shape, w.shape[-1] // 4
  backwards, (w, bias) = _directions(reverse, w, bias[..., None, :])
  x, valid, h, last, d_states = _rows(len(backwards), x, valid, states[0], states[-1], d_states)
  w = columns(jnp.concatenate([w, bias], 1))
  # the final state is that of the last step: padding keeps it
  d_final = _rows(len(backwards), d_final[None, None])[0]
  end = [jnp.arange(h.shape[1]) == (0 if turned else h.shape[1] - 1) for turned in backwards]
  d_states = d_states + jnp.where(jnp.stack(end)[:, :, None, None], d_final, 0)
  inputs = [jnp.where(valid, x, 0), _before(h, backwards), jnp.ones_like(h[..., :1])]
  inputs = jnp.concatenate(inputs, -1)
  gates = _sums(inputs, valid, w)
  opposite = tuple(not turned for turned in backwards)
  how = Sweep(cell.backward, cell.states, ((4, w.dtype),), opposite, chunk, target, interpret)
  wide = [columns(a.astype(gates.dtype), 1) for a in (_before(last, backwards), d_states)]
  (d_gates,) = sweep(how, [_transposed(_square(w, width, hidden))], [gates, *wide])
  d_x = jnp.einsum("glbm,gkm->glbk", d_gates, w[:, :width])[:, :, :batch].swapaxes(0, 1)
  d_w = jnp.einsum("glbk,glbm->gkm", inputs, d_gates, preferred_element_type=gates.dtype)
  d_w = d_w.reshape(*d_w.shape[:2], 4, -1)[..., :hidden].reshape(*d_w.shape[:2], 4 * hidden)
  found = d_x, d_w[:, :-1], d_w[:, -1]
  return tuple(d.reshape(a.shape).astype(a.dtype) for d, a in zip(found, given, strict=True))


def _directions(reverse, *weights):
  """Of each direction G whether it runs backwards, and weights [(G,) K, M] as [G, K, M]."""
  if weights[0].ndim == 2:
    return (reverse,), [w[None] for w in weights]
  return (False, True), weights


def _rows(directions, *arrays):
  """[N, T, (G,) B, K] each -> [G, L, B', K], zero in what is added."""
  shaped = [a.reshape(-1, directions, *a.shape[-2:]).swapaxes(0, 1) for a in arrays]
  padding = (0, 0), (0, 0), (0, -shaped[0].shape[2] % LEAST), (0, 0)
  return [jnp.pad(a, padding) for a in shaped]


def columns(a, planes=4):
  """[..., planes * H] -> [..., planes * H'], zero in what is added."""
  width = a.shape[-1] // planes
  wide = max(LEAST, 1 << (width - 1).bit_length())
  if wide == width:
    return a
  a = a.reshape(*a.shape[:-1], planes, width)
  padded = jnp.pad(a, (*((0, 0),) * (a.ndim - 1), (0, wide - width)))
  return padded.reshape(*a.shape[:-2], planes * wide)


def _square(w, width, hidden):
  """[G, D + H (+ 1), 4H'] -> what h is multiplied by, [G, H', 4H']."""
  w = w[:, width : width + hidden]
  return jnp.pad(w, ((0, 0), (0, w.shape[-1] // 4 - hidden), (0, 0)))


def _transposed(w):
  """[G, H', 4H'], each of the four on its own."""
  return w.reshape(*w.shape[:2], 4, -1).swapaxes(1, 3).reshape(w.shape)


def _before(states, backwards):
  """The states before each step from those after it, [G, L, B, H]."""
  zero = jnp.zeros_like(states[0, :1])
  moved = [
    jnp.concatenate([a[1:], zero] if turned else [zero, a[:-1]])
    for a, turned in zip(states, backwards, strict=True)
  ]
  return jnp.stack(moved)


def _sums(inputs, valid, w, bias=None):
  """The gates' sums [G, L, B, 4H], summed up in float32 at least; PADDING where there is."""
  dtype = w.dtype if w.dtype.itemsize > 4 else jnp.float32
  sums = jnp.einsum("glbk,gkm->glbm", inputs, w, preferred_element_type=dtype)
  if bias is not None:
    sums = sums + bias.astype(dtype)[:, None]
  return jnp.where(valid, sums, PADDING)
