"""A whole LSTM as one kernel, for accelerators: forward, backward, and the tangents of both.

On a GPU the loop over the steps launches several kernels a step, which takes longer than what they
compute; on a TPU it starves the matrix unit. Here a Pallas kernel holds the loop. What does not
wait for the step before it stays outside, as one product for all steps: the gates' share of x
before the loop, the gradients of x and of the weights after it.

`sweep` runs any step function over a sequence:

  grid       (directions, tiles of rows, chunks of steps); `jax.vmap` adds axes of its own, for
             seeds and tasks.
  carry      in registers. Between chunks of steps, on a TPU, in scratch memory: its grid runs in
             order. On a GPU there is one chunk.
  weights    loaded once, before the loop.
  inputs and outputs   [L, G, planes, B, H], a plane being one array of the step (a gate, a state).
             On a GPU they stay in global memory and each step loads its own planes; on a TPU a chunk
             of them lies in VMEM, and the next is fetched meanwhile.

Triton takes products of at least 16 and powers of two: B is padded to tiles and H to a power of
two. A tile is as small as that on a GPU, since a batch's tiles run side by side and none waits for
another; on a TPU, whose grid runs one tile after another, it is as large as VMEM allows.

The derivative of a sweep in forward mode is a sweep, of the step's tangents. In reverse mode it is
that of a `lax.scan` of the same step: only second-order gradients that are not in mixed mode ask
for it (`backward` below is the first-order gradient, a sweep too).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

Array = jax.Array
Planes = tuple[Array, ...]  # of shape [B, H] or [H, H] each

PADDING = -1e30  # in place of a gate's sum: the step keeps the state of this entry
LEAST = 16  # rows and columns of a product
VMEM_BYTES = 10 * 2**20  # for blocks, of the 16 MiB that a TPU's compiler grants a kernel
LANES = 128
TARGETS = ("cuda", "tpu")
WIDEST = 256  # H whose weights a multiprocessor's registers, shared memory and L1 still hold


def fits(w: Array) -> bool:
  """Whether there is a kernel for weights [..., 4H]."""
  return w.dtype.itemsize <= 4 and w.shape[-1] <= 4 * WIDEST


class Sweep(NamedTuple):
  """What a kernel runs.

  Attributes:
    step: (weights, carry, inputs) -> (carry, outputs): lists of `Planes`, but for the carry, which
      is one `Planes`.
    carry: number of planes that a step hands on; zeros at first.
    outputs: number of planes of each output, and its dtype.
    backwards: of each direction G, whether it runs from the last step to the first.
    chunk: steps of a TPU's block; it divides L.
    target: "cuda" or "tpu", whose blocks and compiler are used.
    interpret: run it without a compiler, to test it.
  """

  step: Callable[..., Any]
  carry: int
  outputs: tuple[tuple[int, Any], ...]
  backwards: tuple[bool, ...]
  chunk: int
  target: str
  interpret: bool = False


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def sweep(how: Sweep, weights: Sequence[Array], inputs: Sequence[Array]) -> tuple[Array, ...]:
  """Runs a step over all steps of a sequence.

  Args:
    how: see there.
    weights: [G, planes, H, H] each.
    inputs: [L, G, planes, B, H] each; the first one's dtype is the carry's.

  Returns:
    The outputs, [L, G, planes, B, H] each.
  """
  steps, directions, _, rows, width = inputs[0].shape
  tile = _tile(how, inputs, rows, width)
  size = how.chunk if how.target == "tpu" else steps
  chunks = steps // size
  both = len(how.backwards) == 2
  backwards = lambda g: (g == 0) == how.backwards[0] if both else how.backwards[0]  # noqa: E731

  def chunk(direction, n):
    return jnp.where(backwards(direction), chunks - 1 - n, n)

  def whole(planes):
    return pl.BlockSpec((None, planes, width, width), lambda g, b, n: (g, 0, 0, 0))

  def by_step(planes):
    index = lambda g, b, n: (chunk(g, n), g, 0, b, 0)  # noqa: E731
    return pl.BlockSpec((size, None, planes, tile, width), index)

  def kernel(*refs):
    refs = iter(refs)
    take = lambda n: [next(refs) for _ in range(n)]  # noqa: E731
    w_refs, in_refs, out_refs, kept = (
      take(n) for n in (len(weights), len(inputs), len(how.outputs), how.carry * (chunks > 1))
    )
    turned = backwards(pl.program_id(0))
    loaded = [tuple(ref[q] for q in range(ref.shape[0])) for ref in w_refs]

    def body(k, carry):
      t = jnp.where(turned, size - 1 - k, k)
      now = [tuple(ref[t, q] for q in range(ref.shape[1])) for ref in in_refs]
      carry, outputs = how.step(loaded, carry, now)
      for ref, planes in zip(out_refs, outputs, strict=True):
        for q, plane in enumerate(planes):
          ref[t, q] = plane.astype(ref.dtype)
      return carry

    zero = jnp.zeros((tile, width), inputs[0].dtype)
    carry = (zero,) * how.carry
    if kept:
      carry = tuple(jnp.where(pl.program_id(2) == 0, zero, ref[...]) for ref in kept)
    carry = jax.lax.fori_loop(0, size, body, carry)
    for ref, last in zip(kept, carry, strict=False):
      ref[...] = last

  scratch = [pltpu.VMEM((tile, width), inputs[0].dtype)] * (how.carry * (chunks > 1))
  run = pl.pallas_call(
    kernel,
    grid=(directions, rows // tile, chunks),
    in_specs=[whole(w.shape[1]) for w in weights] + [by_step(x.shape[2]) for x in inputs],
    out_specs=[by_step(planes) for planes, _ in how.outputs],
    out_shape=[
      jax.ShapeDtypeStruct((steps, directions, planes, rows, width), dtype)
      for planes, dtype in how.outputs
    ],
    scratch_shapes=scratch,
    compiler_params=_compiler_params(how),
    interpret=how.interpret,
    name=how.step.__name__,
  )
  return tuple(run(*weights, *inputs))


def _tile(how, inputs, rows, width):
  """Rows of a block: see the top."""
  if how.target != "tpu":
    return LEAST
  planes = sum(x.shape[2] for x in inputs) + sum(n for n, _ in how.outputs)
  row = 2 * planes * how.chunk * max(width, LANES) * 4  # twice: one block comes as one is used
  tile = LEAST
  while rows % (2 * tile) == 0 and 2 * tile * row <= VMEM_BYTES:
    tile *= 2
  return tile


def _compiler_params(how):
  if how.target == "tpu":
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
  return plgpu.CompilerParams(num_warps=4, num_stages=1)


def loop(how: Sweep, weights: Sequence[Array], inputs: Sequence[Array]) -> tuple[Array, ...]:
  """What `sweep` computes, as a `lax.scan`."""
  split = lambda a: tuple(a[q] for q in range(a.shape[0]))  # noqa: E731

  def run(g, backwards):
    own = [split(w[g]) for w in weights]

    def step(carry, now):
      carry, outputs = how.step(own, carry, [split(x) for x in now])
      stacked = [jnp.stack(planes) for planes in outputs]
      return carry, [a.astype(dtype) for a, (_, dtype) in zip(stacked, how.outputs, strict=True)]

    zero = jnp.zeros(inputs[0].shape[-2:], inputs[0].dtype)
    rows = [x[:, g] for x in inputs]
    return jax.lax.scan(step, (zero,) * how.carry, rows, reverse=backwards)[1]

  found = [run(g, backwards) for g, backwards in enumerate(how.backwards)]
  return tuple(jnp.stack(parts, 1) for parts in zip(*found, strict=True))


def _tangent(how: Sweep) -> Sweep:
  """The sweep of tangents: of [weights, their tangents] and [inputs, their tangents]."""

  def half(parts):
    middle = len(parts) // 2
    return parts[:middle], parts[middle:]

  def step(weights, carry, inputs):
    (w, d_w), (s, d_s), (x, d_x) = map(half, (weights, carry, inputs))
    (s, _), (d_s, outputs) = jax.jvp(how.step, (w, s, x), (d_w, d_s, d_x))
    return (*s, *d_s), outputs

  step.__name__ = f"{how.step.__name__}_tangent"
  return how._replace(step=step, carry=2 * how.carry)


@sweep.defjvp
def _sweep_jvp(how, primals, tangents):
  weights, inputs = primals
  tangent = _tangent(how)

  def by_kernel(d):
    return sweep(tangent, [*weights, *d[0]], [*inputs, *d[1]])

  def by_loop(d):
    return jax.jvp(functools.partial(loop, how), primals, d)[1]

  return sweep(how, weights, inputs), _linear(by_kernel, by_loop, tangents)


def _linear(run: Callable, same: Callable, x: Any) -> Any:
  """`run(x)`, transposed as `same`, which computes the same linear function.

  JAX's one primitive that lets a linear function have a transpose of its own, under `vmap` too, is
  the linear solver: [x, y] with y - f(x) = 0 solves the system that `apply` states.
  """
  shapes = jax.eval_shape(same, x)
  nothing = jax.tree.leaves(x)[0].ravel()[0]  # zeros that are linear in x, as transposing demands
  zeros = jax.tree.map(lambda a: jnp.where(jnp.zeros(a.shape, bool), nothing.astype(a.dtype), 0), shapes)
  add = functools.partial(jax.tree.map, jnp.add)

  def apply(both):
    x, y = both
    return x, jax.tree.map(jnp.subtract, y, same(x))

  def solve(_, both):
    x, y = both
    return x, add(y, run(x))

  def transposed(_, both):
    x, y = both
    return add(x, jax.linear_transpose(same, x)(y)[0]), y

  return jax.lax.custom_linear_solve(apply, (x, zeros), solve, transposed)[1]


def _act(gates: Planes) -> Planes:
  i, f, g, o = gates
  return jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)


def _times(a: Array, w: Array) -> Array:
  """a @ w in the dtype of the weights, summed up in that of a."""
  return jnp.dot(a.astype(w.dtype), w, preferred_element_type=a.dtype)


def lstm_forward(weights, carry, inputs):
  """(h, c) of the step before and the gates' sums without h -> (h, c), an output too."""
  (w,), (h, c), (gates,) = weights, carry, inputs
  valid = gates[0] > PADDING / 2
  i, f, g, o = _act(tuple(a + _times(h, w_q) for a, w_q in zip(gates, w, strict=True)))
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
  back = sum(_times(d, w_q) for d, w_q in zip(d_gates, w, strict=True))
  return (jnp.where(valid, back, d_h), jnp.where(valid, d_next * f, d_c)), [d_gates]


