"""Modules of one shape called as one: a batch of towers.

One vmapped tower is a fraction of the operations, which an accelerator launches one by one and
every compiler takes its time for.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def together(towers: Sequence[nn.Module], inputs: Sequence[tuple[Any, ...]]) -> list[Any]:
  """Calls modules; those that differ in parameters, inputs and rates of dropout alone, as one.

  Inside of a module. Names and layout of the parameters are those of single calls.

  Args:
    towers: modules without variables other than parameters, named, of this module.
    inputs: the arguments of each.

  Returns:
    What each of them returns.
  """
  if len(towers) < 2 or towers[0].is_initializing():
    return [tower(*args) for tower, args in zip(towers, inputs, strict=True)]

  def settings(tower):
    own = {f.name: getattr(tower, f.name) for f in dataclasses.fields(tower)}
    return {name: value for name, value in own.items() if name not in ("parent", "name")}

  def kind(n):
    fixed = {k: v for k, v in settings(towers[n]).items() if not k.endswith("dropout")}
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), inputs[n])
    return type(towers[n]), fixed, shapes

  groups: list[list[int]] = []
  for n in range(len(towers)):
    same = [group for group in groups if kind(group[0]) == kind(n)]
    same[0].append(n) if same else groups.append([n])
  found: list[Any] = [None] * len(towers)
  for group in groups:
    first, drops = towers[group[0]], towers[group[0]].has_rng("dropout")
    if len(group) == 1:
      found[group[0]] = first(*inputs[group[0]])
      continue
    rates = {
      name: jnp.stack([jnp.float32(getattr(towers[n], name)) for n in group])
      for name in settings(first)
      if drops and len({getattr(towers[n], name) for n in group if name.endswith("dropout")}) > 1
    }
    keys = [towers[n].make_rng("dropout") for n in group] if drops else []

    def run(params, rates, keys, args, first=first):
      module = first.clone(parent=None, name=None, **rates)
      return module.apply({"params": params}, *args, rngs={"dropout": keys[0]} if keys else {})

    params, _ = _side_by_side([towers[n].variables["params"] for n in group])
    args, axes = _side_by_side([inputs[n] for n in group])
    mapped = jax.vmap(run, in_axes=(0, 0, 0, axes))
    out = mapped(params, rates, [jnp.stack(keys)] if drops else [], args)
    out, structure = jax.tree.flatten(out)
    for n, *leaves in zip(group, *map(jnp.unstack, out), strict=True):
      found[n] = jax.tree.unflatten(structure, leaves)
  return found


# The rows of an array that is copied first: XLA would join arrays anew inside of each kernel that
# reads a part of them, which makes such kernels large and no two of them alike. Gradients are
# handed out as they are, which `jax.lax.optimization_barrier` would keep from being done by one
# kernel.
_rows = Primitive("rows")
_rows.multiple_results = True
_rows.def_impl(lambda x: list(jnp.unstack(x)))
_rows.def_abstract_eval(lambda x: [core.ShapedArray(x.shape[1:], x.dtype)] * x.shape[0])


def _cut(x):
  return list(jnp.unstack(jax.lax.optimization_barrier(x)))


def _looked_up(x):
  """Which row it is stands in memory: were it written in them, no two layers' kernels were one."""
  x, *places = jax.lax.optimization_barrier((x, *map(np.int32, range(x.shape[0]))))
  row = functools.partial(jax.lax.dynamic_index_in_dim, x, keepdims=False)
  return [row(place, allow_negative_indices=False) for place in places]


def _rows_batched(arrays, axes):
  found = _rows.bind(jnp.moveaxis(arrays[0], axes[0], 1))
  return found, [0] * len(found)


mlir.register_lowering(_rows, mlir.lower_fun(_cut, multiple_results=True))
mlir.register_lowering(_rows, mlir.lower_fun(_looked_up, multiple_results=True), platform="cuda")
ad.deflinear2(_rows, lambda cotangents, _: [jnp.stack(list(map(ad.instantiate_zeros, cotangents)))])
batching.primitive_batchers[_rows] = _rows_batched


def _side_by_side(trees: Sequence[Any]) -> tuple[Any, Any]:
  """A tree whose leaves are `jnp.stack` of those of N trees, and the axes for `jax.vmap`.

  What is one array in all trees stays as it is, with an axis of None. All vectors of one length are
  copied by one kernel, and their gradients handed out by one.
  """
  every, structure = [jax.tree.leaves(tree) for tree in trees], jax.tree.structure(trees[0])
  kinds, found = collections.defaultdict(list), list(every[0])
  for place, leaf in enumerate(every[0]):
    if any(leaves[place] is not leaf for leaves in every):
      kinds[(leaf.shape, leaf.dtype) if leaf.ndim == 1 else place].append(place)
  axes: list[int | None] = [None] * len(found)
  for places in kinds.values():
    rows = [leaves[place] for place in places for leaves in every]
    shape = len(places), len(trees), *rows[0].shape
    # XLA cuts slices that need no new shape by one kernel, unless they are large; but it fails on
    # vectors in a row (Triton, jax 0.10.2)
    joined = jnp.concatenate(rows) if rows[0].ndim > 1 else jnp.stack(rows)
    for place, leaf in zip(places, _rows.bind(joined.reshape(shape)), strict=True):
      found[place], axes[place] = leaf, 0
  return jax.tree.unflatten(structure, found), jax.tree.unflatten(structure, axes)
