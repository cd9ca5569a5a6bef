"""Protocols of missing data: the factories of masks, and `MASKS` of all that have a name.

A factory takes keyword settings that JSON can hold and returns a `MaskFn`. One that is swept
over takes `rate`, which a grid traces. Reports say the first line of its docstring, and of its
argument `rate` what stands before the first ";" or "." (`quantity`), as authors mean other things
by a missing rate.
"""

import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from mmjax import registry, types
from mmjax.masking import transforms
from mmjax.masking.transforms import Rate, see, steps

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

# A mask, or the settings of one as `make` takes them: {"name": "span", "rate": 0.3}.
Member = types.MaskFn | Mapping[str, Any]


def span(rate: Rate, *, axis: str = "time") -> types.MaskFn:
  """One contiguous span of each sample and modality goes missing (M³S §3.2).

  Args:
    rate: r, share of the sample's valid steps that the span covers; see the package.
    axis: "time", k of the sample's own valid steps; or "feature", k of the channels at all
      steps (not for token ids). The paper's T_m can be read either way.

  Returns:
    The mask. On token ids the span is drawn over all valid tokens, the protected ones
    included, so that r is the rate of the sentence as the model counts its length.

  Raises:
    UsageError: on an unknown axis, a rate that is not within [0, 1] or misshapen; when the
      mask is applied, on token ids with axis="feature".
  """
  if axis not in AXES:
    raise types.UsageError(f"axis is {axis!r}, expected one of {AXES}.")

  def mask(m: types.Modality, u, rates):
    if axis == "time":
      bounds = transforms.span_bounds(u[:, 0], rates, m.valid.sum(-1))
      return steps(m, transforms.span_mask(*bounds, m.valid.shape[-1]) | ~m.valid)
    if m.x.ndim == 2:
      raise types.UsageError("token ids have no feature axis: use span(axis='time') for them.")
    dim = m.x.shape[-1]
    return transforms.span_mask(*transforms.span_bounds(u[:, 0], rates, dim), dim)[:, None, :]

  return transforms.with_rates(rate, lambda m: 1, mask)


def bernoulli(rate: Rate, *, complete_share: types.Array | float = 0.0) -> types.MaskFn:
  """Every step goes missing on its own with probability p (LNLN, and TFR-Net in MMSA).

  LNLN trains with `bernoulli((0.0, 1.0), complete_share=0.5)`. (Its code draws exactly half of
  the samples, and the same uniforms for all modalities; here samples and modalities are
  independent of each other.)

  Args:
    rate: p, probability of each step to go missing; see the package.
    complete_share: probability with which a sample's modality stays complete; may be traced.

  Returns:
    The mask.

  Raises:
    UsageError: on a rate or share that is not within [0, 1], or a misshapen rate.
  """
  transforms.check_unit("complete_share", complete_share)

  def mask(m: types.Modality, u, rates):
    rates = jnp.where(u[:, 0] < complete_share, 0.0, rates)[:, None]
    seen = transforms.step_mask(u[:, 1:], rates, m.valid) | (rates == 0)  # u may be exactly 0
    return steps(m, seen)

  return transforms.with_rates(rate, lambda m: 1 + m.valid.shape[-1], mask)


def drop(missing: str | Collection[str]) -> types.MaskFn:
  """Whole modalities go missing, the same of every sample.

  Args:
    missing: the missing modality, or several.

  Returns:
    The mask; it draws nothing.

  Raises:
    UsageError: on an unknown modality.
  """
  missing = (missing,) if isinstance(missing, str) else missing
  transforms.check_names("missing", missing)

  def mask(key, batch):
    del key
    for name in missing:
      m = getattr(batch, name)
      batch = batch._replace(**{name: see(m, steps(m, ~m.valid))})
    return batch

  return mask