def forward(x, valid, w, bias, reverse, *, target, interpret=False):
  """Runs an LSTM, or two in two directions.

  Args:
    x: [N, T, (G,) B, D], N chunks of T steps. Both directions find the steps in their order.
    valid: [N, T, (G,) B, 1].
    w: [(G,) D + H, 4H].
    bias: [(G,) 4H].
    reverse: whether a single LSTM runs from the last step to the first. Of two, the second does.
    target, interpret: see `Sweep`.

  Returns:
    h and c after each step, [N, T, (G,) B, H], and the final h, [(G,) B, H].
  """
  shape, chunk = x.shape[:-1], x.shape[1]
  single, x, valid, w, bias = _unify(x, valid, w, bias)
  (rows, width), hidden = x.shape[2:], w.shape[-1] // 4
  backwards = (reverse,) if single else (False, True)
  how = Sweep(lstm_forward, 2, ((2, w.dtype),), backwards, chunk, target, interpret)
  gates = _sums(x, valid, w[:, :width], bias)
  (states,) = sweep(how, [_square(w[:, width:])], [gates])
  h, c = (states[:, :, q, :rows, :hidden] for q in range(2))
  final = jnp.stack([h[0 if turned else -1, g] for g, turned in enumerate(backwards)])
  return h.reshape(*shape, hidden), c.reshape(*shape, hidden), final[0] if single else final


