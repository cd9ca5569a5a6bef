"""What masks are made of: `seen` and what follows from it, steps and spans, keys, rates."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from mmjax import types

# A number, a pair, a mapping of either by modality name, or an array: see the package.
Rate = Any


def observed(m: types.Modality) -> types.Array:
  """What a model may read of a modality: `x` where it is seen, `fill` elsewhere.

  Args:
    m: the modality, `x` [B, L, D] or [B, L].

  Returns:
    An array like `m.x`.
  """
  fill = m.fill.reshape(-1, *[1] * (m.x.ndim - 1))
  return jnp.where(m.seen, m.x, fill.astype(m.x.dtype))


def erase(batch: types.Batch) -> types.Batch:
  """Overwrites every unseen entry with its fill: the clean values are gone, `seen` stays."""
  return _each(batch, lambda m: m._replace(x=observed(m)))


def complete(batch: types.Batch) -> types.Batch:
  """The data with nothing missing: what teachers and reconstruction targets read."""
  return _each(batch, lambda m: m._replace(seen=jnp.ones_like(m.seen)))


def complement(batch: types.Batch) -> types.Batch:
  """The part of the data that is not observed, and nothing else (MMIN's imagination target)."""
  return _each(batch, lambda m: m._replace(seen=~m.seen))


def _each(batch: types.Batch, change: Callable[[types.Modality], types.Modality]) -> types.Batch:
  return batch._replace(**{name: change(getattr(batch, name)) for name in types.MODALITIES})


def present(m: types.Modality) -> types.Array:
  """Whether anything of a modality is observed; of token ids, anything but the special tokens.

  Args:
    m: the modality.

  Returns:
    [B] bool, False where the whole modality is missing.
  """
  if m.x.ndim == 2:
    return (m.seen & m.valid & ~ends(m.valid)).any(1)
  return (m.seen & m.valid[..., None]).any((1, 2))


def see(m: types.Modality, seen: types.Array) -> types.Modality:
  """And-s a mask into `seen`.

  Args:
    m: the modality.
    seen: bool, False where an entry goes missing; broadcasts against `m.x`, see `steps`.

  Returns:
    The modality with less seen.
  """
  return m._replace(seen=m.seen & seen)


def steps(m: types.Modality, seen: types.Array) -> types.Array:
  """Shapes a step mask like the modality's `seen`, and spares the special tokens of ids.

  Args:
    m: the modality.
    seen: [B, L] bool.

  Returns:
    [B, L, 1], or [B, L] for token ids.
  """
  return seen | ends(m.valid) if m.x.ndim == 2 else seen[..., None]


def span_bounds(
  u: chex.Numeric, rate: chex.Numeric, length: chex.Numeric
) -> tuple[types.Array, types.Array]:
  """Start λ and length k of a missing span (M³S §3.2, Chi et al. 2022).

    k = floor(T · r),  λ = floor(u · (T - k + 1)), uniform on the integers 0 … T - k.

  This is the one place that defines k: the product in the precision of `rate`. A product that
  should be an integer may round to just below it, and k is then one less than the decimal
  rate says. In float32 that spares all rates in tenths up to T = 512, and among the
  hundredths it happens 26 times (the first: T = 100 at 0.53, T = 75 at 0.84); float64 has 25
  others (T = 100 at 0.29, T = 90 at 0.7). A tolerance would mend those, and would
  break the agreement with float64 references for nothing: one step of T.

  Args:
    u: uniform draws in [0, 1).
    rate: missing rates in [0, 1].
    length: valid lengths T, integers. The arguments broadcast; they are scalars or of one rank.

  Returns:
    λ and k, int32.
  """
  u, rate, length = jnp.asarray(u), jnp.asarray(rate), jnp.asarray(length)
  k = jnp.floor(length.astype(rate.dtype) * rate).astype(jnp.int32)
  last = length.astype(jnp.int32) - k
  start = jnp.floor(u * (last + 1).astype(u.dtype)).astype(jnp.int32)
  return jnp.minimum(start, last), k  # u just below 1 may round up to 1


def span_mask(start: types.Array, k: types.Array, size: int) -> types.Array:
  """False on the steps start … start + k - 1, True elsewhere.

  Args:
    start: [...] first missing step λ.
    k: [...] number of missing steps.
    size: number of steps, padding included.

  Returns:
    [..., size] bool.
  """
  start, k = jnp.asarray(start, jnp.int32), jnp.asarray(k, jnp.int32)
  start, end = start[..., None], (start + k)[..., None]
  step = jnp.arange(size, dtype=jnp.int32).reshape(*[1] * (start.ndim - 1), size)
  return (step < start) | (step >= end)


def step_mask(u: types.Array, rate: types.Array, valid: types.Array) -> types.Array:
  """False on the valid steps with u <= rate (LNLN, and TFR-Net as published in MMSA).

  Args:
    u: [..., L] uniform draws in [0, 1).
    rate: missing rates, broadcast against `u`.
    valid: [..., L] bool, False on padding, which is never missing.

  Returns:
    [..., L] bool.
  """
  return (jnp.asarray(u) > rate) | ~jnp.asarray(valid)


def at_least_one(view: chex.Array, u: chex.Array, keep: chex.Numeric) -> types.Array:
  """One modality that stays in any case, and the others where u < keep (GCNet's masks).

  Args:
    view: [B] which one of the M stays.
    u: [B, M] draws.
    keep: how often each stays beside it, in the draws' units; broadcasts against `u`.

  Returns:
    [B, M] bool, False where a modality is missing.
  """
  u = jnp.asarray(u)
  return (jnp.asarray(view)[:, None] == jnp.arange(u.shape[1])[None]) | (u < keep)


def ends(valid: types.Array) -> types.Array:
  """True on the first and the last valid step: [CLS] and [SEP] of token ids.

  Args:
    valid: [..., L] bool, the real steps come first.

  Returns:
    [..., L] bool.
  """
  valid = jnp.asarray(valid)
  step = jnp.broadcast_to(jnp.arange(valid.shape[-1]), valid.shape)
  return ((step == 0) | (step == valid.sum(-1, keepdims=True) - 1)) & valid


def threefry(key: types.PRNGKey) -> types.PRNGKey:
  """The key as one of threefry, whatever its kind; one of threefry keeps its bits.

  Under `rbg`, usual on TPUs, draws that are vmapped over keys hang on all of the keys: a
  sample's mask would depend on the other rows of its batch.

  Args:
    key: [] a key, or the words [2] or [4] of a legacy one.

  Returns:
    [] the key.
  """
  typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
  words = jax.random.key_data(key) if typed else key
  chex.assert_rank(words, 1)
  key = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
  for word in words[2:]:
    key = jax.random.fold_in(key, word)
  return key


def sample_keys(key: types.PRNGKey, index: types.Array) -> types.PRNGKey:
  """A key for each modality and sample.

  Args:
    key: [] of any kind.
    index: [B] the samples' rows in their split.

  Returns:
    [3, B] keys of threefry.
  """
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  return jax.vmap(fold, (0, None))(fold(threefry(key), jnp.arange(len(types.MODALITIES))), index)


def shared_uniforms(key: types.PRNGKey, index: types.Array, count: int) -> types.Array:
  """Draws that a sample's modalities share.

  Args:
    key: [] of any kind.
    index: [B] the samples' rows in their split.
    count: n, how many.

  Returns:
    [B, n] uniforms in [0, 1).
  """
  keys = sample_keys(key, index)[0]
  return jax.vmap(functools.partial(jax.random.uniform, shape=(count,)))(keys)


def with_rates(
  rate: Rate,
  draws: Callable[[types.Modality], int],
  mask_modality: Callable[[types.Modality, types.Array, types.Array], types.Array],
) -> types.MaskFn:
  """Lifts a rule for one modality over all of them, with draws and rates for every sample.

  Args:
    rate: the missing rate, see the package.
    draws: `modality -> n`, the number of uniforms that the rule needs for a sample.
    mask_modality: `(modality, u [B, n], rates [B]) -> mask`, which broadcasts against `x`.

  Returns:
    The mask.

  Raises:
    UsageError: on a rate that is not within [0, 1], or misshapen.
  """
  bounds: Any = intervals(rate)

  def mask(key, batch):
    keys = sample_keys(key, batch.index)
    for i, name in enumerate(types.MODALITIES):
      m = getattr(batch, name)
      chex.assert_rank(m.valid, 2)
      chex.assert_equal_shape_prefix((m.x, m.valid), 2)
      # the first number draws the rate, the others the mask
      u = jax.vmap(functools.partial(jax.random.uniform, shape=(1 + draws(m),)))(keys[i])
      rates = within(bounds[i], u[:, 0])
      batch = batch._replace(**{name: see(m, mask_modality(m, u[:, 1:], rates))})
    return batch

  return mask


def within(bounds: chex.Array, u: types.Array) -> types.Array:
  """Rates drawn from an interval.

  Args:
    bounds: [2] lowest and highest rate.
    u: [B] uniforms.

  Returns:
    [B] rates.
  """
  low, high = jnp.asarray(bounds, jnp.result_type(float))
  return low + (high - low) * u


def intervals(rate: Rate) -> chex.Array:
  """Any form of missing rate as intervals.

  Args:
    rate: see the package.

  Returns:
    [3, 2] the lowest and the highest rate of text, audio, vision.

  Raises:
    UsageError: on a rate that is not within [0, 1], or misshapen.
  """
  if isinstance(rate, Mapping):
    check_names("rate", rate)
    pairs = [_stack(rate.get(name, 0.0)) for name in types.MODALITIES]
    if any(pair.shape not in ((), (2,)) for pair in pairs):
      raise types.UsageError(
        f"a modality's missing rate must be a number or (low, high): {rate!r}."
      )
    found: Any = _stack([[pair, pair] if pair.ndim == 0 else pair for pair in pairs])
  else:
    rates = _stack(rate)
    if rates.shape not in ((), (2,), (3,), (3, 2)):
      raise types.UsageError(
        "a missing rate must be a number, (low, high), a mapping by modality name, or an array"
        f" [3] or [3, 2]; this one has shape {rates.shape}: {rate!r}."
      )
    xp: Any = _namespace(rates)
    if rates.ndim == 1 and rates.shape[0] == 3:
      rates = rates[:, None]
    found = xp.broadcast_to(rates, (3, 2))
  check_unit("missing rate", found)
  if isinstance(found, np.ndarray) and (found[:, 0] > found[:, 1]).any():
    raise types.UsageError(f"missing rates must be (low, high) with low <= high, got {rate!r}.")
  return found


def _namespace(x: Any) -> Any:
  """jnp for anything traced, numpy (float64, hence exact in any precision) for the rest."""
  traced = any(isinstance(leaf, core.Tracer) for leaf in jax.tree.leaves(x))
  return jnp if traced else np


def _stack(x: Any) -> Any:
  """Numbers, arrays or nested sequences of them as one float array."""
  if isinstance(x, str):
    raise types.UsageError(f"a missing rate must be made of numbers, got {x!r}.")
  if isinstance(x, Sequence):
    parts = [_stack(part) for part in x]
    if len({part.shape for part in parts}) > 1:
      raise types.UsageError(f"the parts of a missing rate differ in shape: {x!r}.")
    return _namespace(parts).stack(parts) if parts else np.zeros(0)
  return _namespace(x).asarray(x, dtype=float)


def check_unit(what: str, value: Any) -> None:
  """Raises UsageError if a concrete value lies outside of [0, 1]; a traced one passes."""
  if _namespace(value) is np:
    value = np.asarray(value, float)
    if not ((value >= 0) & (value <= 1)).all():  # also catches NaN
      raise types.UsageError(f"{what} must lie within [0, 1], got {value.tolist()}.")


def check_names(what: str, names: Collection[str]) -> None:
  """Raises UsageError on anything that is not a modality's name."""
  unknown = sorted(set(names) - set(types.MODALITIES))
  if isinstance(names, str) or unknown:
    raise types.UsageError(f"{what}: {names!r} must hold names out of {types.MODALITIES} only.")
