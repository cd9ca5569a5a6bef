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

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from mmjax import types

ORDERS = ("first", "second")


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
  half = rows // 2
  return jax.tree.map(lambda a: a[:half], batch), jax.tree.map(lambda a: a[half:], batch)


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
) -> tuple[types.Params, chex.Array]:
  """The inner loop: K optimizer steps on the support set (Algorithm 1, lines 4-9; eq. 1).

  The optimizer starts afresh and `extra` is read only. Differentiable through all steps
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

  Returns:
    θ_K, and [K] the support loss before each step.
  """
  gradient = jax.value_and_grad(loss, has_aux=True)
  if not fresh_masks:  # one mask for all steps: draw it outside of the loop
    support = mask(keys.support_mask[0], support)

  @jax.checkpoint
  def step(carry, step_keys):
    params, state = carry
    mask_key, loss_key = step_keys
    seen = mask(mask_key, support) if fresh_masks else support
    (value, _), grads = gradient(params, seen, loss_key, extra)
    updates, state = optimizer.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), value

  (params, _), values = jax.lax.scan(
    step, (params, optimizer.init(params)), (keys.support_mask, keys.support_loss)
  )
  return params, values


def m3s(
  loss: types.LossFn,
  mask: types.MaskFn,
  *,
  inner_steps: int = 1,
  inner_optimizer: optax.GradientTransformation | None = None,
  order: str = "first",
  fresh_masks: bool = False,
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

  Returns:
    A loss with the signature of `loss`; its key must not be None. Its metrics are those of
    the query set, and "support_loss", the support set's loss before the first inner step.

  Raises:
    ValueError: on an unknown order, fewer than one inner step, or an odd number of rows.
  """
  if order not in ORDERS:
    raise ValueError(f"order is {order!r}, expected one of {ORDERS}.")
  if inner_steps < 1:
    raise ValueError(f"inner_steps is {inner_steps}, expected at least 1.")
  optimizer = optax.sgd(1e-3) if inner_optimizer is None else inner_optimizer

  def meta_loss(params, batch, key, extra):
    support, query = split_support_query(batch)
    keys = meta_keys(key, inner_steps, fresh_masks)
    start = jax.lax.stop_gradient(params) if order == "first" else params
    adapted, support_losses = adapt(
      loss, mask, start, support, keys, extra, optimizer=optimizer, fresh_masks=fresh_masks
    )
    if order == "first":  # the value of θ*, the derivative of θ: dθ*/dθ = I
      adapted = jax.tree.map(lambda a, p: a + (p - jax.lax.stop_gradient(p)), adapted, params)
    value, aux = loss(adapted, mask(keys.query_mask, query), keys.query_loss, extra)
    return value, aux._replace(metrics={**aux.metrics, "support_loss": support_losses[0]})

  return meta_loss