def backward(x, valid, w, bias, h, c, d_states, d_final, reverse, *, target, interpret=False):
  """The gradients for x, w and bias, given those for h after each step and for the final h.

  Arguments are those and the results of `forward`, and gradients for its results.
  """
  given, chunk = (x, w, bias), x.shape[1]
  single, x, valid, w, bias = _unify(x, valid, w, bias)
  h, c, d_states = (_flat(single, a) for a in (h, c, d_states))
  (rows, width), hidden = x.shape[2:], w.shape[-1] // 4
  backwards = (reverse,) if single else (False, True)
  # the final state is that of the last step: padding keeps it
  steps = jnp.arange(x.shape[0])[:, None]
  last = steps == jnp.array([0 if turned else x.shape[0] - 1 for turned in backwards])
  d_final = d_final.reshape(1, *h.shape[1:])
  d_states = d_states + jnp.where(last[:, :, None, None], d_final, 0)
  inputs = jnp.concatenate([x, _before(h, backwards)], -1)
  gates = _sums(inputs, valid, w, bias)
  states = (_pad(a[:, :, None].astype(gates.dtype)) for a in (_before(c, backwards), d_states))
  opposite = tuple(not turned for turned in backwards)
  how = Sweep(lstm_backward, 2, ((4, w.dtype),), opposite, chunk, target, interpret)
  (d_gates,) = sweep(how, [_square(w[:, width:]).mT], [gates, *states])
  d_gates = d_gates[..., :rows, :hidden].swapaxes(2, 3).reshape(*inputs.shape[:3], 4 * hidden)
  d_x = jnp.einsum("lgbm,gkm->lgbk", d_gates, w[:, :width])
  d_w = jnp.einsum("lgbk,lgbm->gkm", inputs, d_gates, preferred_element_type=gates.dtype)
  d_bias = d_gates.sum((0, 2), dtype=gates.dtype)
  found = d_x, d_w, d_bias
  return tuple(d.reshape(a.shape).astype(a.dtype) for d, a in zip(found, given, strict=True))