def random_drop(
  rate: Rate = 0.5, *, subsets: Sequence[Collection[str]] = SUBSETS[1:7]
) -> types.MaskFn:
  """Each sample loses whole modalities, each with probability p, as long as some are left.

  Args:
    rate: p, probability of each modality to go missing, given that the outcome is one of
      `subsets`; independently of the others. By default all subsets are drawn equally
      often (MMIN's training, Zhao et al. 2021 §3.1).
    subsets: the sets of missing modalities that may be drawn. By default the six that leave
      something and take something (MMIN's); with `SUBSETS[:7]` samples may also stay
      complete, with `SUBSETS` all three may go.

  Returns:
    The mask.

  Raises:
    UsageError: on no subset at all, an unknown modality, a rate that is not within [0, 1] or
      misshapen.
  """
  if not len(subsets):
    raise types.UsageError("random_drop needs at least one subset to draw from.")
  for subset in subsets:
    transforms.check_names("subsets", subset)
  table = np.array([[name in subset for name in types.MODALITIES] for subset in subsets])
  bounds: Any = transforms.intervals(rate)

  def mask(key, batch):
    keys = transforms.sample_keys(key, batch.index)
    logits = 0.0
    for i in range(len(types.MODALITIES)):
      u = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 1)))(keys[i])
      p = transforms.within(bounds[i], u)[:, None]
      # finite, so that p = 0 and p = 1 draw the smallest and the largest of the subsets
      logit = jnp.clip(jax.scipy.special.logit(p), -99.0, 99.0)
      logits += logit * table[None, :, i].astype(logit.dtype)
    drawn = jax.vmap(jax.random.categorical)(keys[0], logits)  # one draw for all modalities
    missing = jnp.asarray(table)[drawn]  # [B, 3]
    for i, name in enumerate(types.MODALITIES):
      m = getattr(batch, name)
      batch = batch._replace(**{name: see(m, steps(m, ~(missing[:, i, None] & m.valid)))})
    return batch

  return mask


def frames(rate: Rate) -> types.MaskFn:
  """Of each sample and modality a random share of the steps goes missing (HRLF's test).

  Li et al. 2024 (arXiv 2411.02793, §4.3) drop frames "with ratio p" from 0 to 1; their code is not
  public. Here it is the ratio itself, k = floor(T · p) of T valid steps, each set of k alike, where
  `bernoulli` has it in the mean only.

  Args:
    rate: p, share of the valid steps that go missing; see the package.

  Returns:
    The mask. Of token ids, k are drawn among all valid ones, the protected ones included.

  Raises:
    UsageError: on a rate that is not within [0, 1], or misshapen.
  """

  def mask(m: types.Modality, u, rates):
    _, k = transforms.span_bounds(u[:, 0], rates, m.valid.sum(-1))
    # a step's rank among the draws of its modality, padding last
    rank = jnp.argsort(jnp.argsort(jnp.where(m.valid, u, 2.0), axis=-1), axis=-1)
    return steps(m, (rank >= k[:, None]) | ~m.valid)

  return transforms.with_rates(rate, lambda m: m.valid.shape[-1], mask)


def blocks(rate: Rate) -> types.MaskFn:
  """One block of time goes missing in all modalities at once (aligned dropping, as OpenVNA's).

  A camera and its microphone fail together: the structural, temporally aligned missing of TFR-Net
  (Yuan et al. 2021) and OpenVNA (Yuan et al. 2024, arXiv 2407.02773). A sample's modalities share
  the draw of where the block begins (and of the rate, if that is an interval), each in its own
  steps: k = floor(T · r) of them from floor(u · (T - k + 1)) on, see `transforms.span_bounds`; they
  are the same steps where the modalities are aligned.

  Args:
    rate: r, share of the time that the block covers; see the package.

  Returns:
    The mask.

  Raises:
    UsageError: on a rate that is not within [0, 1], or misshapen.
  """
  bounds: Any = transforms.intervals(rate)

  def mask(key, batch):
    u = transforms.shared_uniforms(key, batch.index, 2)
    for i, name in enumerate(types.MODALITIES):
      m = getattr(batch, name)
      rates = transforms.within(bounds[i], u[:, 0])
      block = transforms.span_bounds(u[:, 1], rates, m.valid.sum(-1))
      seen = transforms.span_mask(*block, m.valid.shape[-1]) | ~m.valid
      batch = batch._replace(**{name: see(m, steps(m, seen))})
    return batch

  return mask


def available(modalities: str | Collection[str]) -> types.MaskFn:
  """Only some modalities are there, the same of every sample (HRLF's and others' test sets).

  Args:
    modalities: those that are left, one or several; `drop` is the complement.

  Returns:
    The mask; it draws nothing.

  Raises:
    UsageError: on an unknown modality.
  """
  modalities = (modalities,) if isinstance(modalities, str) else modalities
  transforms.check_names("modalities", modalities)
  return drop([name for name in types.MODALITIES if name not in modalities])


