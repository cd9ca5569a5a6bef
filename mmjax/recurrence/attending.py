"""A decoder that attends at each step, MCTN's: a loop, or on accelerators one kernel.

Each step asks what it finds in the source, with the state before it; from that and from what it is
given follow the gates of two LSTMs, which both start at zero, thus without forget gates and without
weights of the state. Their outputs, added up, are the state.

The kernel is a `sweep` of `step`, the states of the source beside it. Its backward pass sweeps the
step's own derivative by the state; that yields the gradient for each state, from which the steps,
no longer waiting for one another, give all other gradients at once. B is padded to whole tiles, and
by zeros H and the source's length to powers of two.
"""

import jax
import jax.numpy as jnp

from mmjax.recurrence.kernel import columns, times
from mmjax.recurrence.sweep import LEAST, Sweep, sweep

Array = jax.Array

LONGEST, WIDEST = 64, 32  # source and H: a tile of rows has all of it in registers, or in VMEM
GATES = 6  # input, cell and output of both directions
CHUNK = 16  # steps of a TPU's block
UNSEEN = -1e30  # in place of the energy of a step that must not be attended to
BEYOND = -2e30  # of one that does not exist


def fits(length: int, hidden: int) -> bool:
  """Whether there is a kernel for a source of that length and that H."""
  return length <= LONGEST and hidden <= WIDEST


def plain(given, states, keys, allowed, state, w_query, v, w_context):
  """A plain scan; see `recurrence.attend_and_decode`."""
  size = state.shape[-1]

  def step(state, given):
    energy = (jnp.tanh((state @ w_query)[:, None] + keys) @ v)[..., 0]
    energy = jnp.where(allowed, energy, jnp.finfo(energy.dtype).min)
    context = jnp.einsum("bl,blh->bh", jax.nn.softmax(energy, -1), states)
    gates = (given + context @ w_context).reshape(-1, 2, 4, size)
    i, _, g, o = (gates[:, :, n] for n in range(4))
    state = (jax.nn.sigmoid(o) * jnp.tanh(jax.nn.sigmoid(i) * jnp.tanh(g))).sum(1)
    return state, (state, context)

  return jax.lax.scan(step, state, given)[1]


def by_kernel(run, given, states, keys, allowed, state, w_query, v, w_context):
  """As `plain`, by `run`, which computes what `forward` does; sums are in float32 at least."""
  steps, (batch, hidden) = given.shape[0], state.shape
  dtype = state.dtype if state.dtype.itemsize > 4 else jnp.float32
  more, longer = -batch % LEAST, _power(states.shape[1]) - states.shape[1]

  def without_forget(a):
    a = a.reshape(*a.shape[:-1], 2, 4 * hidden)
    a = jnp.concatenate([a[..., :hidden], a[..., 2 * hidden :]], -1)
    return columns(a.reshape(*a.shape[:-2], GATES * hidden), GATES)

  def rows(a, *others):  # [B, …], zeros in what is added
    return jnp.pad(a.astype(dtype), ((0, more), *others, *((0, 0),) * (a.ndim - 1 - len(others))))

  energy = jnp.where(jnp.broadcast_to(allowed, states.shape[:2]), 0.0, UNSEEN)
  energy = jnp.pad(rows(energy), ((0, 0), (0, longer)), constant_values=BEYOND)[..., None]
  source = [columns(rows(a, (0, longer)), 1) for a in (keys, states)]
  of_energy = jnp.broadcast_to(v[:, 0], state.shape)
  of_energy, state = (columns(rows(a), 1) for a in (of_energy, state))
  given = without_forget(given).astype(dtype)
  given = jnp.pad(given, ((0, 0), (0, more), (0, 0)))
  below = (0, state.shape[-1] - hidden), (0, 0)
  weights = [jnp.pad(a, below) for a in (columns(w_query, 1), without_forget(w_context))]
  found = run(weights, given, state, [*source, energy, of_energy])
  return tuple(a[:steps, :batch, :hidden].astype(w_query.dtype) for a in found)


def _power(size):
  return max(LEAST, 1 << (size - 1).bit_length())


