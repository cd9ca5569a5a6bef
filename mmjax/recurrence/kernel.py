"""A whole LSTM as one kernel, for accelerators: forward, backward, and the tangents of both.

On a GPU a loop over the steps launches several kernels a step, which takes longer than what they
compute; on a TPU it starves the matrix unit. Here the loop is inside of a Pallas kernel. What does
not wait for the step before it stays outside, as one product for all steps: the gates' share of x
before the loop, the gradients of x and of the weights after it.

`sweep` runs any step function over a sequence:

  grid       (directions, tiles of rows, chunks of steps); `jax.vmap` adds axes of its own, for
             seeds and tasks.
  carry      in registers. A TPU's grid runs in order: from one chunk of steps to the next the carry
             waits in scratch memory. On a GPU there is one chunk.
  weights    loaded once, before the loop, where registers hold them; else in each step, from cache.
  inputs and outputs   [G, L, B, planes * H]; a plane is one array of a step: a gate, a state. On a
             GPU they stay in global memory and each step loads its own planes; on a TPU a chunk of
             them lies in VMEM, and the next is fetched meanwhile.

Triton takes products of at least 16 and powers of two: B is padded to whole tiles and, by zeros in
the weights, H to a power of two. A tile is that small on a GPU, since tiles run side by side and
none waits for another; on a TPU, whose grid runs in order, it is as large as VMEM allows.

The derivative of a sweep in forward mode is a sweep, of the step's tangents. In reverse mode it is
that of a `lax.scan` of the same step: only second-order gradients that are not in mixed mode ask
for it (`backward`, the first-order gradient, is a sweep of its own).
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
Planes = tuple[Array, ...]

TARGETS = ("cuda", "tpu")
PADDING = -1e30  # in place of a gate's sum: this entry keeps its state
LEAST = 16  # rows and columns of a product
WIDEST = 256  # the largest H: its weights, 1 MiB, come from the second cache in each step
RESIDENT_BYTES = 64 * 2**10  # of weights, a quarter of a GPU multiprocessor's registers
LANES = 128
VMEM_BYTES = 10 * 2**20  # for blocks, of the 16 MiB that a TPU's compiler grants a kernel


def fits(w: Array) -> bool:
  """Whether there is a kernel for weights [..., 4H]."""
  return w.dtype.itemsize <= 4 and w.shape[-1] <= 4 * WIDEST


class Sweep(NamedTuple):
  """What a kernel runs.

  Attributes:
    step: (weights, carry, inputs) -> (carry, outputs): lists of `Planes`, [H, H] each of the
      weights and [B, H] each of the others; the carry is one `Planes`.
    carry: the number of planes that a step hands on; zeros at first.
    outputs: of each output, the number of planes and the dtype.
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
@functools.partial(jax.jit, static_argnums=0)  # traced once for all layers and passes of one shape
def sweep(how: Sweep, weights: Sequence[Array], inputs: Sequence[Array]) -> tuple[Array, ...]:
  """Runs a step over all steps of a sequence.

  Args:
    how: see there.
    weights: [G, H, planes * H] each.
    inputs: [G, L, B, planes * H] each; the first one's dtype is the carry's.

  Returns:
    The outputs, [G, L, B, planes * H] each.
  """
  directions, steps, rows, _ = inputs[0].shape
  width, dtype = weights[0].shape[1], inputs[0].dtype
  tile = _tile(how, inputs, rows, width)
  size = how.chunk if how.target == "tpu" else steps
  chunks = steps // size
  resident = sum(w.nbytes // directions for w in weights) <= RESIDENT_BYTES

  def backwards(direction):
    one, *other = how.backwards
    return jnp.where(direction == 0, one, other[0]) if other else one

  def by_step(planes):
    def index(direction, row, n):
      return direction, jnp.where(backwards(direction), chunks - 1 - n, n), row, 0

    return pl.BlockSpec((None, size, tile, planes), index)

  def whole(planes):
    return pl.BlockSpec((None, width, planes), lambda direction, row, n: (direction, 0, 0))

  def kernel(*refs):
    refs = iter(refs)
    numbers = len(weights), len(inputs), len(how.outputs), how.carry if chunks > 1 else 0
    w_refs, in_refs, out_refs, kept = ([next(refs) for _ in range(n)] for n in numbers)
    turned = backwards(pl.program_id(0))
    load = lambda: [tuple(ref[:, q] for q in _parts(ref.shape[1], width)) for ref in w_refs]  # noqa: E731
    loaded = load() if resident else None

    def body(k, carry):
      t = jnp.where(turned, size - 1 - k, k)
      now = [tuple(ref[t, :, part] for part in _parts(ref.shape[2], width)) for ref in in_refs]
      carry, outputs = how.step(loaded or load(), carry, now)
      for ref, planes in zip(out_refs, outputs, strict=True):
        for part, plane in zip(_parts(ref.shape[2], width), planes, strict=True):
          ref[t, :, part] = plane.astype(ref.dtype)
      return carry

    zero = jnp.zeros((tile, width), dtype)
    carry = (zero,) * how.carry
    if kept:
      carry = tuple(jnp.where(pl.program_id(2) == 0, zero, ref[...]) for ref in kept)
    carry = jax.lax.fori_loop(0, size, body, carry)
    for ref, last in zip(kept, carry, strict=False):
      ref[...] = last

  run = pl.pallas_call(
    kernel,
    grid=(directions, rows // tile, chunks),
    in_specs=[whole(w.shape[-1]) for w in weights] + [by_step(x.shape[-1]) for x in inputs],
    out_specs=[by_step(planes * width) for planes, _ in how.outputs],
    out_shape=[
      jax.ShapeDtypeStruct((directions, steps, rows, planes * width), dtype)
      for planes, dtype in how.outputs
    ],
    scratch_shapes=[pltpu.VMEM((tile, width), dtype)] * (how.carry if chunks > 1 else 0),
    compiler_params=_compiler_params(how, width),
    interpret=how.interpret,
    name=how.step.__name__,
  )
  return tuple(run(*weights, *inputs))


def _parts(size, width):
  """Where the planes are on an axis of that size."""
  return [slice(start, start + width) for start in range(0, size, width)]


def _tile(how, inputs, rows, width):
  """Rows of a block."""
  if how.target != "tpu":
    return LEAST
  columns = [x.shape[-1] for x in inputs] + [planes * width for planes, _ in how.outputs]
  row = 2 * how.chunk * sum(-(-n // LANES) * LANES for n in columns) * 4  # 2: the next block comes
  tile = LEAST
  while rows % (2 * tile) == 0 and 2 * tile * row <= VMEM_BYTES:
    tile *= 2
  return tile


def _compiler_params(how, width):
  if how.target == "tpu":
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
  return plgpu.CompilerParams(
    num_warps=4 if width <= 32 else 8 if width <= 64 else 16, num_stages=1
  )


def loop(how: Sweep, weights: Sequence[Array], inputs: Sequence[Array]) -> tuple[Array, ...]:
  """What `sweep` computes, as a `lax.scan`."""
  found = [
    _scan(how, turned, [w[g] for w in weights], [x[g] for x in inputs])
    for g, turned in enumerate(how.backwards)
  ]
  return tuple(jnp.stack(parts) for parts in zip(*found, strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1))  # traced and transposed once
def _scan(how, turned, weights, inputs):
  """One direction of `loop`, without its axis."""
  width = weights[0].shape[0]
  split = lambda a: tuple(a[:, part] for part in _parts(a.shape[1], width))  # noqa: E731
  own = list(map(split, weights))

  def step(carry, now):
    carry, outputs = how.step(own, carry, list(map(split, now)))
    joined = [jnp.concatenate(planes, -1) for planes in outputs]
    return carry, [a.astype(dtype) for a, (_, dtype) in zip(joined, how.outputs, strict=True)]

  zero = jnp.zeros((inputs[0].shape[1], width), inputs[0].dtype)
  return jax.lax.scan(step, (zero,) * how.carry, inputs, reverse=turned)[1]


@functools.cache
def _tangent(how: Sweep) -> Sweep:
  """The sweep of tangents: of [weights, their tangents] and [inputs, their tangents]."""

  def half(parts):
    middle = len(parts) // 2
    return parts[:middle], parts[middle:]

  @functools.wraps(how.step)
  def step(weights, carry, inputs):
    (w, d_w), (s, d_s), (x, d_x) = map(half, (weights, carry, inputs))
    (s, _), (d_s, outputs) = jax.jvp(how.step, (w, s, x), (d_w, d_s, d_x))
    return (*s, *d_s), outputs

  return how._replace(step=step, carry=2 * how.carry)


@sweep.defjvp
def _sweep_jvp(how, primals, tangents):
  weights, inputs = primals
  tangent = _tangent(how)

  def by_kernel(d):
    return sweep(tangent, [*weights, *d[0]], [*inputs, *d[1]])

  def by_loop(d):
    return jax.jvp(functools.partial(loop, how), primals, d)[1]

  out = sweep(how, weights, inputs)
  return out, _linear(by_kernel, by_loop, tangents, out)


def _linear(run: Callable, same: Callable, x: Any, like: Any) -> Any:
  """`run(x)`, transposed as `same`, which computes the same linear function; shaped as `like`.

  JAX's one public primitive that has a transpose of one's own, under `vmap` too, is the linear
  solver: [x, y] with y = f(x) solves the system x = b, y - f(x) = 0.
  """
  nothing = jnp.where(False, jax.tree.leaves(x)[0].ravel()[0], 0)  # 0, but linear in x
  zeros = jax.tree.map(lambda a: jnp.broadcast_to(nothing.astype(a.dtype), a.shape), like)
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


def _times(a: Array, w: Array, axis: int) -> Array:
  """a @ w (axis 0 of w) or a @ wᵀ (1) in the dtype of the weights, summed up in that of a."""
  axes = (((1,), (axis,)), ((), ()))
  return jax.lax.dot_general(a.astype(w.dtype), w, axes, preferred_element_type=a.dtype)


def lstm_forward(weights, carry, inputs):
  """(h, c) before the step and the gates' sums without h -> (h, c), an output too."""
  (w,), (h, c), (gates,) = weights, carry, inputs
  valid = gates[0] > PADDING / 2
  i, f, g, o = _act(tuple(a + _times(h, w_q, 0) for a, w_q in zip(gates, w, strict=True)))
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
  i_back, f_back, g_back, o_back = (_times(d, w_q, 1) for d, w_q in zip(d_gates, w, strict=True))
  back = i_back + f_back + g_back + o_back
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
  (_, chunk, *_, batch, width), hidden = x.shape, w.shape[-1] // 4
  shape = *x.shape[:-1], hidden
  backwards, (w, bias) = _directions(reverse, w, bias[..., None, :])
  x, valid = _rows(len(backwards), x, valid)
  w = _columns(w)
  gates = _sums(jnp.where(valid, x, 0), valid, w[:, :width], _columns(bias))
  how = Sweep(lstm_forward, 2, ((2, w.dtype),), backwards, chunk, target, interpret)
  (states,) = sweep(how, [_square(w, width, hidden)], [gates])
  h, c = (part[:, :, :batch, :hidden] for part in jnp.split(states, 2, -1))
  final = jnp.stack([h[g, 0 if turned else -1] for g, turned in enumerate(backwards)])
  h, c = (a.swapaxes(0, 1).reshape(shape) for a in (h, c))
  return h, c, final.reshape(*shape[2:])


def backward(x, valid, w, bias, h, c, d_states, d_final, reverse, *, target, interpret=False):
  """The gradients for x, w and bias, given those for h after each step and for the final h.

  Arguments are those and the results of `forward`, and gradients for its results.
  """
  given, (_, chunk, *_, batch, width), hidden = (x, w, bias), x.shape, h.shape[-1]
  backwards, (w, bias) = _directions(reverse, w, bias[..., None, :])
  x, valid, h, c, d_states = _rows(len(backwards), x, valid, h, c, d_states)
  w = _columns(jnp.concatenate([w, bias], 1))
  # the final state is that of the last step: padding keeps it
  d_final = _rows(len(backwards), d_final[None, None])[0]
  last = [jnp.arange(h.shape[1]) == (0 if turned else h.shape[1] - 1) for turned in backwards]
  d_states = d_states + jnp.where(jnp.stack(last)[:, :, None, None], d_final, 0)
  inputs = [jnp.where(valid, x, 0), _before(h, backwards), jnp.ones_like(h[..., :1])]
  inputs = jnp.concatenate(inputs, -1)
  gates = _sums(inputs, valid, w)
  opposite = tuple(not turned for turned in backwards)
  how = Sweep(lstm_backward, 2, ((4, w.dtype),), opposite, chunk, target, interpret)
  states = [_columns(a.astype(gates.dtype), 1) for a in (_before(c, backwards), d_states)]
  (d_gates,) = sweep(how, [_square(w, width, hidden)], [gates, *states])
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


def _columns(a, planes=4):
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