# At IMDer's MR of 0, 0.1 … 0.7: the shares of samples that keep one modality, and two.
IMDER_ONE = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
IMDER_TWO = (0.0, 0.1, 0.2, 0.3, 0.2, 0.1, 0.0, 0.0)


def imder(rate: Rate) -> types.MaskFn:
  """Each sample loses no, one or two whole modalities, in shares that a rate fixes (IMDer).

  Wang et al. 2023 (NeurIPS): at MR = 0.1 … 0.7 a share `IMDER_ONE` of the samples keeps one
  modality, a share `IMDER_TWO` keeps two (in between: interpolated); which ones is drawn
  uniformly. MR is then the share of missing modalities, 0.7 standing for 2/3.

  The published code draws one pattern for each batch, not each sample, and deals the numbers out in
  the order of the batches: the first ones of every epoch have one modality left, the next two, the
  last ones all. Training is shuffled, but validation and test are not, so there the first samples
  of the file always lose most, and a whole batch loses the same. Here samples are drawn one by one,
  whatever their order.

  Args:
    rate: MR, share of all modalities that are missing; one for all of them, at most 0.7.

  Returns:
    The mask.

  Raises:
    UsageError: on a rate that is not within [0, 0.7] or misshapen, or differs between modalities.
  """
  bounds: Any = transforms.intervals(rate)
  if isinstance(bounds, np.ndarray):
    if (bounds != bounds[:1]).any():
      raise types.UsageError(f"imder: MR is one rate for all modalities, got {rate!r}.")
    if bounds.max() > 0.7 + 1e-6:
      raise types.UsageError(f"imder: MR is at most 0.7, as one modality stays; got {rate!r}.")
  sets = [SUBSETS[0], *SUBSETS[1:7]]
  table = np.array([[name in missing for name in types.MODALITIES] for missing in sets])

  def mask(key, batch):
    u = transforms.shared_uniforms(key, batch.index, 3)
    rates = transforms.within(bounds[0], u[:, 0])
    known = jnp.arange(len(IMDER_ONE), dtype=rates.dtype) / 10
    one, two = (jnp.interp(rates, known, jnp.asarray(x)) for x in (IMDER_ONE, IMDER_TWO))
    third = jnp.minimum(jnp.floor(3 * u[:, 2]), 2).astype(jnp.int32)
    # SUBSETS: none missing, then one of three, then two of three
    drawn = jnp.where(u[:, 1] < one, 4 + third, jnp.where(u[:, 1] < one + two, 1 + third, 0))
    missing = jnp.asarray(table)[drawn]  # [B, 3]
    for i, name in enumerate(types.MODALITIES):
      m = getattr(batch, name)
      batch = batch._replace(**{name: see(m, steps(m, ~(missing[:, i, None] & m.valid)))})
    return batch

  return mask


def gcnet(rate: Rate) -> types.MaskFn:
  """Each sample loses whole modalities at a rate up to 2/3, but never all of them (GCNet's).

  Lian et al. 2022 §4.2, after CPM-Net: one modality, drawn uniformly, stays; each other stays with
  probability 1 - 3/2 r, so that a share r of all is missing. From r = 2/3 on exactly one stays.
  The published code draws a batch's masks again until their mean is within 0.005 of the rate, and
  takes the probability from a first draw; a sample's mask would then hang on the batch that it is
  in. This is the law that it tends to in large batches. (A host's and a guest's masks are
  independent there, as those of all utterances are here.)

  Args:
    rate: r, share of all modalities that are missing, at most 2/3; the same for all of them in
      the paper. Where they differ, the one that stays is drawn in proportion to 1 - r: a modality
      of rate 1 always goes, as long as another one's is below, and one of rate 0 always stays.

  Returns:
    The mask.

  Raises:
    UsageError: on a rate that is not within [0, 1] or misshapen, or above 0.7 for all modalities:
      as one stays, no more than 2/3 can be missing.
  """
  bounds: Any = transforms.intervals(rate)
  if isinstance(bounds, np.ndarray) and bounds[:, 1].min() > 0.7 + 1e-6:
    raise types.UsageError(
      f"gcnet: a rate of {bounds[:, 1].min():g} cannot be, since one modality of each sample stays:"
      " no more than 2/3 is ever missing, which the protocol writes as 0.7."
    )

  def mask(key, batch):
    keys = transforms.sample_keys(key, batch.index)

    def uniform(i, n):
      return jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, n)))(keys[i])

    of_rate = uniform(0, 1)  # a sample's modalities share its rate
    each = range(len(types.MODALITIES))
    rates = jnp.stack([transforms.within(bounds[i], of_rate) for i in each], 1)
    logits = jnp.log(jnp.maximum(1 - rates, 1e-30))
    view = jax.vmap(jax.random.categorical)(keys[0], logits)
    u = jnp.stack([uniform(i, 2) for i in each], 1)
    seen = transforms.at_least_one(view, u, 1 - 1.5 * rates)
    for i, name in enumerate(types.MODALITIES):
      m = getattr(batch, name)
      batch = batch._replace(**{name: see(m, steps(m, seen[:, i, None] | ~m.valid))})
    return batch

  return mask


