"""Robust evaluation: predictions under missing data, as grids of conditions x seeds.

The clean values are erased before a model runs, so no prediction can depend on what is
missing. Masks are a function of (condition, mask seed, sample) alone: neither the batch
size, nor the order, nor the other conditions of a grid, nor the kind of random keys change a
result, and every model sees the same missing data.
"""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mmjax import conversations, data, masking, metrics, parallel, types

# Letters of missing sets, as in the tables of the field: l(anguage), a(udio), v(ision).
LETTERS = {"l": 0, "a": 1, "v": 2}

RATES = "rates are 0,0.3, intervals 0.4-0.6, or first:last:step as in 0:0.9:0.1, within [0, 1]"
_NUMBER = r"\s*((?:\d+\.?\d*|\.\d+)(?:e-?\d+)?)\s*"

Grid = Callable[[types.Params, types.Extra], np.ndarray]


class Condition(NamedTuple):
  """One missing-data condition: a mask, and the part of its settings that a grid traces.

  Attributes:
    kind: of table in which it stands, "rate" or "missing" or one of your own.
    name: of the condition among its kind: "0.3", "0.4-0.6", or the letters of the missing
      modalities, "la".
    mask: the factory: `mask(**settings)` is the `MaskFn`. A grid compiles one program for all
      conditions of the same factory (the same object) with settings of the same shapes.
    settings: arrays by name. They pick the masks, in thousandths, together with the seed.
  """

  kind: str
  name: str
  mask: Callable[..., types.MaskFn]
  settings: dict[str, Any]


def rate_condition(
  low: float, high: float | None = None, *, mask: Callable[..., types.MaskFn] = masking.span
) -> Condition:
  """The same missing rate, or interval of rates, for all modalities.

  Args:
    low, high: lowest and highest rate; one rate if `high` is None.
    mask: a factory that takes `rate`, such as `masking.family("span", axis="feature")`.

  Returns:
    The condition; its setting is "rate" [3, 2], lowest and highest of text, audio, vision.

  Raises:
    UsageError: on rates that are not within [0, 1] in rising order, a mask without a rate.
  """
  high = low if high is None else high
  if not 0 <= low <= high <= 1:
    raise types.UsageError(
      f"missing rates {low:g}, {high:g} are not within [0, 1] in rising order."
    )
  name = f"{low:g}" if low == high else f"{low:g}-{high:g}"
  return _condition("rate", name, mask, np.tile(np.array([low, high], np.float32), (3, 1)))


def missing_condition(
  letters: str, *, mask: Callable[..., types.MaskFn] = masking.span
) -> Condition:
  """Whole modalities missing (their rate is 1), the others complete.

  Args:
    letters: of the missing modalities, in any order: "l", "a", "v", "la" …
    mask: as in `rate_condition`; with the same one, a grid of both is one program.

  Returns:
    The condition, its name in the order l, a, v.

  Raises:
    UsageError: on no letter, another one, or the same one twice; a mask without a rate.
  """
  if not letters or set(letters) - set(LETTERS) or len(set(letters)) < len(letters):
    raise types.UsageError(
      f"missing set {letters!r} must be made of the letters l (text), a (audio), v (vision),"
      " each at most once, as in la."
    )
  rates = np.zeros((3, 2), np.float32)
  rates[[LETTERS[letter] for letter in letters]] = 1.0
  return _condition("missing", "".join(sorted(letters, key="lav".index)), mask, rates)


def _condition(kind, name, mask, rates) -> Condition:
  if not masking.takes_rate(mask):
    raise types.UsageError(f"conditions of rates need a mask with a rate, but {mask} has none.")
  mask(rate=rates)  # what it refuses is told here, a traced rate passes
  return Condition(kind, name, mask, {"rate": rates})


