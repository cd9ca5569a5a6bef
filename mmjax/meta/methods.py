"""ORIG, SPL-TRN and M³S around a loss, and as registered methods."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from mmjax import optim, types
from mmjax.meta import hard, inner


def fixed_missing(loss: types.LossFn, mask: types.MaskFn, key: types.PRNGKey) -> types.LossFn:
  """ORIG: each sample keeps the one mask that `key` and its `batch.index` give it (§4.4).

  Args:
    loss: the model's loss.
    mask: draws the missing data.
    key: the key of the masks, the same at every step.

  Returns:
    A loss with the signature of `loss`.
  """

  fixed_mask = functools.partial(mask, key)

  def masked_loss(params, batch, key, extra):
    return loss(params, fixed_mask(batch), key, extra)

  return masked_loss


def sampled_missing(
  loss: types.LossFn, mask: types.MaskFn, *, hard_masks: int = 1, hard_by: str = "row"
) -> types.LossFn:
  """SPL-TRN: draws fresh masks at every call (augmented sampling, §3.2).

  Args:
    loss: the model's loss.
    mask: draws the missing data.
    hard_masks: M masks are drawn, and the one with the largest loss is trained on.
    hard_by: whose loss that is, see `hardest`.

  Returns:
    A loss with the signature of `loss`; its key must not be None.

  Raises:
    UsageError: as `hardest`.
  """
  choose = hard.hardest(loss, mask, hard_masks, hard_by)

  def masked_loss(params, batch, key, extra):
    mask_key, loss_key = jax.random.split(key)
    return loss(params, choose(params, batch, mask_key, extra), loss_key, extra)

  return masked_loss


def split_support_query(
  batch: types.Batch, support_rows: int | None = None, tasks: int = 1
) -> tuple[types.Batch, types.Batch]:
  """Splits a batch into support sets X₁, the first rows of each task, and query sets X₂.

  Args:
    batch: T · R rows, task after task.
    support_rows: S, the rows of a task's X₁; by default half of its rows. Of whole conversations
      these are counted, not their rows.
    tasks: T.

  Returns:
    T · S and T · (R - S) rows, task after task.

  Raises:
    UsageError: if the rows are not those of T tasks with both sets.
  """
  chex.assert_equal_shape_prefix(jax.tree.leaves(batch), 1)
  together = types.places(batch).shape[1]  # rows that no set may part
  rows = batch.index.shape[0] // together
  per_task = rows // tasks
  size = per_task // 2 if support_rows is None else support_rows
  halved = 2 * size == per_task
  if rows % tasks or not 0 < size < per_task or (support_rows is None and not halved):
    raise types.UsageError(
      f"m3s got a batch of rows={rows} with tasks={tasks} and support_rows={support_rows}: it needs"
      " as many rows for each task, of which the first half, or support_rows, are the support set"
      " and all others, at least one, the query set."
    )

  def part(which):
    def of(a):
      if halved:  # a[:, :S] would be cut from both halves' shares where devices share the rows
        a = a.reshape(tasks, 2, size * together, *a.shape[1:])[:, which]
      else:
        a = a.reshape(tasks, per_task * together, *a.shape[1:])
        a = a[:, size * together :] if which else a[:, : size * together]
      return a.reshape(-1, *a.shape[2:])

    return jax.tree.map(of, batch)

  return part(0), part(1)


def _by_task(batch, tasks):
  """Rows [T · R, ...] as [T, R, ...]."""
  rows = batch.index.shape[0]
  if rows % tasks:
    raise types.UsageError(f"m3s got a set of rows={rows}, which do not make tasks={tasks}.")
  return jax.tree.map(lambda a: a.reshape(tasks, rows // tasks, *a.shape[1:]), batch)


def m3s(
  loss: types.LossFn,
  mask: types.MaskFn,
  *,
  inner_steps: int = 1,
  inner_optimizer: optax.GradientTransformation | None = None,
  order: str = "first",
  fresh_masks: bool = False,
  mode: str = "reverse",
  support_rows: int | None = None,
  tasks: int = 1,
  inner_rates: types.Params | None = None,
  inner_trains: str = "",
  remat: str | Callable[..., Any] = "steps",
  support_mask: types.MaskFn | None = None,
  hard_masks: int = 1,
  hard_by: str = "row",
) -> types.LossFn:
  """M³S meta-sampling around any loss (Chi et al. 2022, Algorithm 1).

  The returned loss takes a batch of 2B rows: the first half is the support set X₁, the
  second the query set X₂, each masked on its own. Its value is the query loss at θ*, the
  parameters after K inner steps on X₁. Its gradient is the meta-gradient:

    order="first":   ∇_{θ*} l(f(X̃₂; θ*), Y₂), as line 11 of the algorithm states. θ* is
                     computed without being differentiated, so the gradient costs K + 1
                     plain gradients and no memory beyond one.
    order="second":  d l(f(X̃₂; θ*(θ)), Y₂) / dθ, exact through all K inner steps (MAML).

  Instead of one batch it takes a pair `(support, query)` of batches of any sizes. With T tasks
  there are T pairs: the rows of the batch are X₁, X₂ of the first task, then X₁, X₂ of the
  second, …; in a pair, `support` has the tasks' X₁ one after the other and `query` their X₂.

  `extra` advances on the query sets only, once each, in order.

  Args:
    loss: the model's loss, `(params, batch, key, extra) -> (scalar, Aux)`.
    mask: draws the missing data, such as `masking.span((0.4, 0.6))`.
    inner_steps: K ≥ 1; the paper does not state it.
    inner_optimizer: optax transformation of the inner loop; `optax.sgd(1e-3)` by default. It
      starts afresh at every meta step, and may read `value=`, `grad=` and `value_fn=` of its
      step. Under order="second" it is differentiated: `optax.adam` then needs `eps_root > 0`,
      or a zero gradient gives NaN.
    order: "first" or "second".
    fresh_masks: draw a new support mask at each inner step, not one for all of them.
    mode: of order="second", how an inner gradient is differentiated by the parameters.
      "reverse" is exact for every loss. "mixed", forward over reverse, is faster and leaner, and
      the same wherever the loss's gradient is the gradient of something: stopped gradients are,
      reversed ones (LNLN's adversary) are not.
    support_rows: S, the support rows of each task, whose others are its query rows; by default
      half. Not for pairs, which have sizes of their own.
    tasks: T, support/query pairs a step, each with keys of its own. Losses, and so the
      meta-gradients, are averaged, metrics too (MAML's task batch). One program takes a task after
      the other. No derivative passes to the next through what a loss changes in `extra`.
    inner_rates: a tree like `params` of rates α, scalars or in the shape of their leaf, that
      multiply the updates of the inner optimizer, which is `optax.sgd(1.0)` by default
      (Meta-SGD, Li et al. 2017). The loss is differentiable by them through its closure. Under
      order="first" the inner gradients g_k are constants, as they are for θ:
      dL/dα = -Σ_k g_k · ∇_{θ*} L.
    inner_trains: regex that is searched in each "a/b/c" parameter path; the inner loop leaves the
      others as they are ("head": ANIL; the body alone: BOIL). The outer gradient is that of all.
    remat: of order="second", what the backward pass recomputes. "steps": the inner steps, one at
      a time, so that the memory grows with K by one copy of the parameters (and optimizer state) a
      step; a single one is kept. "none": nothing, each step keeps the linearization of its
      gradient; fewer products, K times the memory. Or a `jax.checkpoint` policy or its name, see
      `REMATS`.
    support_mask: draws the missing data of the support sets, where it is not `mask`.
    hard_masks: M masks are drawn for a query set, and the one whose loss at θ* is largest is
      trained on.
    hard_by: whose loss that is, see `hardest`.

  Returns:
    A loss with the signature of `loss`; its key must not be None. Its metrics are those of
    the query set, and "support_loss", the support set's loss before the first inner step.

  Raises:
    UsageError: on an unknown order, mode, remat or hard_by, fewer than one inner step, task or
      hard mask, or rows that do not make T tasks with both sets.
  """
  inner.check(order, mode, inner_steps, remat, tasks)
  choose = hard.hardest(loss, mask, hard_masks, hard_by)
  support_mask = mask if support_mask is None else support_mask

  def of_task(params, support, query, key, extra):
    keys = inner.meta_keys(key, inner_steps, fresh_masks)
    adapted, support_losses = inner.adapt(
      loss,
      support_mask,
      params,
      support,
      keys,
      extra,
      optimizer=inner_optimizer,
      order=order,
      fresh_masks=fresh_masks,
      mode=mode,
      inner_rates=inner_rates,
      inner_trains=inner_trains,
      remat=remat,
    )
    query = choose(adapted, query, keys.query_mask, extra)
    value, aux = loss(adapted, query, keys.query_loss, extra)
    return value, aux._replace(metrics={**aux.metrics, "support_loss": support_losses[0]})

  def meta_loss(params, batch, key, extra):
    if isinstance(batch, types.Batch):
      batch = split_support_query(batch, support_rows, tasks)
    support, query = batch
    if tasks == 1:
      return of_task(params, support, query, key, extra)

    def advance(extra, task):
      support, query, key = task
      value, aux = of_task(params, support, query, key, extra)
      # what a loss only passes on, such as a coefficient, keeps its derivative
      new = jax.tree.map(lambda a, b: b if b is a else jax.lax.stop_gradient(b), extra, aux.extra)
      return new, (value, aux.metrics)

    # a scan and no vmap: `extra` goes from task to task, and batched rbg keys depend on each other
    each = (_by_task(support, tasks), _by_task(query, tasks), jax.random.split(key, tasks))
    extra, (values, metrics) = jax.lax.scan(advance, extra, each)
    return jnp.mean(values), types.Aux(jax.tree.map(lambda m: m.mean(0), metrics), extra)

  return meta_loss


def _cost_of_one(batch_size: int, hard_masks: int = 1) -> types.Cost:
  """Of a step with one gradient of B rows."""
  losses = hard_masks * batch_size if hard_masks > 1 else 0
  return types.Cost(rows=batch_size, gradients=batch_size, products=0, losses=losses)


def orig(mask: types.MaskFn) -> types.Method:
  """ORIG as a method: `fixed_missing`."""

  def wrap(loss, key, method_params, *, hessian="reverse"):
    del method_params, hessian
    return fixed_missing(loss, mask, key)

  return types.Method(1, wrap, title="ORIG", cost=_cost_of_one)


def spl(mask: types.MaskFn, *, hard_masks: int = 1, hard_by: str = "row") -> types.Method:
  """SPL-TRN as a method: `sampled_missing`, whose settings these are."""
  hard.check(hard_masks, hard_by)

  def wrap(loss, key, method_params, *, hessian="reverse"):
    del key, method_params, hessian
    return sampled_missing(loss, mask, hard_masks=hard_masks, hard_by=hard_by)

  cost = functools.partial(_cost_of_one, hard_masks=hard_masks)
  return types.Method(1, wrap, title="SPL-TRN", cost=cost)


def _with_unit_rates(settings):
  """The settings of `optim.make` with learning rates of 1, that of each group too."""
  groups = settings.get("groups", ())
  if any(isinstance(s.get("learning_rate"), Mapping) for s in (settings, *(g for _, g in groups))):
    raise types.UsageError("learned inner rates start at constants, but one is a schedule.")
  groups = [(pattern, {**group, "learning_rate": 1.0}) for pattern, group in groups]
  return {**settings, "learning_rate": 1.0, "groups": groups}


def _initial_rates(settings, params):
  """The learning rate of each leaf, as SGD with these settings shows it: a step down from 1."""

  def rate_of(settings):
    return {key: value for key, value in settings.items() if key == "learning_rate"}

  groups = [(pattern, rate_of(group)) for pattern, group in settings.get("groups", ())]
  sgd = optim.make(name="sgd", **rate_of(settings), groups=groups)
  ones = jax.tree.map(lambda p: jnp.ones((), p.dtype), params)
  updates, _ = sgd.update(ones, sgd.init(ones), ones)
  return jax.tree.map(jnp.negative, updates)


def m3s_method(
  mask: types.MaskFn,
  *,
  inner_steps: int = 1,
  optimizer: Mapping[str, Any] | None = None,
  order: str = "first",
  fresh_masks: bool = False,
  support_rows: int | None = None,
  tasks: int = 1,
  inner_rates: str | None = None,
  inner_trains: str = "",
  remat: str = "steps",
  support_rate: Any = None,
  hard_masks: int = 1,
  hard_by: str = "row",
  at_rate: Callable[[Any], types.MaskFn] | None = None,
) -> types.Method:
  """M³S as a method: `m3s` on 2T draws, by default the support and the query set of each task.

  The Hessian mode is the loss's own, as its phase declares it.

  Args:
    mask: draws the missing data.
    optimizer: the inner optimizer's settings for `optim.make`; SGD at 1e-3 by default.
    inner_rates: "learned": a rate for each parameter leaf, which the outer optimizer trains; it
      starts at the inner optimizer's learning rate (that of the leaf's group).
    inner_steps, order, fresh_masks, support_rows, tasks, inner_trains, remat, hard_masks, hard_by:
      see `m3s`; support_rows of a task's 2B rows.
    support_rate: another missing rate for the support sets, lighter or harder than the query's.
    at_rate: `rate -> MaskFn` of the mask's own family, which support_rate needs; configs give it.

  Returns:
    The method.

  Raises:
    UsageError: on unknown settings, or a support_rate of a mask without a rate.
  """
  inner.check(order, "reverse", inner_steps, remat, tasks)
  hard.check(hard_masks, hard_by)
  support_mask = None
  if support_rate is not None:
    if at_rate is None:
      raise types.UsageError("support_rate needs a mask that takes a rate.")
    support_mask = at_rate(support_rate)
  if inner_rates not in (None, "learned"):
    raise types.UsageError(f"inner_rates is {inner_rates!r}, expected 'learned' or None.")
  settings: Mapping[str, Any] = optimizer or dict(name="sgd", learning_rate=1e-3)
  # learned rates multiply the updates of an optimizer whose rates are all 1
  made = settings if inner_rates is None else _with_unit_rates(settings)
  inner_optimizer = optim.make(**made, differentiable=order == "second")

  def wrap(loss, key, method_params, *, hessian="reverse"):
    del key
    return m3s(
      loss,
      mask,
      inner_steps=inner_steps,
      inner_optimizer=inner_optimizer,
      order=order,
      fresh_masks=fresh_masks,
      mode="mixed" if hessian == "symmetric" else "reverse",
      support_rows=support_rows,
      tasks=tasks,
      inner_rates=None if inner_rates is None else method_params,
      inner_trains=inner_trains,
      remat=remat,
      support_mask=support_mask,
      hard_masks=hard_masks,
      hard_by=hard_by,
    )

  def cost(batch_size):
    support = batch_size if support_rows is None else support_rows
    query, steps = 2 * batch_size - support, inner_steps * support
    return types.Cost(
      rows=2 * tasks * batch_size,
      gradients=tasks * (steps + query),
      products=tasks * steps if order == "second" else 0,
      losses=tasks * hard_masks * query if hard_masks > 1 else 0,
    )

  def init(key, params):
    del key
    return _initial_rates(settings, params)

  return types.Method(2 * tasks, wrap, None if inner_rates is None else init, "M3S", cost)


# The training methods by name: `METHODS[name](mask, **settings) -> Method`.
METHODS: Mapping[str, Callable[..., types.Method]] = {"orig": orig, "spl": spl, "m3s": m3s_method}
