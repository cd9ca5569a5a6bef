"""The step of a kernel on blocks of its planes and of its weights.

A GPU's registers hold no large weight as a whole, and what they cannot keep spills. So a plane
[B, H] is the tuple of its blocks of columns, and a weight is loaded block by block, where a product
reads it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.extend.core import Literal

CALLS = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr"}  # what a step calls, and where it is


def parts(size, width):
  """Where the planes are on an axis of that size."""
  return [slice(start, start + width) for start in range(0, size, width)]


def by_blocks(step, w_refs, size):
  """`step` of planes in blocks of columns, and of weights that are loaded where they are read.

  Args:
    step: see `Sweep`.
    w_refs: references to its weights.
    size: columns of a block; it divides H.

  Returns:
    A function of the other arguments of `step`. In place of planes it takes and gives the blocks
    of the first, of the second …
  """
  width = w_refs[0].shape[0]
  count = width // size

  def planes(blocks):
    return tuple(blocks[n : n + count] for n in range(0, len(blocks), count))

  def whole(plane):
    return jax.ShapeDtypeStruct((plane[0].shape[0], width), plane[0].dtype)

  def run(carry, inputs, *rows):
    carry, inputs = planes(carry), [planes(blocks) for blocks in inputs]
    places = [[(ref, part.start) for part in parts(ref.shape[1], width)] for ref in w_refs]
    square = lambda place: jax.ShapeDtypeStruct((width, width), place[0].dtype)  # noqa: E731
    shapes = [tuple(map(square, each)) for each in places], tuple(map(whole, carry))
    shapes = *shapes, [tuple(map(whole, each)) for each in inputs]
    traced, out = jax.make_jaxpr(step, return_shape=True)(*shapes, *rows)
    assert not traced.consts, "a step reads what it is given"
    given = [functools.partial(load, *place) for each in places for place in each]
    given += [*carry, *sum(inputs, ()), *rows]
    found = iter(_evaluate(traced.jaxpr, given, width, size))
    join = lambda each: sum((next(found) for _ in each), ())  # noqa: E731
    return join(out[0]), [join(each) for each in out[1]]

  def load(ref, start, k, n):
    """The block in row k and column n of a weight whose first column is `start`."""
    return ref[pl.ds(k * size, size), pl.ds(start + n * size, size)]

  return run


def _evaluate(jaxpr, args, width, size):
  """Runs the program of a step: [B, width] as a tuple of blocks, a weight as a function `load`."""
  values, blocks = dict(zip(jaxpr.invars, args, strict=True)), range(width // size)
  read = lambda v: v.val if isinstance(v, Literal) else values[v]  # noqa: E731

  def one(value):
    """What is no plane; or a plane or a weight of a single block."""
    (value,) = value if isinstance(value, tuple) else (value,)
    return value(0, 0) if callable(value) else value

  for equation in jaxpr.eqns:
    primitive, given = equation.primitive, list(map(read, equation.invars))
    run = functools.partial(primitive.bind, **primitive.get_bind_params(equation.params))
    result = equation.outvars[0].aval
    if primitive.name in CALLS:
      inner = equation.params[CALLS[primitive.name]]
      found = _evaluate(inner.jaxpr, given, width, size)
    elif primitive.name == "dot_general" and len(blocks) > 1:
      found = [_product(run, *given, result.dtype)]
    elif result.shape[1:] == (width,):
      if primitive.name == "broadcast_in_dim":
        run = functools.partial(run, shape=(result.shape[0], size))
      found = [
        tuple(run(*(g[n] if isinstance(g, tuple) else one(g) for g in given)) for n in blocks)
      ]
    else:
      found = run(*map(one, given))
      found = found if primitive.multiple_results else [found]
    values |= zip(equation.outvars, found, strict=True)
  return list(map(read, jaxpr.outvars))


def _product(dot, plane, load, dtype):
  """A plane times a weight, by blocks.

  A loop over the plane's blocks: unrolled, all weights would be loaded before the first is needed.
  """

  def add(k, sums):
    part = plane[0]
    for n in range(1, len(plane)):
      part = jnp.where(k == n, plane[n], part)
    return tuple(total + dot(part, load(k, n)) for n, total in enumerate(sums))

  zero = jnp.zeros(plane[0].shape, dtype)
  return jax.lax.fori_loop(0, len(plane), add, (zero,) * len(plane))