def step(weights, state, given, keys, states, energy, of_energy):
  """A step: the state after it, and what it found in the source, [B, H] each.

  Args:
    weights: ([H, H],) of the query, and `GATES` of [H, H] of what was found.
    state: [B, H] before the step.
    given: `GATES` of [B, H].
    keys, states: [B, L, H] of the source.
    energy: [B, L, 1], 0, `UNSEEN` or `BEYOND`.
    of_energy: [B, H], the same in all rows.
  """
  (w_query,), w_context = weights
  query = jnp.tanh(times(state, w_query)[:, None] + keys)
  found = (query * of_energy[:, None]).sum(2, keepdims=True)
  energy = jnp.where(energy > UNSEEN / 2, found, energy)
  attention = jnp.exp(energy - jax.lax.stop_gradient(energy.max(1, keepdims=True)))
  attention = attention / attention.sum(1, keepdims=True)
  context = (attention * states).sum(1)
  gates = [a + times(context, w) for a, w in zip(given, w_context, strict=True)]
  i, g, o = (gates[n::3] for n in range(3))
  ahead, back = (
    jax.nn.sigmoid(o[n]) * jnp.tanh(jax.nn.sigmoid(i[n]) * jnp.tanh(g[n])) for n in range(2)
  )
  return ahead + back, context


def decoder_forward(weights, carry, inputs, *source):
  """The step of a sweep, see `Sweep`; inputs: what is given, and at first the state to begin at."""
  given, (start,) = inputs
  state, context = step(weights, carry[0] + start, given, *source)
  return (state,), [(state, context)]


def decoder_backward(weights, carry, inputs, *source):
  """The gradient for the state after each step; inputs: given, the state before, and gradients."""
  given, (before,), (d_after, d_context) = inputs
  d_after = carry[0] + d_after
  _, pull = jax.vjp(lambda state: step(weights, state, given, *source), before)
  return pull((d_after, d_context)), [(d_after,)]


def forward(weights, given, state, source, *, target="loop", interpret=False):
  """Runs the decoder.

  Args:
    weights: [H, H] and [H, GATES * H].
    given: [M, B, GATES * H].
    state: [B, H] to begin at.
    source: keys, states, energy and of_energy, see `step`.
    target, interpret: see `Sweep`.

  Returns:
    The state after each step and what was found, [M, B, H] each.
  """
  start = jnp.pad(state[None], ((0, len(given) - 1), (0, 0), (0, 0)))
  found = _sweep(decoder_forward, 2, False, target, interpret, weights, [given, start], source)
  return tuple(jnp.split(found, 2, -1))


def backward(weights, given, state, source, after, *gradients, target="loop", interpret=False):
  """The gradients for the arguments of `forward`, given its first result and gradients for both."""
  d_after, d_context = gradients
  before = jnp.concatenate([state[None], after[:-1]])
  inputs = [given, before, jnp.concatenate([d_after, d_context], -1)]
  d_after = _sweep(decoder_backward, 1, True, target, interpret, weights, inputs, source)

  def at_once(weights, before, given, source):
    weights, given = ([_planes(a) for a in weights], _planes(given))
    return jax.vmap(step, (None, 0, 0, *(None,) * len(source)))(weights, before, given, *source)

  _, pull = jax.vjp(at_once, weights, before, given, source)
  d_weights, d_before, d_given, d_source = pull((d_after, d_context))
  return d_weights, d_given, d_before[0], d_source


def _planes(a):
  """[..., planes * H] as planes; H is that of a weight's rows, or of `GATES` planes."""
  width = a.shape[0] if a.ndim == 2 else a.shape[-1] // GATES
  return tuple(jnp.split(a, a.shape[-1] // width, -1))


def _sweep(step, planes, turned, target, interpret, weights, inputs, source):
  """`sweep` in one direction: [M, B, planes * H] each -> the one output."""
  steps = inputs[0].shape[0]
  chunk = min(steps, CHUNK)
  padding = -steps % chunk  # steps at the end, whose gradients are zero
  inputs = [jnp.pad(a, ((0, padding), (0, 0), (0, 0)))[None] for a in inputs]
  how = Sweep(step, 1, ((planes, inputs[0].dtype),), (turned,), chunk, target, interpret)
  weights, source = ([a[None] for a in arrays] for arrays in (weights, source))
  return sweep(how, weights, inputs, source)[0][0, :steps]