def _flat(single, a):
  """[N, T, (G,) B, K] -> [L, G, B, K]."""
  return (a[:, :, None] if single else a).reshape(-1, 1 if single else a.shape[2], *a.shape[-2:])


def _unify(x, valid, w, bias):
  """Whether there is one direction; the arguments with an axis of directions, x zero on padding."""
  single, dtype = w.ndim == 2, jnp.promote_types(x.dtype, w.dtype)
  x, valid = _flat(single, x), _flat(single, valid)
  w, bias = (a[None] if single else a for a in (w.astype(dtype), bias))
  return single, jnp.where(valid, x.astype(dtype), 0), valid, w, bias


def _before(states, backwards):
  """The states before each step from those after it, [L, G, B, H]."""
  moved = [
    jnp.pad(a[1:], ((0, 1), (0, 0), (0, 0))) if turned else jnp.pad(a[:-1], ((1, 0), (0, 0), (0, 0)))
    for a, turned in zip(states.swapaxes(0, 1), backwards, strict=True)
  ]
  return jnp.stack(moved, 1)


def _sums(inputs, valid, w, bias):
  """The gates' sums [L, G, 4, B', H'], summed up in float32 at least, PADDING where it is."""
  dtype = jnp.promote_types(w.dtype, jnp.float32)
  sums = jnp.einsum("lgbk,gkm->lgbm", inputs, w, preferred_element_type=dtype)
  sums = sums + bias.astype(dtype)[None, :, None]
  sums = jnp.where(valid, sums, PADDING)
  return _pad(sums.reshape(*sums.shape[:-1], 4, -1).swapaxes(2, 3), PADDING)


def _square(w):
  """[G, H, 4H] -> a matrix for each gate, [G, 4, H', H']."""
  hidden = w.shape[1]
  return _grow(w.reshape(-1, hidden, 4, hidden).swapaxes(1, 2), _wide(hidden), _wide(hidden), 0)


def _pad(a, value=0.0):
  """[…, B, H] -> […, B', H']: whole tiles of rows, and a width that a product can take."""
  rows, width = a.shape[-2:]
  return _grow(a, rows + -rows % LEAST, _wide(width), value)


def _wide(width):
  """The next power of two."""
  return max(LEAST, 1 << (width - 1).bit_length())


def _grow(a, rows, width, value):
  more = rows - a.shape[-2], width - a.shape[-1]
  return jnp.pad(a, (*((0, 0),) * (a.ndim - 2), *((0, n) for n in more)), constant_values=value)
