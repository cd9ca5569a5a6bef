"""Any step function over a sequence as one Pallas kernel, which holds the loop.

  grid       (directions, tiles of rows, chunks of steps); `jax.vmap` adds axes of its own, for
             seeds and tasks.
  carry      in registers. A TPU's grid runs in order: from one chunk of steps to the next the carry
             waits in scratch memory. On a GPU there is one chunk.
  weights    loaded once, before the loop, where registers hold them; else in each step, from cache,
             each where a product reads it, on a GPU by blocks.
  inputs and outputs   [G, L, B, planes * H]; a plane is one array of a step: a gate, a state. On a
             GPU they stay in global memory and each step loads its own planes; on a TPU a chunk of
             them lies in VMEM, and the next is fetched meanwhile.
  rows       what every step reads of a row, [G, B, ...]; from cache on a GPU, in VMEM on a TPU.

Triton takes products of at least 16 and powers of two: B must be divisible by 16, H a power of two
from 16 on. A tile has 16 rows on a GPU, since tiles run side by side and none waits for another; on
a TPU, whose grid runs in order, it is as large as VMEM allows.

The derivative of a sweep in forward mode is a sweep, of the step's tangents, and so on to any
order. In reverse mode it is that of a `lax.scan` of the same step. Both are rules of a primitive:
a `jax.custom_jvp` loses its rule inside of a differentiated scan or checkpoint, which M³S around a
loss with a meta-gradient of its own differentiates again.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import core
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mmjax.recurrence import blocks

Array = jax.Array
Planes = tuple[Array, ...]

LEAST = 16  # rows and columns of a product
RESIDENT_BYTES = 64 * 2**10  # of weights, a quarter of a GPU multiprocessor's registers
BLOCK = 64  # rows and columns of the weights in a GPU's product, what 8 warps hold without spilling
LANES = 128
VMEM_BYTES = 10 * 2**20  # for blocks, of the 16 MiB that a TPU's compiler grants a kernel


class Sweep(NamedTuple):
  """What a kernel runs.

  Attributes:
    step: (weights, carry, inputs, *rows) -> (carry, outputs): lists of `Planes`, [H, H] each of
      the weights and [B, H] each of the others; the carry is one `Planes`, and rows are arrays
      [B, ...] that every step reads.
    carry: the number of planes that a step hands on; zeros at first.
    outputs: of each output, the number of planes and the dtype.
    backwards: of each direction G, whether it runs from the last step to the first.
    chunk: steps of a TPU's block; it divides L.
    target: "cuda" or "tpu", whose blocks and compiler are used; "loop": a `lax.scan` instead.
    interpret: run it without a compiler, to test it.
  """

  step: Callable[..., Any]
  carry: int
  outputs: tuple[tuple[int, Any], ...]
  backwards: tuple[bool, ...]
  chunk: int
  target: str
  interpret: bool = False


def sweep(
  how: Sweep, weights: Sequence[Array], inputs: Sequence[Array], rows: Sequence[Array] = ()
) -> tuple[Array, ...]:
  """Runs a step over all steps of a sequence.

  Args:
    how: see there.
    weights: [G, H, planes * H] each.
    inputs: [G, L, B, planes * H] each; the first one's dtype is the carry's.
    rows: [G, B, ...] each.

  Returns:
    The outputs, [G, L, B, planes * H] each.
  """
  groups = weights, inputs, rows
  return tuple(
    _sweep.bind(*sum(map(list, groups), []), how=how, sizes=tuple(map(len, groups)), maps=())
  )


def _kernel(
  how: Sweep, weights: Sequence[Array], inputs: Sequence[Array], rows: Sequence[Array]
) -> tuple[Array, ...]:
  """What `sweep` computes, as a kernel."""
  directions, steps, batch, _ = inputs[0].shape
  width, dtype = weights[0].shape[1], inputs[0].dtype
  tile = _tile(how, inputs, rows, batch, width)
  size = how.chunk if how.target == "tpu" else steps
  chunks = steps // size
  resident = sum(w.nbytes // directions for w in weights) <= RESIDENT_BYTES
  block = width if resident or how.target == "tpu" else min(width, BLOCK)

  def backwards(direction):
    one, *other = how.backwards
    return jnp.where(direction == 0, one, other[0]) if other else one

  def by_step(planes):
    def index(direction, row, n):
      return direction, jnp.where(backwards(direction), chunks - 1 - n, n), row, 0

    return pl.BlockSpec((None, size, tile, planes), index)

  def whole(planes):
    return pl.BlockSpec((None, width, planes), lambda direction, row, n: (direction, 0, 0))

  def of_rows(a):
    rest = a.shape[2:]
    return pl.BlockSpec(
      (None, tile, *rest), lambda direction, row, n: (direction, row, *(0,) * len(rest))
    )

  def kernel(*refs):
    refs, kept = iter(refs), how.carry if chunks > 1 else 0
    numbers = len(weights), len(inputs), len(rows), len(how.outputs), kept
    w_refs, in_refs, row_refs, out_refs, kept = ([next(refs) for _ in range(n)] for n in numbers)
    turned = backwards(pl.program_id(0))
    step = blocks.by_blocks(how.step, w_refs, block)
    if resident:
      loaded = [tuple(ref[:, part] for part in blocks.parts(ref.shape[1], width)) for ref in w_refs]
      step = functools.partial(how.step, loaded)

    def body(k, carry):
      t = jnp.where(turned, size - 1 - k, k)
      now = [
        tuple(ref[t, :, part] for part in blocks.parts(ref.shape[2], block)) for ref in in_refs
      ]
      of_all = [ref[...] for ref in row_refs]
      carry, outputs = step(carry, now, *of_all)
      for ref, planes in zip(out_refs, outputs, strict=True):
        for part, plane in zip(blocks.parts(ref.shape[2], block), planes, strict=True):
          ref[t, :, part] = plane.astype(ref.dtype)
      return carry

    zero = jnp.zeros((tile, block), dtype)
    carry = (zero,) * (how.carry * width // block)
    if kept:
      carry = tuple(jnp.where(pl.program_id(2) == 0, zero, ref[...]) for ref in kept)
    carry = jax.lax.fori_loop(0, size, body, carry)
    for ref, last in zip(kept, carry, strict=False):
      ref[...] = last

  run = pl.pallas_call(
    kernel,
    grid=(directions, batch // tile, chunks),
    in_specs=[
      *(whole(w.shape[-1]) for w in weights),
      *(by_step(x.shape[-1]) for x in inputs),
      *map(of_rows, rows),
    ],
    out_specs=[by_step(planes * width) for planes, _ in how.outputs],
    out_shape=[
      jax.ShapeDtypeStruct((directions, steps, batch, planes * width), dtype)
      for planes, dtype in how.outputs
    ],
    scratch_shapes=[pltpu.VMEM((tile, width), dtype)] * (how.carry if chunks > 1 else 0),
    compiler_params=_compiler_params(how, rows, width),
    interpret=how.interpret,
    name=how.step.__name__,
  )
  return tuple(run(*weights, *inputs, *rows))


def _tile(how, inputs, rows, batch, width):
  """Rows of a block."""
  if how.target != "tpu":
    return LEAST
  by_lanes = lambda n: -(-n // LANES) * LANES  # noqa: E731
  columns = [x.shape[-1] for x in inputs] + [planes * width for planes, _ in how.outputs]
  columns = how.chunk * sum(map(by_lanes, columns))
  columns += sum(math.prod(a.shape[2:-1]) * by_lanes(a.shape[-1]) for a in rows)
  row, tile = 2 * columns * 4, LEAST  # 2: the next block comes
  while batch % (2 * tile) == 0 and 2 * tile * row <= VMEM_BYTES:
    tile *= 2
  return tile


def _compiler_params(how, rows, width):
  if how.target == "tpu":
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
  return plgpu.CompilerParams(num_warps=32 if rows else 4 if width <= 32 else 8, num_stages=1)


def loop(
  how: Sweep, weights: Sequence[Array], inputs: Sequence[Array], rows: Sequence[Array]
) -> tuple[Array, ...]:
  """What `sweep` computes, as a `lax.scan`."""
  found = [
    _scan(how, turned, *([a[g] for a in arrays] for arrays in (weights, inputs, rows)))
    for g, turned in enumerate(how.backwards)
  ]
  return tuple(jnp.stack(parts) for parts in zip(*found, strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1))  # traced and transposed once
def _scan(how, turned, weights, inputs, rows):
  """One direction of `loop`, without its axis."""
  width = weights[0].shape[0]
  split = lambda a: tuple(a[:, part] for part in blocks.parts(a.shape[1], width))  # noqa: E731
  own = list(map(split, weights))

  def step(carry, now):
    carry, outputs = how.step(own, carry, list(map(split, now)), *rows)
    joined = [jnp.concatenate(planes, -1) for planes in outputs]
    return carry, [a.astype(dtype) for a, (_, dtype) in zip(joined, how.outputs, strict=True)]

  zero = jnp.zeros((inputs[0].shape[1], width), inputs[0].dtype)
  return jax.lax.scan(step, (zero,) * how.carry, inputs, reverse=turned)[1]


_sweep = Primitive("sweep")
_sweep.multiple_results = True


def _grouped(arrays, sizes):
  """Weights, inputs and rows."""
  arrays = iter(arrays)
  return [[next(arrays) for _ in range(size)] for size in sizes]


@functools.partial(jax.jit, static_argnames=("how", "sizes", "maps"))  # traced once for each shape
def _run(*arrays, how, sizes, maps):
  def of_arrays(*arrays):
    return (loop if how.target == "loop" else _kernel)(how, *_grouped(arrays, sizes))

  for mapped in maps:
    of_arrays = jax.vmap(of_arrays, [0 if is_mapped else None for is_mapped in mapped])
  return of_arrays(*arrays)


_sweep.def_impl(_run)
mlir.register_lowering(_sweep, mlir.lower_fun(_run, multiple_results=True))


@_sweep.def_abstract_eval
def _shapes(*arrays, how, sizes, maps):
  shapes, axes = [a.shape for a in arrays], []
  for mapped in reversed(maps):  # the last one's axis is the first
    axes.append(
      next(shape[0] for shape, is_mapped in zip(shapes, mapped, strict=True) if is_mapped)
    )
    shapes = [shape[is_mapped:] for shape, is_mapped in zip(shapes, mapped, strict=True)]
  (weights, *_), (inputs, *_), _ = _grouped(shapes, sizes)
  return [
    core.ShapedArray((*axes, *inputs[:-1], planes * weights[1]), dtype)
    for planes, dtype in how.outputs
  ]


def _batched(arrays, axes, *, how, sizes, maps):
  mapped = tuple(axis is not None for axis in axes)
  arrays = [
    a if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in zip(arrays, axes, strict=True)
  ]
  found = _sweep.bind(*arrays, how=how, sizes=sizes, maps=(*maps, mapped))
  return found, [0] * len(found)


batching.primitive_batchers[_sweep] = _batched


@functools.cache
def _tangent(how: Sweep) -> Sweep:
  """The sweep of tangents: of [weights, their tangents], likewise inputs and rows."""

  @functools.wraps(how.step)
  def step(weights, carry, inputs, *rows):
    (w, d_w), (s, d_s), (x, d_x), (r, d_r) = map(_halves, (weights, carry, inputs, rows))
    (s, _), (d_s, outputs) = jax.jvp(how.step, (w, s, x, *r), (d_w, d_s, d_x, *d_r))
    return (*s, *d_s), outputs

  return how._replace(step=step, carry=2 * how.carry)


def _halves(parts):
  middle = len(parts) // 2
  return parts[:middle], parts[middle:]


def _doubled(primals, tangents, sizes):
  """Each group of the first, followed by that of the second."""
  groups = zip(_grouped(primals, sizes), _grouped(tangents, sizes), strict=True)
  return [part for both in groups for half in both for part in half]


def _jvp(primals, tangents, *, how, sizes, maps):
  tangents = list(map(ad.instantiate_zeros, tangents))
  out = _sweep.bind(*primals, how=how, sizes=sizes, maps=maps)
  found = _sweep.bind(
    *_doubled(primals, tangents, sizes),
    how=_tangent(how),
    sizes=tuple(2 * size for size in sizes),
    maps=tuple(tuple(_doubled(mapped, mapped, sizes)) for mapped in maps),
  )
  return out, found


ad.primitive_jvps[_sweep] = _jvp


def _transposed(cotangents, *arrays, how, sizes, maps):
  """That of a sweep of tangents, which is linear in them."""
  asked = [n for n, a in enumerate(arrays) if ad.is_undefined_primal(a)]
  how = how._replace(target="loop")

  def linear(found):
    given = dict(zip(asked, found, strict=True))
    return _run(*(given.get(n, a) for n, a in enumerate(arrays)), how=how, sizes=sizes, maps=maps)

  transpose = jax.linear_transpose(linear, [arrays[n].aval for n in asked])
  (found,) = transpose(tuple(map(ad.instantiate_zeros, cotangents)))
  found = dict(zip(asked, found, strict=True))
  return [found.get(n) for n in range(len(arrays))]


ad.primitive_transposes[_sweep] = _transposed
