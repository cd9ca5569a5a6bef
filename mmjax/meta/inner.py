"""The inner loop of M³S and MAML, and how it is differentiated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import core
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from mmjax import optim, types

ORDERS = ("first", "second")
MODES = ("reverse", "mixed")
REMATS = ("steps", "none", "dots_saveable", "dots_with_no_batch_dims_saveable")

_GRADS = "inner_gradient"  # their name for checkpoint policies


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


def check(order, mode, inner_steps, remat, tasks=1):
  """Raises a UsageError on settings that `m3s` does not have."""
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
) -> tuple[types.Params, types.Array]:
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
  check(order, mode, inner_steps, remat)
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
  kept = held(constant)

  def objective(trained, constant, step_keys):
    mask_key, loss_key = step_keys
    seen = mask(mask_key, support) if fresh_masks else support
    return loss(optim.merge(trained, constant), seen, loss_key, extra)[0]

  if remat == "steps" and len(keys.support_mask) == 1:
    remat = "none"  # the backward pass begins with this step
  if mode == "mixed" and order == "second":
    gradient = jax.value_and_grad(objective, argnums=(0, 1))
    gradient = _symmetric(gradient, linearize=remat != "steps")
  else:
    gradient = jax.value_and_grad(objective)

  def step(carry, step_keys):
    params, state = carry
    value, grads = gradient(params, kept, step_keys)
    value_fn = lambda params: objective(params, kept, step_keys)  # noqa: E731
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
  """Takes the vjp of a gradient, by the parameters, to be a jvp of it.

  The mixed mode of Kemaev et al. 2025 (arXiv 2505.00793): forward over reverse needs no more
  memory than a gradient. All else that the gradient reads, keys and what it closes over, gets
  its cotangents by reverse mode, and only where they are asked for.

  Args:
    gradient: (trained, constant, keys) -> value, (gradient by trained, by constant).
    linearize: whether the jvp's linearization is kept from the forward pass.

  Returns:
    A function of the same arguments -> value, gradient by trained. Row and column of a Hessian are
    one: its derivative by constant is the jvp, along trained, of the gradient by constant.
  """

  def symmetric(trained, constant, keys):
    # closed-over arrays become arguments: a custom_vjp must see all that it is differentiated by
    jaxpr, shapes = jax.make_jaxpr(gradient, return_shape=True)(trained, constant, keys)

    def of_all(trained, constant, rest):
      keys, consts = rest
      found = core.eval_jaxpr(jaxpr.jaxpr, consts, *jax.tree.leaves((trained, constant, keys)))
      return jax.tree.unflatten(jax.tree.structure(shapes), found)

    def pure(trained, constant, rest):
      value, (grads, _) = of_all(trained, constant, rest)
      return value, grads

    def by_trained(constant, *rest):
      return lambda trained: of_all(trained, constant, optim.merge(*rest))

    def forward(trained, constant, rest):
      trained, constant = jax.tree.map(lambda a: a.value, (trained, constant))
      asked = jax.tree.map(lambda a: a.value if a.perturbed else None, rest)
      others = jax.tree.map(lambda a: None if a.perturbed else a.value, rest)
      params, linear = (trained, constant), None
      if linearize:
        (value, every), push = jax.linearize(by_trained(constant, asked, others), trained)
        grads, linear = every[0], (every, push)
      else:
        value, grads = pure(trained, constant, optim.merge(asked, others))
      return (value, grads), (params, asked, others, linear)

    def backward(kept, cotangents):
      (trained, constant), asked, others, linear = kept
      d_value, d_grads = jax.tree.map(_or_zeros, cotangents, (shapes[0], shapes[1][0]))
      if linear is None:
        along = by_trained(constant, asked, others)
        (_, grads), (_, d_params) = jax.jvp(along, (trained,), (d_grads,))
      else:
        grads, push = linear
        d_params = push(d_grads)[1]
      if not isinstance(cotangents[0], SymbolicZero):  # an optimizer reads the value
        d_params = jax.tree.map(lambda d, g: d + d_value * g, d_params, grads)
      if jax.tree.leaves(asked):
        _, pull = jax.vjp(lambda asked: pure(trained, constant, optim.merge(asked, others)), asked)
        (asked,) = pull((d_value, d_grads))
      return *d_params, asked

    function = jax.custom_vjp(pure)
    function.defvjp(forward, backward, symbolic_zeros=True)
    value, grads = function(trained, constant, (keys, jaxpr.consts))
    return value, checkpoint_name(grads, _GRADS)

  return symmetric


def _or_zeros(cotangent, shape):
  if isinstance(cotangent, SymbolicZero):
    return jnp.zeros(shape.shape, shape.dtype)
  return cotangent
