"""Optimizers from a config: settings and parameter-path regexes -> one optax transformation."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mmjax import registry, types

# Keeps an Adam that is differentiated (second-order M³S) finite where a gradient is exactly 0.
DIFFERENTIABLE_EPS_ROOT = 1e-16
LEARNING_RATE = 1e-3


def path_of(key_path) -> str:
  """The "a/b/c" name of a pytree leaf, as every regex of the library sees it."""
  return jax.tree_util.keystr(key_path, simple=True, separator="/")


def split(params: types.Params, pattern: str) -> tuple[types.Params, types.Params]:
  """Splits params into (those whose path the regex finds, the rest); None fills the gaps."""
  found = jax.tree_util.tree_map_with_path(
    lambda path, _: bool(re.search(pattern, path_of(path))), params
  )
  if not any(jax.tree.leaves(found)):
    raise ValueError(f"no parameter path matches {pattern!r}.")
  chosen = jax.tree.map(lambda hit, leaf: leaf if hit else None, found, params)
  rest = jax.tree.map(lambda hit, leaf: None if hit else leaf, found, params)
  return chosen, rest


def merge(chosen: types.Params, rest: types.Params) -> types.Params:
  """Puts the two halves of `split` together again."""
  return jax.tree.map(
    lambda a, b: b if a is None else a, chosen, rest, is_leaf=lambda leaf: leaf is None
  )


class PlateauState(NamedTuple):
  """Where a plateau schedule stands; its settings travel with it.

  Attributes:
    scale: [] what the updates are multiplied by.
    best: [] best score so far, larger is better.
    bad: [] int32, epochs since then.
    factor, patience, threshold: [] see `reduce_on_plateau`.
  """

  scale: jax.Array
  best: jax.Array
  bad: jax.Array
  factor: jax.Array
  patience: jax.Array
  threshold: jax.Array


def reduce_on_plateau(
  factor: float = 0.5, patience: int = 20, threshold: float = 1e-4
) -> optax.GradientTransformation:
  """PyTorch's ReduceLROnPlateau, for optimizers whose updates are linear in the rate.

  `observe` tells it an epoch's validation score. After more than `patience` epochs without a
  better one it multiplies the updates by `factor`, and counts anew.

  Args:
    factor: of the learning rate.
    patience: epochs without improvement that are let pass.
    threshold: relative improvement that counts.

  Returns:
    The optax transformation, the last of a chain.
  """

  def init(params):
    del params
    limits = jnp.float32(factor), jnp.int32(patience), jnp.float32(threshold)
    return PlateauState(jnp.float32(1.0), jnp.float32(-jnp.inf), jnp.int32(0), *limits)

  def update(updates, state, params=None):
    del params
    return jax.tree.map(lambda u: state.scale.astype(u.dtype) * u, updates), state

  return optax.GradientTransformation(init, update)


def observe(opt_state: Any, score: jax.typing.ArrayLike) -> Any:
  """An optimizer's state after an epoch of this validation score (larger is better)."""

  def advance(state):
    if not isinstance(state, PlateauState):
      return state
    better = score > state.best + state.threshold * jnp.abs(
      jnp.where(jnp.isfinite(state.best), state.best, 0.0)
    )
    bad = jnp.where(better, 0, state.bad + 1)
    over = bad > state.patience
    return state._replace(
      scale=jnp.where(over, state.scale * state.factor, state.scale),
      best=jnp.where(better, jnp.float32(score), state.best),
      bad=jnp.where(over, 0, bad),
    )

  return jax.tree.map(advance, opt_state, is_leaf=lambda s: isinstance(s, PlateauState))


def _cosine(peak: float, total_steps: int, *, warmup: float = 0.0, end: float = 0.0):
  """A cosine from the peak down, after a linear rise if there is a warmup."""
  if warmup:
    return _warmup_cosine(peak, total_steps, warmup=warmup, end=end)
  return optax.cosine_decay_schedule(peak, total_steps, end)


def _warmup_cosine(peak: float, total_steps: int, *, warmup: float = 0.1, end: float = 0.0):
  rise = int(warmup * total_steps)
  return optax.warmup_cosine_decay_schedule(0.0, peak, rise, total_steps, peak * end)


def _warmup_linear(peak: float, total_steps: int, *, warmup: float = 0.1, end: float = 0.0):
  rise = int(warmup * total_steps)
  up = optax.linear_schedule(0.0, peak, max(rise, 1))
  down = optax.linear_schedule(peak, peak * end, max(total_steps - rise, 1))
  return optax.join_schedules([up, down], [rise])


def _hold_linear(peak: float, total_steps: int, *, hold: float = 0.5, end: float = 0.0):
  """Constant for `hold` of the steps, then linear."""
  held = int(hold * total_steps)
  return optax.linear_schedule(peak, peak * end, max(total_steps - held, 1), held)


def _step(peak: float, total_steps: int, *, every: float = 0.5, factor: float = 0.1):
  """Times `factor` after each `every`-th share of the steps."""
  length = max(int(every * total_steps), 1)
  return optax.exponential_decay(peak, length, factor, staircase=True)