def parse_rates(text: str, *, mask: Callable[..., types.MaskFn] = masking.span) -> list[Condition]:
  """Rate conditions of "first:last:step" (both ends included), "0,0.3" or "0.4-0.6".

  Args:
    text: any number of these with commas between them, or nothing.
    mask: as in `rate_condition`.

  Returns:
    The conditions.

  Raises:
    UsageError: on anything else, rates beyond [0, 1], or the same rates twice.
  """
  found = []
  for part in text.split(",") if text.strip() else ():
    if match := re.fullmatch(f"{_NUMBER}(?:-{_NUMBER})?", part):
      found.append(tuple(float(rate) for rate in match.groups() if rate))
    elif match := re.fullmatch(":".join([_NUMBER] * 3), part):
      first, last, step = (float(number) for number in match.groups())
      if step <= 0 or first > last:
        raise types.UsageError(f"rates {part!r}: the step must lead from the first to the last.")
      count = int((last - first) / step + 1 + 1e-6)
      found += [(round(first + n * step, 6),) for n in range(count)]
    else:
      raise types.UsageError(f"rates {text!r}: {part!r} is none; {RATES}.")
  conditions = [rate_condition(*rates, mask=mask) for rates in found]
  names = [condition.name for condition in conditions]
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise types.UsageError(f"rates {text!r}: {', '.join(twice)} is there more than once.")
  return conditions


def make_grid(
  system: types.System,
  split: types.Batch,
  conditions: Sequence[Condition],
  seeds: Iterable[int],
  *,
  batch_size: int = 128,
  output: str = "prediction",
) -> Grid:
  """Compiles the predictions of one split under any number of conditions and mask seeds.

  One compiled program for all conditions of a family (`Condition.mask`) and all seeds. Its
  cells are shared out over this process's devices.

  Args:
    system: the model.
    split: the split, N rows; of conversations if it has them, see `conversations.group`.
    conditions: C missing-data conditions.
    seeds: S mask seeds.
    batch_size: most rows predicted at once; it does not change the result.
    output: which entry of the system's predictions, "feature" for representations.

  Returns:
    `(params, extra) -> predictions [C, S, N, ...]`, on the host.

  Raises:
    UsageError: on no condition or no seed.
  """
  seeds = np.asarray(list(seeds), np.uint32)
  if not len(conditions) or not len(seeds):
    raise types.UsageError("an evaluation needs at least one condition and one mask seed.")
  whole = conversations.is_grouped(split)
  batches, order = (_conversation_batches if whole else _batches)(split, batch_size)
  stored = (batches, split if whole else ())
  held = functools.cache(lambda mesh: jax.device_put(stored, parallel.replicated(mesh)))
  families = _families(conditions)

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def predict(mesh, family, params, extra, stored, settings, seeds):
    places = families[family].places
    count = len(places) * seeds.shape[0]
    cell = jnp.arange(count + -count % mesh.size) % count  # as many for each device
    condition, seed = cell // seeds.shape[0], cell % seeds.shape[0]
    cells = (jax.tree.map(lambda a: a[condition], settings), seeds[seed])

    def some(cells, params, extra, stored):
      batches, split = stored

      def one(cell):
        settings, seed = cell
        key = _key(settings, seed)
        mask = families[family].mask(**settings)

        def predict_batch(batch):
          batch = conversations.take(split, batch) if whole else batch
          return system.predict(params, masking.erase(mask(key, batch)), extra)[output]

        return jax.lax.map(predict_batch, batches)

      return jax.lax.map(one, cells)  # [cells, batches, batch, ...]

    own, all_ = PartitionSpec(parallel.AXIS), PartitionSpec()
    found = jax.shard_map(
      some, mesh=mesh, in_specs=(own, all_, all_, all_), out_specs=own, check_vma=False
    )(cells, params, extra, stored)
    found = found[:count].reshape(len(places), seeds.shape[0], -1, *found.shape[3:])
    return found[:, :, order]

  def grid(params, extra):
    parts = []
    for number, family in enumerate(families):
      mesh = parallel.local_mesh(len(family.places) * len(seeds))
      given = jax.device_put((params, extra), parallel.replicated(mesh))
      parts.append(predict(mesh, number, *given, held(mesh), family.settings, seeds))
    places = np.concatenate([family.places for family in families])
    return np.concatenate([np.asarray(part) for part in parts])[np.argsort(places)]

  return grid