def compose(masks: Sequence[Member], rate: Rate | None = None) -> types.MaskFn:
  """Several masks at once: what any of them takes is missing.

  Args:
    masks: the masks, or their settings; they are applied one after the other, each with a key
      of its own.
    rate: of the masks that take a rate and whose settings have none.

  Returns:
    The mask.

  Raises:
    UsageError: on no mask at all, wrong settings of one, or a rate that none of them takes.
  """
  members = _members("compose", masks, rate)

  def mask(key, batch):
    key = transforms.threefry(key)
    for i, one in enumerate(members):
      batch = one(jax.random.fold_in(key, i), batch)
    return batch

  return mask


def msm(p: Rate = (0.0, 1.0), *, subsets: Sequence[Collection[str]] = SUBSETS[:7]) -> types.MaskFn:
  """Each sample loses whole modalities and, of those left, single steps (HRLF's training, MSM).

  Li et al. 2024 (arXiv 2411.02793, §3.2) do not state the distribution of their modality
  stochastic missing; this one is ours. It has no one missing rate that tables could sweep over.

  Args:
    p: probability with which each step of a modality that is left goes missing; drawn anew for
      each sample and modality from an interval. A rate as the package says.
    subsets: the sets of missing modalities, drawn equally often; by default the seven that leave
      at least one.

  Returns:
    The mask.

  Raises:
    UsageError: as `random_drop` and `bernoulli`.
  """
  return compose([random_drop(subsets=subsets), bernoulli(p)])


def mixture(
  masks: Sequence[Member],
  shares: Sequence[float] | types.Array | None = None,
  rate: Rate | None = None,
) -> types.MaskFn:
  """Each sample draws one of several masks, for all of its modalities.

  Args:
    masks: the masks, or their settings.
    shares: how often each is drawn, up to their sum; equally often by default. May be traced.
    rate: of the masks that take a rate and whose settings have none.

  Returns:
    The mask.

  Raises:
    UsageError: on no mask at all, wrong settings of one, a rate that none of them takes, or
      shares that are not one number >= 0 for each with a positive sum.
  """
  members = _members("mixture", masks, rate)
  given = [1.0] * len(members) if shares is None else shares
  if not isinstance(given, core.Tracer):
    given = np.asarray(given, float)
    if not (given.shape == (len(members),) and (given >= 0).all() and 0 < given.sum() < np.inf):
      raise types.UsageError(
        f"mixture: shares must be {len(members)} numbers >= 0, one for each mask and not all"
        f" of them 0, got {shares!r}."
      )

  def mask(key, batch):
    key = transforms.threefry(key)
    logits = jnp.log(jnp.asarray(given, jnp.result_type(float)))
    keys = transforms.sample_keys(jax.random.fold_in(key, len(members)), batch.index)[0]
    drawn = jax.vmap(lambda k: jax.random.categorical(k, logits))(keys)  # [B]
    masked = [one(jax.random.fold_in(key, i), batch) for i, one in enumerate(members)]
    for name in types.MODALITIES:
      m = getattr(batch, name)
      seen = m.seen
      for i, other in enumerate(masked):
        own = (drawn == i).reshape(-1, *[1] * (m.x.ndim - 1))
        seen = jnp.where(own, getattr(other, name).seen, seen)
      batch = batch._replace(**{name: m._replace(seen=seen)})
    return batch

  return mask