def _epoch_warmup_cosine(peak: float, total_steps: int, *, epochs: int = 1, warmup: float = 0.1):
  """ALMT's and LNLN's: a rise from 0, a cosine after it, constant within each of the `epochs`.

  Their cosine starts one epoch late, after a second one at the peak.
  """
  steps, rise = max(total_steps // epochs, 1), max(warmup * epochs, 1e-9)

  def rate(count):
    epoch = jnp.minimum(count // steps, epochs).astype(jnp.float32)
    decay = 0.5 * (1 + jnp.cos(jnp.pi * (epoch - rise - 1) / max(epochs - rise, 1)))
    return peak * jnp.where(epoch <= rise, epoch / rise, decay)

  return rate


# Learning rates by name: ours, whose lengths are shares of the training, and all of optax.
SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
  "cosine": _cosine,
  "warmup_cosine": _warmup_cosine,
  "warmup_linear": _warmup_linear,
  "hold_linear": _hold_linear,
  "step": _step,
  "epoch_warmup_cosine": _epoch_warmup_cosine,
  **{
    name: make
    for name, make in vars(optax.schedules).items()
    if name.endswith(("_schedule", "_decay")) and inspect.isfunction(make)
  },
}


def _takes_rate(make: Any) -> bool:
  return inspect.isfunction(make) and any(
    name.endswith("learning_rate") for name in inspect.signature(make).parameters
  )


# Optimizers by name: all of optax.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  name: make
  for name, make in vars(optax).items()
  if not name.startswith(("_", "scale_by_")) and _takes_rate(make)
}


def _call(kind: str, name: str, make: Callable, settings: Mapping[str, Any], **given: Any) -> Any:
  """`make` with a user's settings, and with what is given if it takes that."""
  known = registry.settings_of(make)
  if known is None:  # it takes anything, and says itself what it does not
    return make(**settings)
  for setting in settings:
    if setting not in known:
      there = [one for one in known if one != "total_steps"]
      raise types.UsageError(
        f"{kind} {name!r} has no setting {setting!r}{registry.nearest(setting, there)}; there"
        f" are {', '.join(there)}."
      )
  values = {**{one: value for one, value in given.items() if one in known}, **settings}
  missing = [
    one
    for one, default in known.items()
    if default is inspect.Parameter.empty and one not in values
  ]
  if missing:
    raise types.UsageError(f"{kind} {name!r} needs the setting {missing[0]!r}.")
  return make(**values)


def schedule(settings: float | Mapping[str, Any], total_steps: int) -> optax.ScalarOrSchedule:
  """A learning rate: a constant, or {"name", "peak", …} with lengths as shares of training.

  Args:
    settings: the rate, which may be traced, or a mapping with "name", a key of `SCHEDULES`, and its
      settings. Ours take "peak" (the rate), and some of "warmup" (share of the steps), "end"
      (final share of the peak, default 0), "hold" (hold_linear: share of the steps before the
      decay, default 0.5), "every" and "factor" (step: multiply by `factor` after each `every`-th
      share of the training), "epochs" (epoch_warmup_cosine, which moves once an epoch: their
      number). Those of optax take what they take there, with lengths in steps.
    total_steps: number of optimizer steps of the whole training.

  Returns:
    A float or an optax schedule.

  Raises:
    UsageError: on an unknown name or setting.
  """
  if not isinstance(settings, Mapping):
    return settings if isinstance(settings, jax.Array) else float(settings)  # it may be traced
  settings = dict(settings)
  if "name" not in settings:
    raise types.UsageError(
      f"the learning rate {settings} has no name; there are {list(SCHEDULES)}."
    )
  name = settings.pop("name")
  make = registry.lookup("learning-rate schedule", SCHEDULES, name)
  return _call("learning-rate schedule", name, make, settings, total_steps=total_steps)


