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

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mmjax import optim, types

ORDERS = ("first", "second")
MODES = ("reverse", "mixed")


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
    support_masks = jnp.repeat(support_mask[None], inner_steps)
  return MetaKeys(
    support_masks, jax.random.split(support_loss, inner_steps), query_mask, query_loss
  )


def split_support_query(batch: types.Batch) -> tuple[types.Batch, types.Batch]:
  """Splits a batch of 2B rows into the support set X₁ (first half) and the query set X₂."""
  rows = batch.index.shape[0]
  if rows % 2:
    raise ValueError(
      f"m3s needs as many support as query rows, but the batch has {rows} rows: draw 2B rows"
      " a step, the first half for the inner loop and the second for the outer loss."
    )
  # not a[:B] and a[B:]: where devices share the rows, those would be cut from both halves' shares
  pairs = jax.tree.map(lambda a: a.reshape(2, rows // 2, *a.shape[1:]), batch)
  return jax.tree.map(lambda a: a[0], pairs), jax.tree.map(lambda a: a[1], pairs)


def adapt(
  loss: types.LossFn,
  mask: types.MaskFn,
  params: types.Params,
  support: types.Batch,
  keys: MetaKeys,
  extra: types.Extra,
  *,
  optimizer: optax.GradientTransformation,
  fresh_masks: bool = False,
  mode: str = "reverse",
) -> tuple[types.Params, chex.Array]:
  """The inner loop: K optimizer steps on the support set (Algorithm 1, lines 4-9; eq. 1).

  The optimizer starts afresh and `extra` is read only. θ_K is differentiable through all steps
  with respect to `params`; one step is recomputed at a time in the backward pass, so the
  memory grows with K by one copy of the parameters (and optimizer state) a step.

  Args:
    loss: the model's loss.
    mask: draws the missing data.
    params: θ₀.
    support: the clean support set, B rows.
    keys: the keys of this meta step; K is their number.
    extra: the system's training arrays.
    optimizer: the inner optimizer, plain SGD in the paper.
    fresh_masks: whether each inner step draws a mask of its own.
    mode: how an inner gradient is differentiated, see `m3s`.

  Returns:
    θ_K, and [K] the support loss before each step (it has no derivative).
  """
  if not fresh_masks:  # one mask for all steps: draw it outside of the loop
    support = mask(keys.support_mask[0], support)

  def gradient(params, step_keys, support, extra):
    mask_key, loss_key = step_keys
    seen = mask(mask_key, support) if fresh_masks else support
    (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, seen, loss_key, extra)
    return grads, value

  descend = {"reverse": _descend, "mixed": _descend_mixed}[mode]
  step_keys = (keys.support_mask, keys.support_loss)
  params, values = descend(gradient, optimizer, params, step_keys, support, extra)
  return params, jax.lax.stop_gradient(values)


def _update(optimizer, grads, state, params):
  updates, state = optimizer.update(grads, state, params)
  return optax.apply_updates(params, updates), state


def _descend(gradient, optimizer, params, keys, *data):
  """One optimizer step per key: the last parameters, and the value before each step."""

  @jax.checkpoint
  def step(carry, keys):
    params, state = carry
    grads, value = gradient(params, keys, *data)
    return _update(optimizer, grads, state, params), value

  (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), keys)
  return params, values


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _descend_mixed(gradient, optimizer, params, keys, *data):
  """`_descend`, whose vjp takes products with the inner Hessian as a jvp of the gradient.

  The mixed mode of Kemaev et al. 2025 (arXiv 2505.00793): forward over reverse needs no more
  memory than a gradient.
  """
  return _descend_mixed_fwd(gradient, optimizer, params, keys, *data)[0]


def _descend_mixed_fwd(gradient, optimizer, params, keys, *data):
  def step(carry, keys):
    params, state = carry
    grads, value = gradient(params, keys, *data)
    return _update(optimizer, grads, state, params), (value, (params, state, grads))

  (final, _), (values, path) = jax.lax.scan(step, (params, optimizer.init(params)), keys)
  return (final, values), (path, keys, data)


def _descend_mixed_bwd(gradient, optimizer, kept, cotangents):
  path, keys, data = kept
  d_final, _ = cotangents
  start = jax.tree.map(lambda a: a[0], path[1])
  d_state = [jnp.zeros_like(leaf) for leaf in jax.tree.leaves(start) if _is_real(leaf)]

  def step(carry, inputs):
    (params, state, grads), step_keys = inputs
    leaves, structure = jax.tree.flatten(state)

    def update(grads, real, params):  # of the real numbers in the state alone
      real = iter(real)
      own = [next(real) if _is_real(leaf) else leaf for leaf in leaves]
      params, state = _update(optimizer, grads, jax.tree.unflatten(structure, own), params)
      return params, [leaf for leaf in jax.tree.leaves(state) if _is_real(leaf)]

    real = [leaf for leaf in leaves if _is_real(leaf)]
    d_grads, d_state, d_params = jax.vjp(update, grads, real, params)[1](carry)
    turned = jax.jvp(lambda p: gradient(p, step_keys, *data)[0], (params,), (d_grads,))[1]
    return (jax.tree.map(jnp.add, d_params, turned), d_state), None

  (d_params, _), _ = jax.lax.scan(step, (d_final, d_state), (path, keys), reverse=True)
  return d_params, None, *(None for _ in data)


_descend_mixed.defvjp(_descend_mixed_fwd, _descend_mixed_bwd)


def _is_real(leaf) -> bool:
  return jnp.issubdtype(leaf.dtype, jnp.inexact)


def m3s(
  loss: types.LossFn,
  mask: types.MaskFn,
  *,
  inner_steps: int = 1,
  inner_optimizer: optax.GradientTransformation | None = None,
  order: str = "first",
  fresh_masks: bool = False,
  mode: str = "reverse",
) -> types.LossFn:
  """M³S meta-sampling around any loss (Chi et al. 2022, Algorithm 1).

  The returned loss takes a batch of 2B rows: the first half is the support set X₁, the
  second the query set X₂, each masked on its own. Its value is the query loss at θ*, the
  parameters after K inner steps on X₁. Its gradient is the meta-gradient:

    order="first":   ∇_{θ*} l(f(X̃₂; θ*), Y₂), as line 11 of the algorithm states. θ* is
                     computed without being differentiated, so the gradient costs K + 1
                     plain gradients and no memory beyond one.
    order="second":  d l(f(X̃₂; θ*(θ)), Y₂) / dθ, exact through all K inner steps (MAML).

  `extra` advances on the query set only, once a step.

  Args:
    loss: the model's loss, `(params, batch, key, extra) -> (scalar, Aux)`.
    mask: draws the missing data, such as `masking.span((0.4, 0.6))`.
    inner_steps: K ≥ 1; the paper does not state it.
    inner_optimizer: optax transformation of the inner loop; `optax.sgd(1e-3)` by default.
      It starts afresh at every meta step. Under order="second" it is differentiated:
      `optax.adam` then needs `eps_root > 0`, or a zero gradient gives NaN.
    order: "first" or "second".
    fresh_masks: draw a new support mask at each inner step, not one for all of them.
    mode: of order="second", how an inner gradient is differentiated. "reverse" is exact for
      every loss. "mixed", forward over reverse, is faster and leaner, and the same wherever
      the loss's gradient is the gradient of something: stopped gradients are, reversed ones
      (LNLN's adversary) are not.

  Returns:
    A loss with the signature of `loss`; its key must not be None. Its metrics are those of
    the query set, and "support_loss", the support set's loss before the first inner step.

  Raises:
    ValueError: on an unknown order or mode, fewer than one inner step, or an odd number of rows.
  """
  if order not in ORDERS:
    raise ValueError(f"order is {order!r}, expected one of {ORDERS}.")
  if mode not in MODES:
    raise ValueError(f"mode is {mode!r}, expected one of {MODES}.")
  if inner_steps < 1:
    raise ValueError(f"inner_steps is {inner_steps}, expected at least 1.")
  optimizer = optax.sgd(1e-3) if inner_optimizer is None else inner_optimizer

  def meta_loss(params, batch, key, extra):
    support, query = split_support_query(batch)
    keys = meta_keys(key, inner_steps, fresh_masks)
    start = jax.lax.stop_gradient(params) if order == "first" else params
    adapted, support_losses = adapt(
      loss,
      mask,
      start,
      support,
      keys,
      extra,
      optimizer=optimizer,
      fresh_masks=fresh_masks,
      mode=mode,
    )
    if order == "first":  # the value of θ*, the derivative of θ: dθ*/dθ = I
      adapted = jax.tree.map(lambda a, p: a + (p - jax.lax.stop_gradient(p)), adapted, params)
    value, aux = loss(adapted, mask(keys.query_mask, query), keys.query_loss, extra)
    return value, aux._replace(metrics={**aux.metrics, "support_loss": support_losses[0]})

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


def m3s_method(
  mask: types.MaskFn,
  *,
  order: str = "first",
  optimizer: Mapping[str, Any] | None = None,
  **settings: Any,
) -> types.Method:
  """M³S as a method: `m3s`, whose inner loop steps on one draw and whose query set is another.

  Args:
    mask: draws the missing data.
    order: see `m3s`.
    optimizer: the inner optimizer's settings for `optim.make`; SGD at 1e-3 by default.
    **settings: the other options of `m3s`.

  Returns:
    The method. The Hessian mode is the loss's own, as its phase declares it.
  """
  optimizer = dict(name="sgd", learning_rate=1e-3) if optimizer is None else dict(optimizer)
  inner = optim.make(**optimizer, differentiable=order == "second")

  def wrap(loss, key, method_params, *, hessian="reverse"):
    del key, method_params
    mode = "mixed" if hessian == "symmetric" else "reverse"
    return m3s(loss, mask, order=order, inner_optimizer=inner, mode=mode, **settings)

  return types.Method(2, wrap, title="M3S")


# The training methods by name: `METHODS[name](mask, **settings) -> Method`.
METHODS: Mapping[str, Callable[..., types.Method]] = {"orig": orig, "spl": spl, "m3s": m3s_method}