def _members(what: str, masks: Sequence[Member], rate: Rate | None) -> list[types.MaskFn]:
  """Masks out of masks and settings; those that want a rate get `rate`."""
  if isinstance(masks, Mapping | str) or not len(masks):
    raise types.UsageError(f"{what}: masks must be a list of at least one mask, got {masks!r}.")
  made, takers = [], 0
  for one in masks:
    if isinstance(one, Mapping):
      if "name" not in one:
        raise types.UsageError(f"{what}: the mask {one!r} has no 'name'.")
      takes = "rate" not in one and takes_rate(family(**one))
      takers += takes
      one = make(**one, **({"rate": rate} if takes and rate is not None else {}))
    made.append(one)
  if rate is not None and not takers:
    raise types.UsageError(f"{what}: rate is {rate!r}, but none of its masks takes it.")
  return made


def family(name: str, **settings) -> Callable[..., types.MaskFn]:
  """The factory of a mask with settings, for `evaluate`'s conditions to call with a rate.

  Args:
    name: a key of `MASKS`, or `package.module:attribute`.
    **settings: of the factory.

  Returns:
    The factory, which takes the other settings.

  Raises:
    UsageError: on an unknown name or setting.
  """
  factory = registry.lookup("mask", MASKS, name)
  known = registry.settings_of(factory)
  for setting in settings:
    if known is not None and setting not in known:
      raise types.UsageError(
        f"mask {name!r} has no setting {setting!r}{registry.nearest(setting, known)}; it takes"
        f" {', '.join(known)}."
      )
  return functools.partial(factory, **settings)


def takes_rate(factory: Callable[..., types.MaskFn]) -> bool:
  """Whether a factory has a setting `rate`."""
  known = registry.settings_of(factory)
  return known is None or "rate" in known


def make(name: str, **settings) -> types.MaskFn:
  """The mask of a config.

  Args:
    name: a key of `MASKS`, or `package.module:attribute`.
    **settings: of the factory.

  Returns:
    The mask.

  Raises:
    UsageError: on an unknown name or setting, or one that is missing or wrong.
  """
  factory = family(name, **settings)
  for setting, default in (registry.settings_of(factory) or {}).items():
    if default is inspect.Parameter.empty:
      raise types.UsageError(f"mask {name!r} needs the setting {setting!r}.")
  return factory()


def describe(name: str, **settings) -> str:
  """A mask in words, for reports: "Every step goes missing …; rate 0-1, complete_share 0.5".

  Args:
    name: a key of `MASKS`, or `package.module:attribute`.
    **settings: as `make` takes them.

  Returns:
    The first line of the factory's docstring, and the settings.
  """
  doc = (registry.lookup("mask", MASKS, name).__doc__ or name).strip().splitlines()[0].rstrip(".")
  told = [f"{setting} {_words(value)}" for setting, value in settings.items()]
  return "; ".join([doc, *([", ".join(told)] if told else [])])


def quantity(name: str) -> str:
  """What a mask's rate is a rate of: "p, probability of each step to go missing".

  Args:
    name: a key of `MASKS`, or `package.module:attribute`.

  Returns:
    What its docstring says of `rate`; "missing rate" if it says nothing.
  """
  doc = inspect.getdoc(registry.lookup("mask", MASKS, name)) or ""
  found = re.search(r"^ +rate: ([^.;]+)", doc, re.MULTILINE)
  return " ".join(found[1].split()) if found else "missing rate"


def _words(value: Any) -> str:
  if isinstance(value, Mapping):
    if "name" in value:
      return f"({describe(**value)})"
    return ", ".join(f"{name} {_words(one)}" for name, one in value.items())
  if isinstance(value, Sequence) and not isinstance(value, str):
    numbers = len(value) == 2 and all(isinstance(one, int | float) for one in value)
    return ("-" if numbers else " + ").join(_words(one) for one in value) or "none"
  return f"{value:g}" if isinstance(value, float) else str(value)


MASKS: dict[str, Callable[..., types.MaskFn]] = {
  "span": span,
  "bernoulli": bernoulli,
  "frames": frames,
  "blocks": blocks,
  "random_drop": random_drop,
  "gcnet": gcnet,
  "imder": imder,
  "drop": drop,
  "available": available,
  "mixture": mixture,
  "compose": compose,
  "msm": msm,
}
