"""Missing data: transforms that mark entries of a batch as unseen.

A `MaskFn` takes a key and a batch and rewrites `seen` only: `x` stays clean, so that a
teacher or a reconstruction target can read it, while `observed` is what a student path
reads and `erase` makes the clean values unreachable.

Rules that hold for every transform here:

  * A sample's mask depends on the key, its `batch.index` and the modality, and on nothing
    else: neither on the batch size nor on the order of the samples.
  * Masks only take away: a new mask is and-ed into `seen`.
  * Padding steps are left as they are (a step mask is True on them). They hold 0 or [PAD],
    and models leave them out by `valid`.
  * Of token ids, the first and the last valid one ([CLS], [SEP]) always stay seen; the others
    become `fill` ([UNK]) when they are missing, and the attention mask `valid` stays.

A missing rate is a number; a `(low, high)` pair, from which every sample and modality draws
its own rate uniformly; a mapping from modality names to either (a modality that is left out
stays complete); or an array [3] or [3, 2], in the order text, audio, vision. Rates may be
traced, so a grid of rates compiles once; rates that are not traced are checked.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mmjax import types

Rate = Any  # a number, a pair, a mapping of either by modality name, or an array: see above

# All sets of missing modalities, from none to all: SUBSETS[1:7] are the six in which some
# but not all modalities are missing, SUBSETS[:7] those that leave at least one.
SUBSETS = (
  (),
  ("text",),
  ("audio",),
  ("vision",),
  ("text", "audio"),
  ("text", "vision"),
  ("audio", "vision"),
  ("text", "audio", "vision"),
)

AXES = ("time", "feature")


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
  return batch._replace(
    **{
      name: getattr(batch, name)._replace(x=observed(getattr(batch, name)))
      for name in types.MODALITIES
    }
  )


def complete(batch: types.Batch) -> types.Batch:
  """The data with nothing missing: what teachers and reconstruction targets read."""
  return _mark(batch, lambda m: jnp.ones_like(m.seen))


def complement(batch: types.Batch) -> types.Batch:
  """The part of the data that is not observed, and nothing else (MMIN's imagination target)."""
  return _mark(batch, lambda m: ~m.seen)


def _mark(batch: types.Batch, seen: Callable[[types.Modality], types.Array]) -> types.Batch:
  pairs = [(name, getattr(batch, name)) for name in types.MODALITIES]
  return batch._replace(**{name: m._replace(seen=seen(m)) for name, m in pairs})


def span_bounds(
  u: types.Array, rate: types.Array, length: types.Array
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
    length: valid lengths T, integers. The arguments broadcast.

  Returns:
    λ and k, int32.
  """
  u, rate = jnp.asarray(u), jnp.asarray(rate)
  k = jnp.floor(jnp.asarray(length).astype(rate.dtype) * rate).astype(jnp.int32)
  last = jnp.asarray(length).astype(jnp.int32) - k
  start = jnp.floor(u * (last + 1)).astype(jnp.int32)
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
  step = jnp.arange(size)
  start, k = jnp.asarray(start)[..., None], jnp.asarray(k)[..., None]
  return (step < start) | (step >= start + k)


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


def ends(valid: types.Array) -> types.Array:
  """True on the first and the last valid step: [CLS] and [SEP] of token ids.

  Args:
    valid: [..., L] bool, the real steps come first.

  Returns:
    [..., L] bool.
  """
  valid = jnp.asarray(valid)
  step = jnp.arange(valid.shape[-1])
  return ((step == 0) | (step == valid.sum(-1, keepdims=True) - 1)) & valid


def span(rate: Rate, *, axis: str = "time") -> types.MaskFn:
  """One contiguous span of each sample and modality goes missing (M³S §3.2).

  Args:
    rate: the missing rate r, see the module's docstring.
    axis: "time", k of the sample's own valid steps; or "feature", k of the channels at all
      steps (not for token ids). The paper's T_m can be read either way.

  Returns:
    The mask. On token ids the span is drawn over all valid tokens, the protected ones
    included, so that r is the rate of the sentence as the model counts its length.

  Raises:
    ValueError: on an unknown axis, a rate that is not within [0, 1] or misshapen; when the
      mask is applied, on token ids with axis="feature".
  """
  if axis not in AXES:
    raise ValueError(f"axis is {axis!r}, expected one of {AXES}.")

  def mask(m: types.Modality, u, rates):
    if axis == "time":
      bounds = span_bounds(u[:, 0], rates, m.valid.sum(-1))
      return _steps(m, span_mask(*bounds, m.valid.shape[-1]) | ~m.valid)
    if m.x.ndim == 2:
      raise ValueError("token ids have no feature axis: use span(axis='time') for them.")
    dim = m.x.shape[-1]
    return span_mask(*span_bounds(u[:, 0], rates, dim), dim)[:, None, :]

  return _with_rates(rate, lambda m: 1, mask)


def bernoulli(rate: Rate, *, complete_share: types.Array | float = 0.0) -> types.MaskFn:
  """Every step goes missing on its own with probability r (LNLN, and TFR-Net in MMSA).

  LNLN trains with `bernoulli((0.0, 1.0), complete_share=0.5)`. (Its code draws exactly half of
  the samples, and the same uniforms for all modalities; here samples and modalities are
  independent of each other.)

  Args:
    rate: the missing rate r, see the module's docstring.
    complete_share: probability with which a sample's modality stays complete; may be traced.

  Returns:
    The mask.

  Raises:
    ValueError: on a rate or share that is not within [0, 1], or a misshapen rate.
  """
  _check_unit("complete_share", complete_share)

  def mask(m: types.Modality, u, rates):
    rates = jnp.where(u[:, 0] < complete_share, 0.0, rates)[:, None]
    seen = step_mask(u[:, 1:], rates, m.valid) | (rates == 0)  # u may be exactly 0
    return _steps(m, seen)

  return _with_rates(rate, lambda m: 1 + m.valid.shape[-1], mask)


def drop(*modalities: str) -> types.MaskFn:
  """Whole modalities go missing, of every sample: `drop("audio", "vision")`.

  Args:
    *modalities: names of the missing modalities.

  Returns:
    The mask; it draws nothing.
  """
  _check_names("drop", modalities)

  def mask(key, batch):
    del key
    for name in modalities:
      m = getattr(batch, name)
      batch = batch._replace(**{name: _see(m, _steps(m, ~m.valid))})
    return batch

  return mask


def random_drop(
  subsets: Sequence[Collection[str]] = SUBSETS[1:7], *, rate: types.Array | float | None = None
) -> types.MaskFn:
  """Each sample loses a random set of modalities.

  Args:
    subsets: the sets of missing modalities that may be drawn. By default the six that leave
      something and take something (MMIN's training); with `SUBSETS[:7]` samples may also stay
      complete, with `SUBSETS` all three may go.
    rate: None draws all `subsets` equally often. A rate p makes every modality missing
      independently with probability p, given that the outcome is one of `subsets`; may be
      traced.

  Returns:
    The mask.

  Raises:
    ValueError: on no subset at all, an unknown modality, or a rate outside of [0, 1].
  """
  if not subsets:
    raise ValueError("random_drop needs at least one subset to draw from.")
  for subset in subsets:
    _check_names("random_drop", subset)
  table = np.array([[name in subset for name in types.MODALITIES] for subset in subsets])
  if rate is not None:
    _check_unit("rate", rate)

  def mask(key, batch):
    p = jnp.asarray(0.5 if rate is None else rate, jnp.result_type(float))
    # finite, so that p = 0 and p = 1 draw the smallest and the largest of the subsets
    logits = table.sum(-1) * jnp.clip(jax.scipy.special.logit(p), -99.0, 99.0)
    keys = _sample_keys(key, batch.index)[0]  # one draw for all modalities
    drawn = jax.vmap(lambda k: jax.random.categorical(k, logits))(keys)
    missing = jnp.asarray(table)[drawn]  # [B, 3]
    for i, name in enumerate(types.MODALITIES):
      m = getattr(batch, name)
      batch = batch._replace(**{name: _see(m, _steps(m, ~(missing[:, i, None] & m.valid)))})
    return batch

  return mask


def compose(*masks: types.MaskFn) -> types.MaskFn:
  """Applies masks one after the other, each with a key of its own: what any takes is gone."""

  def mask(key, batch):
    for i, one in enumerate(masks):
      batch = one(jax.random.fold_in(key, i), batch)
    return batch

  return mask


def _see(m: types.Modality, seen: types.Array) -> types.Modality:
  """And-s a mask into `seen`."""
  return m._replace(seen=m.seen & seen)


def _steps(m: types.Modality, seen: types.Array) -> types.Array:
  """Shapes a [B, L] step mask like the modality's `seen`, and spares the special tokens."""
  if m.x.ndim == 2:
    return seen | ends(m.valid)
  return seen[..., None]


def _sample_keys(key: types.PRNGKey, index: types.Array) -> types.PRNGKey:
  """[3, B] keys, one for each modality and row of `index`."""
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  return jax.vmap(fold, (0, None))(fold(key, jnp.arange(len(types.MODALITIES))), index)


def _with_rates(
  rate: Rate,
  draws: Callable[[types.Modality], int],
  mask_modality: Callable[[types.Modality, types.Array, types.Array], types.Array],
) -> types.MaskFn:
  """Lifts `(modality, u [B, draws(modality)], rates [B]) -> mask` over the modalities."""
  intervals = _intervals(rate)

  def mask(key, batch):
    bounds = jnp.asarray(intervals, jnp.result_type(float))
    keys = _sample_keys(key, batch.index)
    for i, name in enumerate(types.MODALITIES):
      m, (low, high) = getattr(batch, name), bounds[i]
      chex.assert_rank(m.valid, 2)
      chex.assert_equal_shape_prefix((m.x, m.valid), 2)
      # the first number draws the rate, the others the mask
      u = jax.vmap(functools.partial(jax.random.uniform, shape=(1 + draws(m),)))(keys[i])
      rates = low + (high - low) * u[:, 0]
      batch = batch._replace(**{name: _see(m, mask_modality(m, u[:, 1:], rates))})
    return batch

  return mask


def _intervals(rate: Rate) -> types.Array:
  """Any form of missing rate as [3, 2]: lowest and highest of text, audio, vision."""
  if isinstance(rate, Mapping):
    _check_names("rate", rate)
    pairs = [_stack(rate.get(name, 0.0)) for name in types.MODALITIES]
    if any(pair.shape not in ((), (2,)) for pair in pairs):
      raise ValueError(f"a modality's missing rate must be a number or (low, high): {rate!r}.")
    intervals = _stack([_stack([pair, pair]) if pair.ndim == 0 else pair for pair in pairs])
  else:
    rates = _stack(rate)
    if rates.shape not in ((), (2,), (3,), (3, 2)):
      raise ValueError(
        "a missing rate must be a number, (low, high), a mapping by modality name, or an array"
        f" [3] or [3, 2]; this one has shape {rates.shape}: {rate!r}."
      )
    xp = _namespace(rates)
    if rates.ndim == 1 and rates.shape[0] == 3:
      rates = rates[:, None]
    intervals = xp.broadcast_to(rates, (3, 2))
  _check_unit("missing rate", intervals)
  if isinstance(intervals, np.ndarray) and (intervals[:, 0] > intervals[:, 1]).any():
    raise ValueError(f"missing rates must be (low, high) with low <= high, got {rate!r}.")
  return intervals


def _namespace(x: Any):
  """jnp for anything traced, numpy (float64, hence exact in any precision) for the rest."""
  traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x))
  return jnp if traced else np


def _stack(x: Any) -> types.Array:
  """Numbers, arrays or nested sequences of them as one float array."""
  if isinstance(x, Sequence):
    parts = [_stack(part) for part in x]
    if len({part.shape for part in parts}) > 1:
      raise ValueError(f"the parts of a missing rate differ in shape: {x!r}.")
    return _namespace(parts).stack(parts) if parts else np.zeros(0)
  return _namespace(x).asarray(x, dtype=float)


def _check_unit(what: str, value: Any) -> None:
  """Raises if a concrete value lies outside of [0, 1]; a traced one passes."""
  if _namespace(value) is np:
    value = np.asarray(value, float)
    if not ((value >= 0) & (value <= 1)).all():  # also catches NaN
      raise ValueError(f"{what} must lie within [0, 1], got {value.tolist()}.")


def _check_names(what: str, names: Collection[str]) -> None:
  """Raises on anything that is not a modality's name."""
  unknown = sorted(set(names) - set(types.MODALITIES))
  if isinstance(names, str) or unknown:
    raise ValueError(f"{what}: {names!r} must hold names out of {types.MODALITIES} only.")