def _batches(split, batch_size) -> tuple[types.Batch, np.ndarray]:
  """The split as batches [n, b, ...], and [N] where each sample is among all of their rows."""
  rows = split.index.shape[0]
  batch_size = -(-rows // -(-rows // batch_size))  # as many batches, and little to fill up
  # rows of like lengths together: a recurrence stops at a batch's longest sequence
  order = np.argsort(sum(getattr(split, m).valid.sum(1) for m in types.MODALITIES), kind="stable")
  padded = data.pad_rows(data.take(split, order), batch_size)
  batches = jax.tree.map(lambda a: a.reshape(-1, batch_size, *a.shape[1:]), padded)
  return batches, np.argsort(order)


def _conversation_batches(split, batch_size) -> tuple[np.ndarray, np.ndarray]:
  """`_batches` of whole conversations, as rows of their table: the padding is made as they run."""
  table = conversations.table(split)
  count, length = table.shape
  parts = -(-count // max(batch_size // length, 1))
  size = -(-count // parts)
  table = np.pad(table, ((0, parts * size - count), (0, 0)), constant_values=-1)
  where = np.flatnonzero(table >= 0)
  return table.reshape(parts, size, length), where[np.argsort(table.ravel()[where])]


class _Family(NamedTuple):
  """Conditions that one program serves: their places in the grid, their settings stacked."""

  mask: Callable[..., types.MaskFn]
  places: list[int]
  settings: dict[str, Any]


def _families(conditions: Sequence[Condition]) -> list[_Family]:
  """The conditions by mask factory, and structure and shapes of settings."""
  found: dict[Any, list[tuple[int, Any]]] = {}
  for place, condition in enumerate(conditions):
    settings = jax.tree.map(_array, condition.settings)
    leaves, structure = jax.tree.flatten(settings)
    kind = (id(condition.mask), structure, *((leaf.shape, leaf.dtype) for leaf in leaves))
    found.setdefault(kind, []).append((place, settings))
  families = []
  for members in found.values():
    places, settings = zip(*members, strict=True)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *settings)
    families.append(_Family(conditions[places[0]].mask, list(places), stacked))
  return families


def _array(leaf: Any) -> np.ndarray:
  """A setting as an array, in the precision of the programs."""
  leaf = np.asarray(leaf)
  return leaf.astype(np.float32 if leaf.dtype.kind == "f" else np.int32)


def _key(settings: dict[str, Any], seed: types.Array) -> types.PRNGKey:
  """The key of a cell: the condition's content, not its place in the grid, picks the masks.

  Of one kind whatever `jax_default_prng_impl` is, so that machines agree.
  """
  key = jax.random.key(seed, impl="threefry2x32")
  for leaf in jax.tree.leaves(settings):
    for milli in jnp.round(leaf.ravel() * 1000).astype(jnp.uint32):
      key = jax.random.fold_in(key, milli)
  return key


def count_missing(
  split: types.Batch,
  conditions: Sequence[Condition],
  seeds: Iterable[int],
  *,
  batch_size: int = 128,
) -> list[dict[str, Any]]:
  """Counts what a grid of the same arguments hides: exactly, and not what its rates say.

  Args:
    split: the split, N rows.
    conditions: the missing-data conditions.
    seeds: the mask seeds.
    batch_size: rows masked at once.

  Returns:
    A row per condition and modality ("all": of all three), sums over the seeds: "kind",
    "condition", "modality"; "missing steps" "of steps" (the valid ones; of masks over channels
    "of" counts steps times channels), "missing modalities" "of modalities" (a sample lacks a
    modality where nothing of it is left but [CLS] and [SEP]), "touched samples" (that miss
    anything of it) "of samples".
  """
  counting = types.System(lambda key, spec: ({}, {}), _missing, ())
  grid = make_grid(counting, split, conditions, seeds, batch_size=batch_size, output="counts")
  found, rows = grid({}, {}), []  # [C, S, N, 3, 3]
  for condition, one in zip(conditions, found, strict=True):
    for name, m in [*((name, [i]) for i, name in enumerate(types.MODALITIES)), ("all", [0, 1, 2])]:
      missing, of, gone = (one[:, :, m, k] for k in range(3))
      rows.append(
        {
          "kind": condition.kind,
          "condition": condition.name,
          "modality": name,
          "missing steps": int(missing.sum()),
          "of steps": int(of.sum()),
          "missing modalities": int(gone.sum()),
          "of modalities": gone.size,
          "touched samples": int((missing.sum(-1) > 0).sum()),
          "of samples": one.shape[0] * one.shape[1],
        }
      )
  return rows


def _missing(params, batch, extra) -> dict[str, types.Array]:
  """A `System.predict`: "counts" [B, 3, 3] of each modality: missing, all, whether all are."""
  del params, extra
  found = []
  for name in types.MODALITIES:
    m: types.Modality = getattr(batch, name)
    # steps, or steps x channels
    wide = jnp.broadcast_to(m.seen.reshape(*m.seen.shape[:2], -1), (*m.valid.shape, _width(m)))
    real = m.valid[..., None]
    mine = real & ~masking.ends(m.valid)[..., None] if m.x.ndim == 2 else real
    missing = (real & ~wide).sum((1, 2))
    gone = (missing > 0) & ~(mine & wide).any((1, 2))
    found.append(jnp.stack([missing, m.valid.sum(1) * wide.shape[2], gone.astype(jnp.int32)], -1))
  return {"counts": jnp.stack(found, 1)}


def _width(m: types.Modality) -> int:
  """How many entries a step has in `seen`."""
  return m.seen.shape[2] if m.seen.ndim == 3 else 1


def make_validator(
  system: types.System,
  split: types.Batch,
  spec: types.Spec,
  condition: Condition,
  *,
  seed: int = 0,
  batch_size: int = 128,
) -> Callable[[types.Params, types.Extra], metrics.Metrics]:
  """`(params, extra) -> metrics` of one split under one fixed set of masks."""
  grid = make_grid(system, split, [condition], [seed], batch_size=batch_size)

  def validate(params, extra):
    return metrics.compute(spec, grid(params, extra)[0, 0], split.label)

  # so that a trainer need not evaluate to know them
  validate.names = metrics.names(spec)  # pyright: ignore[reportFunctionMemberAccess]
  return validate


def make_robustness(
  system: types.System,
  split: types.Batch,
  spec: types.Spec,
  conditions: Sequence[Condition],
  seeds: Iterable[int],
  *,
  batch_size: int = 128,
) -> Callable[[types.Params, types.Extra], list[dict[str, Any]]]:
  """Compiles the metrics under every condition and mask seed, for any parameters of a system.

  Args:
    system: the model.
    split: the split to test on.
    spec: of the dataset; decides the metrics, see `metrics.for_task`.
    conditions: the missing-data conditions.
    seeds: the mask seeds.
    batch_size: rows predicted at once.

  Returns:
    `(params, extra) -> rows`, one row per (condition, seed): {"kind", "condition",
    "mask_seed", metric: value, …}.
  """
  seeds = list(seeds)
  grid = make_grid(system, split, conditions, seeds, batch_size=batch_size)

  def robustness(params, extra):
    return score(spec, grid(params, extra), split.label, conditions, seeds)

  return robustness


def score(
  spec: types.Spec,
  predictions: np.ndarray,
  label: Any,
  conditions: Sequence[Condition],
  seeds: Sequence[int],
) -> list[dict[str, Any]]:
  """The rows of `make_robustness`, of a grid's predictions [C, S, N, ...] and the labels [N]."""
  return [
    {
      "kind": condition.kind,
      "condition": condition.name,
      "mask_seed": seed,
      **metrics.compute(spec, predictions[c, s], label),
    }
    for c, condition in enumerate(conditions)
    for s, seed in enumerate(seeds)
  ]


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
