"""Optimizers from a config: settings and parameter-path regexes -> one optax transformation."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mmjax import types

# Keeps an Adam that is differentiated (second-order M³S) finite where a gradient is exactly 0.
DIFFERENTIABLE_EPS_ROOT = 1e-16


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


def _epoch_warmup_cosine(peak: float, epochs: int, steps: int, share: float) -> optax.Schedule:
  """ALMT's and LNLN's: a rise from 0, a cosine after it, constant within an epoch of `steps`.

  Their cosine starts one epoch late, after a second one at the peak.
  """
  rise = max(share * epochs, 1e-9)

  def rate(count):
    epoch = jnp.minimum(count // steps, epochs)
    decay = 0.5 * (1 + jnp.cos(jnp.pi * (epoch - rise - 1) / max(epochs - rise, 1)))
    return peak * jnp.where(epoch <= rise, epoch / rise, decay)

  return rate


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


def schedule(settings: float | Mapping[str, Any], total_steps: int) -> optax.ScalarOrSchedule:
  """A learning rate: a constant, or {"name", "peak", …} with lengths as shares of training.

  Args:
    settings: the rate, or a mapping with "name" one of "cosine", "warmup_cosine",
      "warmup_linear", "hold_linear", "step" or "epoch_warmup_cosine", "peak" (the rate), and
      "warmup" (share of the steps, default 0.1), "end" (final share of the peak, default 0),
      "hold" (hold_linear: share of the steps before the decay, default 0.5), "every" and
      "factor" (step: multiply by `factor` after each `every`-th share of the training),
      "epochs" (epoch_warmup_cosine, which moves once an epoch: their number).
    total_steps: number of optimizer steps of the whole training.

  Returns:
    A float or an optax schedule.
  """
  if not isinstance(settings, Mapping):
    return float(settings)
  settings = dict(settings)
  name, peak = settings.pop("name"), settings.pop("peak")
  share = settings.pop("warmup", 0.1)
  warmup = int(share * total_steps)
  end = peak * settings.pop("end", 0.0)
  epochs = settings.pop("epochs", 1)
  hold = int(settings.pop("hold", 0.5) * total_steps)
  every, factor = settings.pop("every", 0.5), settings.pop("factor", 0.1)
  if settings:
    raise ValueError(f"unknown settings of the learning rate: {sorted(settings)}.")
  if name == "cosine":
    return optax.cosine_decay_schedule(peak, total_steps, end / peak)
  if name == "warmup_cosine":
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, total_steps, end)
  if name == "warmup_linear":
    rise = optax.linear_schedule(0.0, peak, max(warmup, 1))
    return optax.join_schedules(
      [rise, optax.linear_schedule(peak, end, max(total_steps - warmup, 1))], [warmup]
    )
  if name == "epoch_warmup_cosine":
    return _epoch_warmup_cosine(peak, epochs, max(total_steps // epochs, 1), share)
  if name == "hold_linear":
    return optax.linear_schedule(peak, end, max(total_steps - hold, 1), hold)
  if name == "step":
    return optax.exponential_decay(peak, max(int(every * total_steps), 1), factor, staircase=True)
  raise ValueError(f"unknown learning-rate schedule {name!r}.")


def _one(name, rate, weight_decay, momentum, b1, eps, clip_norm, eps_root):
  """One parameter group. `weight_decay` is PyTorch's: added to the gradient, but for adamw."""
  first = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
  if name == "adamw":
    adamw = optax.adamw(rate, b1, eps=eps, weight_decay=weight_decay, eps_root=eps_root)
    return optax.chain(*first, adamw)
  decay = first + ([optax.add_decayed_weights(weight_decay)] if weight_decay else [])
  if name == "adam":
    return optax.chain(*decay, optax.adam(rate, b1, eps=eps, eps_root=eps_root))
  if name == "sgd":
    return optax.chain(*decay, optax.sgd(rate, momentum=momentum or None))
  raise ValueError(f"unknown optimizer {name!r}, expected adam, adamw or sgd.")


def make(
  *,
  total_steps: int = 1,
  name: str = "adam",
  learning_rate: float | Mapping[str, Any] = 1e-3,
  weight_decay: float = 0.0,
  momentum: float = 0.0,
  b1: float = 0.9,
  eps: float = 1e-8,
  clip_value: float | None = None,
  clip_norm: float | None = None,
  accumulate: int = 1,
  plateau: Mapping[str, Any] | None = None,
  differentiable: bool = False,
  groups: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> optax.GradientTransformation:
  """The optimizer that a config describes.

  Args:
    total_steps: number of optimizer steps of the whole training, for schedules.
    name: "adam", "adamw" or "sgd".
    learning_rate: a constant or a schedule, see `schedule`.
    weight_decay: L2 term added to the gradient (adam, sgd) or decoupled (adamw).
    momentum: of sgd.
    b1: decay of Adam's first moment.
    eps: of Adam's denominator.
    clip_value: clips each gradient entry to [-clip_value, clip_value].
    clip_norm: clips the global norm over all parameters.
    accumulate: number of steps whose gradients are summed before each update.
    plateau: settings of `reduce_on_plateau`, which the trainer feeds, or None.
    differentiable: for an inner optimizer of second-order M³S: keeps the derivative of
      Adam's square root finite at zero gradients.
    groups: ((path regex, {settings that differ: name, learning_rate, weight_decay,
      momentum, b1, eps, or a clip_norm of their own}), …); the first regex found in a parameter's
      path decides, "" stands for all.

  Returns:
    The optax transformation.
  """
  total_steps = max(total_steps // accumulate, 1)
  base = {
    "name": name,
    "learning_rate": learning_rate,
    "weight_decay": weight_decay,
    "momentum": momentum,
    "b1": b1,
    "eps": eps,
  }

  def group(settings):
    settings = {**base, **settings}
    rate = schedule(settings.pop("learning_rate"), total_steps)
    clip = settings.pop("clip_norm", None)
    unknown = set(settings) - set(base)
    if unknown:
      raise ValueError(f"unknown settings of an optimizer group: {sorted(unknown)}.")
    eps_root = DIFFERENTIABLE_EPS_ROOT if differentiable else 0.0
    return _one(rate=rate, clip_norm=clip, eps_root=eps_root, **settings)

  patterns = [(pattern, group(settings)) for pattern, settings in groups] + [("", group({}))]

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
    steps.append(optax.clip_by_global_norm(clip_norm))
  if len(patterns) == 1:
    steps.append(patterns[0][1])
  else:
    steps.append(optax.multi_transform({str(n): t for n, (_, t) in enumerate(patterns)}, labels))
  if plateau is not None:
    steps.append(reduce_on_plateau(**plateau))
  optimizer = optax.chain(*steps)
  if accumulate > 1:  # PyTorch adds the gradients of several backward passes up
    optimizer = optax.MultiSteps(
      optimizer, accumulate, use_grad_mean=False
    ).gradient_transformation()
  return optimizer