def clip_by_norm(max_norm: float) -> optax.GradientTransformation:
  """`optax.clip_by_global_norm`, with a derivative where all gradients are 0: the identity's."""

  def update(updates, state, params=None):
    del params
    squared = optax.tree.norm(updates, squared=True)
    zero = squared <= 0
    norm = jnp.sqrt(jnp.where(zero, 1, squared))
    inside = zero | (norm < max_norm)
    clip = lambda u: jnp.where(inside, u, (u / norm.astype(u.dtype)) * max_norm)  # noqa: E731
    return jax.tree.map(clip, updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def permissive(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Any optimizer with extra arguments, also where jax is told to promote nothing by itself."""
  inner = optax.with_extra_args_support(optimizer)

  def init(params):
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies counts and rates
      return inner.init(params)

  def update(updates, state, params=None, **extra):
    with jax.numpy_dtype_promotion("standard"):
      return inner.update(updates, state, params, **extra)

  return optax.GradientTransformationExtraArgs(init, update)


def in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """The optimizer of half-precision parameters, computed in float32; others are as they were.

  In float16 Adam's epsilons are 0, and in bfloat16 its moments stand still.
  """
  optimizer = permissive(optimizer)

  def widen(tree):
    half = lambda a: jnp.issubdtype(a.dtype, jnp.floating) and a.dtype.itemsize < 4  # noqa: E731
    return jax.tree.map(lambda a: a.astype(jnp.float32) if half(a) else a, tree)

  def init(params):
    return optimizer.init(widen(params))

  def update(updates, state, params=None, **extra):
    found, state = optimizer.update(widen(updates), state, widen(params), **extra)
    return jax.tree.map(lambda u, given: u.astype(given.dtype), found, updates), state

  return optax.GradientTransformationExtraArgs(init, update)


def _one(
  settings: dict[str, Any], total_steps: int, differentiable: bool
) -> optax.GradientTransformation:
  """The optimizer of one parameter group; takes its settings apart."""
  name, decay = settings.pop("name"), settings.pop("weight_decay")
  clip_norm = settings.pop("clip_norm", None)
  make = registry.lookup("optimizer", OPTIMIZERS, name)
  known = registry.settings_of(make) or {}
  given: dict[str, Any] = {"weight_decay": decay}
  if differentiable:
    given["eps_root"] = DIFFERENTIABLE_EPS_ROOT
  if "learning_rate" in settings:
    settings["learning_rate"] = schedule(settings["learning_rate"], total_steps)
  elif "learning_rate" in known:
    given["learning_rate"] = LEARNING_RATE
  steps = [] if clip_norm is None else [clip_by_norm(clip_norm)]
  if "weight_decay" not in known and decay:  # PyTorch's: added to the gradient
    steps.append(optax.add_decayed_weights(decay))
  return optax.chain(*steps, _call("optimizer", name, make, settings, **given))


def make(
  *,
  total_steps: int = 1,
  name: str = "adam",
  weight_decay: float = 0.0,
  clip_value: float | None = None,
  clip_norm: float | None = None,
  accumulate: int = 1,
  plateau: Mapping[str, Any] | None = None,
  differentiable: bool = False,
  groups: Sequence[tuple[str, Mapping[str, Any]]] = (),
  **settings: Any,
) -> optax.GradientTransformation:
  """The optimizer that a config describes.

  Args:
    total_steps: number of optimizer steps of the whole training, for schedules.
    name: a key of `OPTIMIZERS`, such as "adam", "adamw" or "sgd".
    weight_decay: decoupled where the optimizer has one of its own (adamw, lion …), else an L2
      term that is added to the gradient.
    clip_value: clips each gradient entry to [-clip_value, clip_value]; of sums (`accumulate`),
      after every step that adds to them.
    clip_norm: clips the global norm over all parameters.
    accumulate: number of steps whose gradients are summed before each update.
    plateau: settings of `reduce_on_plateau`, which the trainer feeds, or None.
    differentiable: for an inner optimizer of second-order M³S: keeps the derivative of
      Adam's square root finite at zero gradients.
    groups: ((path regex, {settings that differ: those of the optimizer, name, weight_decay, or a
      clip_norm of their own}), …); the first regex found in a parameter's path decides, "" stands
      for all. The other settings are as outside, but for an optimizer of another name, which
      takes its own `learning_rate` or the one outside.
    **settings: the optimizer's own, as optax names them: `learning_rate` (a constant or a
      schedule, see `schedule`; 1e-3 by default), `b1`, `b2`, `eps`, `momentum` …

  Returns:
    The optax transformation. Parameters in half precision are updated by float32 arithmetic.

  Raises:
    UsageError: on an unknown optimizer, schedule or setting; with those that there are.
  """
  total_steps = max(total_steps // accumulate, 1)
  base = {"name": name, "weight_decay": weight_decay, **settings}

  def group(own):
    shared = base
    if own.get("name", name) != name:
      shared = {k: base[k] for k in ("weight_decay", "learning_rate") if k in base}
    return _one({**shared, **own}, total_steps, differentiable)

  patterns = [(pattern, group(own)) for pattern, own in groups] + [("", group({}))]

  def labels(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: next(
        str(n) for n, (pattern, _) in enumerate(patterns) if re.search(pattern, path_of(path))
      ),
      params,
    )

  steps = []
  if clip_value is not None:
    steps.append(optax.clip(clip_value))
  if clip_norm is not None:
    steps.append(clip_by_norm(clip_norm))
  if len(patterns) == 1:
    steps.append(patterns[0][1])
  else:
    steps.append(optax.multi_transform({str(n): t for n, (_, t) in enumerate(patterns)}, labels))
  if plateau is not None:
    steps.append(_call("schedule", "plateau", reduce_on_plateau, plateau))
  optimizer = optax.chain(*steps)
  if accumulate > 1:  # PyTorch adds the gradients of several backward passes up
    limit = float("inf") if clip_value is None else clip_value
    multi = optax.MultiSteps(optimizer, accumulate, use_grad_mean=False)

    def clipped(added, done):  # the sum, as PyTorch does it after every backward pass
      return jnp.clip(done + added, -limit, limit) - done

    def update(updates, state, params=None, **extra_args):
      if clip_value is not None:
        updates = jax.tree.map(clipped, updates, state.acc_grads)
      return multi.update(updates, state, params, **extra_args)

    optimizer = optax.GradientTransformationExtraArgs(multi.init, update)
  return in_float32(optimizer)
