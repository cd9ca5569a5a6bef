"""Training methods: each turns the loss of a clean batch into the loss that is trained.

M³S (Chi et al. 2022, "Missing Modality meets Meta Sampling", arXiv 2210.03428) compares
three of them, all under randomly missing spans:

  * `fixed_missing` (ORIG): every sample keeps one mask for the whole training;
  * `sampled_missing` (SPL-TRN): fresh masks at every step;
  * `m3s` (Algorithm 1): fresh masks, K inner gradient steps on a support set, and the
    meta-gradient of the query set's loss at the adapted parameters.

All three take and return the one `LossFn` signature, so a trainer does not know them:

  loss = m3s(my_loss, masking.span((0.4, 0.6)), inner_steps=3)
  (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key, extra)
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from mmjax import optim, types

ORDERS = ("first", "second")
MODES = ("reverse", "mixed")
REMATS = ("steps", "none", "dots_saveable", "dots_with_no_batch_dims_saveable")

_GRADS = "inner_gradient"  # their name for checkpoint policies


def fixed_missing(loss: types.LossFn, mask: types.MaskFn, key: types.PRNGKey) -> types.LossFn:
  """ORIG: each sample keeps the one mask that `key` and its `batch.index` give it (§4.4).

  Args:
    loss: the model's loss.
    mask: draws the missing data.
    key: the key of the masks, the same at every step.

  Returns:
    A loss with the signature of `loss`.
  """

  def masked_loss(params, batch, step_key, extra):
    return loss(params, mask(key, batch), step_key, extra)

  return masked_loss


def sampled_missing(loss: types.LossFn, mask: types.MaskFn) -> types.LossFn:
  """SPL-TRN: draws fresh masks at every call (augmented sampling, §3.2).

  Args:
    loss: the model's loss.
    mask: draws the missing data.

  Returns:
    A loss with the signature of `loss`; its key must not be None.
  """

  def masked_loss(params, batch, key, extra):
    mask_key, loss_key = jax.random.split(key)
    return loss(params, mask(mask_key, batch), loss_key, extra)

  return masked_loss


class MetaKeys(NamedTuple):
  """The keys of one meta step; K is the number of inner steps.

  Attributes:
    support_mask: [K] keys of the support set's masks (all the same unless they are fresh).
    support_loss: [K] keys of the inner losses (dropout).
    query_mask: key of the query set's mask.
    query_loss: key of the outer loss.
  """

  support_mask: types.PRNGKey
  support_loss: types.PRNGKey
  query_mask: types.PRNGKey
  query_loss: types.PRNGKey


def meta_keys(key: types.PRNGKey, inner_steps: int, fresh_masks: bool) -> MetaKeys:
  """Splits one key into all keys of a meta step."""
  support_mask, support_loss, query_mask, query_loss = jax.random.split(key, 4)
  if fresh_masks:
    support_masks = jax.random.split(support_mask, inner_steps)
  else:
    support_masks = jnp.repeat(support_mask[None], inner_steps, axis=0)
  return MetaKeys(
    support_masks, jax.random.split(support_loss, inner_steps), query_mask, query_loss
  )


def split_support_query(
  batch: types.Batch, support_rows: int | None = None, tasks: int = 1
) -> tuple[types.Batch, types.Batch]:
  """Splits a batch into support sets X₁, the first rows of each task, and query sets X₂.

  Args:
    batch: T · R rows, task after task.
    support_rows: S, the rows of a task's X₁; by default half of its rows.
    tasks: T.

  Returns:
    T · S and T · (R - S) rows, task after task.

  Raises:
    UsageError: if the rows are not those of T tasks with both sets.
  """
  chex.assert_equal_shape_prefix(jax.tree.leaves(batch), 1)
  rows = batch.index.shape[0]
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
        a = a.reshape(tasks, 2, size, *a.shape[1:])[:, which]
      else:
        a = a.reshape(tasks, per_task, *a.shape[1:])
        a = a[:, size:] if which else a[:, :size]
      return a.reshape(-1, *a.shape[2:])

    return jax.tree.map(of, batch)

  return part(0), part(1)


def adapt(
  loss: types.LossFn,
  mask: types.MaskFn,
  params: types.Params,
  support: types.Batch,
  key: types.PRNGKey | MetaKeys,
  extra: types.Extra,
  *,
  inner_steps: int = 1,
  optimizer: optax.GradientTransformation | None = None,
  order: str = "second",
  fresh_masks: bool = False,
  mode: str = "reverse",
  inner_rates: types.Params | None = None,
  inner_trains: str = "",
  remat: str | Callable[..., Any] = "steps",
) -> tuple[types.Params, chex.Array]:
  """The inner loop: K optimizer steps on the support set (Algorithm 1, lines 4-9; eq. 1).

  The optimizer starts afresh and `extra` is read only. Adapts to new samples at test time, too:
  `adapted, losses = adapt(loss, mask, params, batch, key, extra, inner_steps=5)`.

  Args:
    loss: the model's loss.
    mask: draws the missing data.
    params: θ₀.
    support: the clean support set.
    key: of masks and losses; or the keys of a meta step, K of them whatever `inner_steps` says.
    extra: the system's training arrays.
    inner_steps: K ≥ 1.
    optimizer: see `inner_optimizer` of `m3s`.
    order: "second": θ_K is differentiable through all steps; "first": dθ_K/dθ₀ = I.
    fresh_masks, mode, inner_rates, inner_trains, remat: see `m3s`.

  Returns:
    θ_K, and [K] the support loss before each step (it has no derivative).

  Raises:
    UsageError: as `m3s`.
  """
  _check(order, mode, inner_steps, remat)
  keys = key if isinstance(key, MetaKeys) else meta_keys(key, inner_steps, fresh_masks)
  if optimizer is None:
    optimizer = optax.sgd(1e-3 if inner_rates is None else 1.0)
  optimizer = optax.with_extra_args_support(optimizer)
  trained, constant = optim.split(params, inner_trains)
  rates = None
  if inner_rates is not None:
    chex.assert_trees_all_equal_structs(inner_rates, params)
    rates = optim.split(inner_rates, inner_trains)[0]
  if not fresh_masks:  # one mask for all steps: draw it outside of the loop
    support = mask(keys.support_mask[0], support)

  # the first order computes θ* from constants and derives it by hand, below
  held = jax.lax.stop_gradient if order == "first" else lambda tree: tree

  def objective(trained, step_keys):
    mask_key, loss_key = step_keys
    seen = mask(mask_key, support) if fresh_masks else support
    return loss(optim.merge(trained, held(constant)), seen, loss_key, extra)[0]

  gradient = jax.value_and_grad(objective)
  if mode == "mixed":
    gradient = _symmetric(gradient, linearize=remat != "steps")

  def step(carry, step_keys):
    params, state = carry
    value, grads = gradient(params, step_keys)
    value_fn = lambda params: objective(params, step_keys)  # noqa: E731
    updates, state = optimizer.update(
      grads, state, params, value=value, grad=grads, value_fn=value_fn
    )
    moves = None
    if rates is not None:
      moves = updates
      updates = jax.tree.map(jnp.multiply, held(rates), updates)
    params = optax.apply_updates(params, updates)
    return (params, state), (jax.lax.stop_gradient(value), moves)

  if remat != "none":
    step = jax.checkpoint(step, policy=_policy(remat))
  start = held(trained)
  steps = (keys.support_mask, keys.support_loss)
  (adapted, _), (values, moves) = jax.lax.scan(step, (start, optimizer.init(start)), steps)
  if order == "first":  # the value of θ*, the derivative of θ, and of α times constant moves
    adapted = jax.tree.map(_with_derivative_of, adapted, trained)
    if rates is not None:
      total = jax.tree.map(lambda m: jax.lax.stop_gradient(m.sum(0)), moves)
      linear = jax.tree.map(jnp.multiply, rates, total)
      adapted = jax.tree.map(_with_derivative_of, adapted, linear)
  return optim.merge(adapted, constant), values


def _with_derivative_of(a, b):
  return a + (b - jax.lax.stop_gradient(b))


def _policy(remat):
  """The checkpoint policy of `remat`; "steps" keeps the gradients that mixed mode names."""
  if remat == "steps":
    return jax.checkpoint_policies.save_only_these_names(_GRADS)
  return getattr(jax.checkpoint_policies, remat) if isinstance(remat, str) else remat


def _symmetric(gradient, linearize):
  """`(params, keys) -> (value, grads)`, whose vjp by params is a jvp of the gradient.

  The mixed mode of Kemaev et al. 2025 (arXiv 2505.00793): forward over reverse needs no more
  memory than a gradient. All else that the gradient reads, keys and what it closes over, gets
  its cotangents by reverse mode, and only where they are asked for.

  Args:
    gradient: the function.
    linearize: whether the jvp's linearization is kept from the forward pass.

  Returns:
    A function with the signature of `gradient`.
  """

  def symmetric(params, keys):
    # closed-over arrays become arguments: a custom_vjp must see all that it is differentiated by
    jaxpr, shapes = jax.make_jaxpr(gradient, return_shape=True)(params, keys)

    def pure(params, rest):
      keys, consts = rest
      found = jax.core.eval_jaxpr(jaxpr.jaxpr, consts, *jax.tree.leaves((params, keys)))
      return jax.tree.unflatten(jax.tree.structure(shapes), found)

    def forward(params, rest):
      params = jax.tree.map(lambda a: a.value, params)
      asked = jax.tree.map(lambda a: a.value if a.perturbed else None, rest)
      others = jax.tree.map(lambda a: None if a.perturbed else a.value, rest)
      of_params = lambda p: pure(p, optim.merge(asked, others))  # noqa: E731
      if linearize:
        (value, grads), push = jax.linearize(of_params, params)
        return (value, grads), (params, asked, others, (grads, push))
      return of_params(params), (params, asked, others, None)

    def backward(kept, cotangents):
      params, asked, others, linear = kept
      d_value, d_grads = jax.tree.map(_instantiate, cotangents)
      if linear is None:
        (_, grads), (_, d_params) = jax.jvp(
          lambda p: pure(p, optim.merge(asked, others)), (params,), (d_grads,)
        )
      else:
        grads, push = linear
        d_params = push(d_grads)[1]
      if not isinstance(cotangents[0], SymbolicZero):  # an optimizer reads the value
        d_params = jax.tree.map(lambda d, g: d + d_value * g, d_params, grads)
      if jax.tree.leaves(asked):
        _, pull = jax.vjp(lambda asked: pure(params, optim.merge(asked, others)), asked)
        (asked,) = pull((d_value, d_grads))
      return d_params, asked

    function = jax.custom_vjp(pure)
    function.defvjp(forward, backward, symbolic_zeros=True)
    value, grads = function(params, (keys, jaxpr.consts))
    return value, checkpoint_name(grads, _GRADS)

  return symmetric


def _instantiate(cotangent):
  if isinstance(cotangent, SymbolicZero):
    return jnp.zeros(cotangent.shape, cotangent.dtype)
  return cotangent


def _by_task(batch, tasks):
  """Rows [T · R, ...] as [T, R, ...]."""
  rows = batch.index.shape[0]
  if rows % tasks:
    raise types.UsageError(f"m3s got a set of rows={rows}, which do not make tasks={tasks}.")
  return jax.tree.map(lambda a: a.reshape(tasks, rows // tasks, *a.shape[1:]), batch)


def _check(order, mode, inner_steps, remat, tasks=1):
  for name, value, allowed in (("order", order, ORDERS), ("mode", mode, MODES)):
    if value not in allowed:
      raise types.UsageError(f"{name} is {value!r}, expected one of {allowed}.")
  for name, value in (("inner_steps", inner_steps), ("tasks", tasks)):
    if value < 1:
      raise types.UsageError(f"{name} is {value}, expected at least 1.")
  if not callable(remat) and remat not in REMATS:
    raise types.UsageError(
      f"remat is {remat!r}, expected one of {REMATS} or a policy of jax.checkpoint."
    )


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
      step. "none": nothing, each step keeps the linearization of its gradient; fewer products,
      K times the memory. Or a `jax.checkpoint` policy or its name, see `REMATS`.

  Returns:
    A loss with the signature of `loss`; its key must not be None. Its metrics are those of
    the query set, and "support_loss", the support set's loss before the first inner step.

  Raises:
    UsageError: on an unknown order, mode or remat, fewer than one inner step or task, or rows
      that do not make T tasks with both sets.
  """
  _check(order, mode, inner_steps, remat, tasks)

  def of_task(params, support, query, key, extra):
    keys = meta_keys(key, inner_steps, fresh_masks)
    adapted, support_losses = adapt(
      loss,
      mask,
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
    value, aux = loss(adapted, mask(keys.query_mask, query), keys.query_loss, extra)
    return value, aux._replace(metrics={**aux.metrics, "support_loss": support_losses[0]})

  def meta_loss(params, batch, key, extra):
    if isinstance(batch, types.Batch):
      batch = split_support_query(batch, support_rows, tasks)
    support, query = batch
    if tasks == 1:
      return of_task(params, support, query, key, extra)

    def advance(extra, task):
      value, aux = of_task(params, *task, extra)
      # what a loss only passes on, such as a coefficient, keeps its derivative
      new = jax.tree.map(lambda a, b: b if b is a else jax.lax.stop_gradient(b), extra, aux.extra)
      return new, (value, aux.metrics)

    # a scan and no vmap: `extra` goes from task to task, and batched rbg keys depend on each other
    each = (_by_task(support, tasks), _by_task(query, tasks), jax.random.split(key, tasks))
    extra, (values, metrics) = jax.lax.scan(advance, extra, each)
    return values.mean(), types.Aux(jax.tree.map(lambda m: m.mean(0), metrics), extra)

  return meta_loss


def orig(mask: types.MaskFn) -> types.Method:
  """ORIG as a method: `fixed_missing`."""

  def wrap(loss, key, method_params, *, hessian="reverse"):
    del method_params, hessian
    return fixed_missing(loss, mask, key)

  return types.Method(1, wrap, title="ORIG")


def spl(mask: types.MaskFn) -> types.Method:
  """SPL-TRN as a method: `sampled_missing`."""

  def wrap(loss, key, method_params, *, hessian="reverse"):
    del key, method_params, hessian
    return sampled_missing(loss, mask)

  return types.Method(1, wrap, title="SPL-TRN")


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
) -> types.Method:
  """M³S as a method: `m3s` on 2T draws, by default the support and the query set of each task.

  The Hessian mode is the loss's own, as its phase declares it.

  Args:
    mask: draws the missing data.
    optimizer: the inner optimizer's settings for `optim.make`; SGD at 1e-3 by default.
    inner_rates: "learned": a rate for each parameter leaf, which the outer optimizer trains; it
      starts at the inner optimizer's learning rate (that of the leaf's group).
    inner_steps, order, fresh_masks, support_rows, tasks, inner_trains, remat: see `m3s`;
      support_rows of a task's 2B rows.

  Returns:
    The method.

  Raises:
    UsageError: on unknown settings.
  """
  _check(order, "reverse", inner_steps, remat, tasks)
  if inner_rates not in (None, "learned"):
    raise types.UsageError(f"inner_rates is {inner_rates!r}, expected 'learned' or None.")
  settings = dict(name="sgd", learning_rate=1e-3) if optimizer is None else dict(optimizer)
  # learned rates multiply the updates of an optimizer whose rates are all 1
  made = settings if inner_rates is None else _with_unit_rates(settings)
  inner = optim.make(**made, differentiable=order == "second")

  def wrap(loss, key, method_params, *, hessian="reverse"):
    del key
    return m3s(
      loss,
      mask,
      inner_steps=inner_steps,
      inner_optimizer=inner,
      order=order,
      fresh_masks=fresh_masks,
      mode="mixed" if hessian == "symmetric" else "reverse",
      support_rows=support_rows,
      tasks=tasks,
      inner_rates=None if inner_rates is None else method_params,
      inner_trains=inner_trains,
      remat=remat,
    )

  def init(key, params):
    del key
    return _initial_rates(settings, params)

  return types.Method(2 * tasks, wrap, None if inner_rates is None else init, "M3S")


# The training methods by name: `METHODS[name](mask, **settings) -> Method`.
METHODS: Mapping[str, Callable[..., types.Method]] = {"orig": orig, "spl": spl, "m3s": m3s_method}
