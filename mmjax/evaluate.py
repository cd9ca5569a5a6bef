"""Robust evaluation: predictions under missing data, as grids of conditions x seeds.

The clean values are erased before a model runs, so no prediction can depend on what is
missing. Masks are a function of (condition, mask seed, sample) alone: neither the batch
size, nor the order, nor the other conditions of a grid change a result, and every model
sees the same missing data.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mmjax import data, masking, metrics, parallel, types

# Letters of missing sets, as in the tables of the field: l(anguage), a(udio), v(ision).
LETTERS = {"l": 0, "a": 1, "v": 2}


class Condition(NamedTuple):
  """One missing-data condition.

  Attributes:
    kind: "rate" or "missing".
    name: "0.3", "0.4-0.6", or the letters of the missing modalities, "la".
    rates: [3, 2] lowest and highest missing rate of text, audio, vision.
  """

  kind: str
  name: str
  rates: np.ndarray


def rate_condition(low: float, high: float | None = None) -> Condition:
  """The same missing rate, or interval of rates, for all modalities."""
  high = low if high is None else high
  if not 0 <= low <= high <= 1:
    raise ValueError(f"missing rates {low}, {high} are not within [0, 1] in rising order.")
  name = f"{low:g}" if low == high else f"{low:g}-{high:g}"
  return Condition("rate", name, np.tile(np.float32([low, high]), (3, 1)))


def missing_condition(letters: str) -> Condition:
  """Whole modalities missing (their rate is 1), the others complete: "l", "a", "v", "la" …"""
  if not letters or set(letters) - set(LETTERS):
    raise ValueError(f"missing set {letters!r} is not made of the letters l, a, v.")
  rates = np.zeros((3, 2), np.float32)
  rates[[LETTERS[letter] for letter in letters]] = 1.0
  return Condition("missing", letters, rates)


def parse_rates(text: str) -> list[Condition]:
  """Rate conditions of "first:last:step" (both ends included), "0,0.3" or "0.4-0.6"."""
  if ":" in text:
    first, last, step = (float(part) for part in text.split(":"))
    if step <= 0:
      raise ValueError(f"rates {text!r}: the step must be positive.")
    count = int((last - first) / step + 1 + 1e-6)
    return [rate_condition(round(first + n * step, 6)) for n in range(count)]
  pairs = [part.split("-") for part in text.split(",") if part]
  return [rate_condition(*(float(rate) for rate in pair)) for pair in pairs]


def make_grid(
  system: types.System,
  split: types.Batch,
  mask_of: Callable[[types.Array], types.MaskFn] = masking.span,
  batch_size: int = 128,
  output: str = "prediction",
) -> Callable[..., types.Array]:
  """Compiles the predictions of one split under any number of conditions and mask seeds.

  The cells of the grid are shared out over this process's devices.

  Args:
    system: the model.
    split: the split, N rows.
    mask_of: makes the mask of rates [3, 2], such as `masking.span` or `masking.bernoulli`.
    batch_size: most rows predicted at once; it does not change the result.
    output: which entry of the system's predictions, "feature" for representations.

  Returns:
    `(params, extra, rates [C, 3, 2], seeds [S]) -> predictions [C, S, N, ...]`, one
    compiled program for all conditions and seeds.
  """
  rows = split.index.shape[0]
  batch_size = -(-rows // -(-rows // batch_size))  # as many batches, and little to fill up
  # rows of like lengths together: a recurrence stops at a batch's longest sequence
  order = np.argsort(sum(getattr(split, m).valid.sum(1) for m in types.MODALITIES), kind="stable")
  padded = data.pad_rows(data.take(split, order), batch_size)
  batches = jax.tree.map(lambda a: a.reshape(-1, batch_size, *a.shape[1:]), padded)
  held = functools.cache(lambda mesh: jax.device_put(batches, parallel.replicated(mesh)))

  @functools.partial(jax.jit, static_argnums=0)
  def predict(mesh, params, extra, batches, rates, seeds):
    count = rates.shape[0] * seeds.shape[0]
    cell = jnp.arange(count + -count % mesh.size) % count  # as many for each device
    cells = (rates[cell // seeds.shape[0]], seeds[cell % seeds.shape[0]])

    def some(cells, params, extra, batches):
      def one(cell):
        rate, seed = cell
        key = jax.random.key(seed)
        # the condition's content, not its place in the grid, picks the masks
        for milli in jnp.round(rate.ravel() * 1000).astype(jnp.uint32):
          key = jax.random.fold_in(key, milli)
        mask = mask_of(rate)

        def predict_batch(batch):
          return system.predict(params, masking.erase(mask(key, batch)), extra)[output]

        return jax.lax.map(predict_batch, batches)

      return jax.lax.map(one, cells)  # [cells, batches, batch, ...]

    own, all_ = PartitionSpec(parallel.AXIS), PartitionSpec()
    found = jax.shard_map(
      some, mesh=mesh, in_specs=(own, all_, all_, all_), out_specs=own, check_vma=False
    )(cells, params, extra, batches)
    found = found[:count].reshape(rates.shape[0], seeds.shape[0], -1, *found.shape[3:])
    return found[:, :, np.argsort(order)]

  def grid(params, extra, rates, seeds):
    rates, seeds = np.asarray(rates, np.float32), np.asarray(seeds, np.uint32)
    mesh = parallel.local_mesh(rates.shape[0] * seeds.shape[0])
    given = jax.device_put((params, extra), parallel.replicated(mesh))
    return predict(mesh, *given, held(mesh), rates, seeds)

  return grid


def make_validator(
  system: types.System,
  split: types.Batch,
  spec: types.Spec,
  condition: Condition,
  *,
  mask_of: Callable[[types.Array], types.MaskFn] = masking.span,
  seed: int = 0,
  batch_size: int = 128,
) -> Callable[[types.Params, types.Extra], dict[str, float]]:
  """`(params, extra) -> metrics` of one split under one fixed set of masks."""
  grid = make_grid(system, split, mask_of, batch_size)

  def validate(params, extra):
    prediction = np.asarray(grid(params, extra, condition.rates[None], [seed]))[0, 0]
    return metrics.compute(spec, prediction, split.label)

  return validate


def make_robustness(
  system: types.System,
  split: types.Batch,
  spec: types.Spec,
  conditions: Sequence[Condition],
  seeds: Iterable[int],
  *,
  mask_of: Callable[[types.Array], types.MaskFn] = masking.span,
  batch_size: int = 128,
) -> Callable[[types.Params, types.Extra], list[dict[str, Any]]]:
  """Compiles the metrics under every condition and mask seed, for any parameters of a system.

  Args:
    system: the model.
    split: the split to test on.
    spec: of the dataset; decides the metrics, see `metrics.for_task`.
    conditions: the missing-data conditions.
    seeds: the mask seeds.
    mask_of: makes the mask of rates [3, 2].
    batch_size: rows predicted at once.

  Returns:
    `(params, extra) -> rows`, one row per (condition, seed): {"kind", "condition",
    "mask_seed", metric: value, …}.
  """
  seeds = list(seeds)
  grid = make_grid(system, split, mask_of, batch_size)
  rates = np.stack([condition.rates for condition in conditions])

  def robustness(params, extra):
    predictions = np.asarray(grid(params, extra, rates, seeds))
    return [
      {
        "kind": condition.kind,
        "condition": condition.name,
        "mask_seed": seed,
        **metrics.compute(spec, predictions[c, s], split.label),
      }
      for c, condition in enumerate(conditions)
      for s, seed in enumerate(seeds)
    ]

  return robustness


def robustness(
  system: types.System,
  params: types.Params,
  extra: types.Extra,
  split: types.Batch,
  spec: types.Spec,
  conditions: Sequence[Condition],
  seeds: Iterable[int],
  **settings,
) -> list[dict[str, Any]]:
  """`make_robustness` of one trained model, called once."""
  return make_robustness(system, split, spec, conditions, seeds, **settings)(params, extra)
