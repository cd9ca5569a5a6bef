"""Losses as pure functions, and combinators of whole `LossFn`s.

Elementwise losses return one value per element or sample, and the caller reduces, with
`masked_mean` where padding or filled-up rows must not count. What optax has is not repeated:
`optax.losses.squared_error`, `huber_loss` (smooth L1), `softmax_cross_entropy_with_integer_labels`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from mmjax import types

Array = types.Array
Elementwise = Callable[[Array, Array], Array]


def absolute_error(prediction: Array, target: Array) -> Array:
  """|prediction - target|, the L1 loss.

  Args:
    prediction: [...].
    target: [...], the same shape.

  Returns:
    [...] elementwise.
  """
  chex.assert_equal_shape([prediction, target])
  return jnp.abs(prediction - target)


REGRESSION: Mapping[str, Elementwise] = {
  "mse": optax.losses.squared_error,
  "l1": absolute_error,
}


def task(prediction: Array, label: Array, regression: str = "mse") -> Array:
  """The error of a task's prediction against its label.

  Args:
    prediction: [B], or logits [B, C] for the softmax cross-entropy.
    label: [B] float, or classes [B].
    regression: "mse" or "l1", as the system's authors chose.

  Returns:
    [B] elementwise.

  Raises:
    ValueError: on an unknown regression loss.
  """
  if regression not in REGRESSION:
    raise ValueError(f"regression is {regression!r}, expected one of {sorted(REGRESSION)}.")
  chex.assert_rank(prediction, {1, 2})
  if prediction.ndim == 1:
    return REGRESSION[regression](prediction, label)
  chex.assert_equal_shape_prefix([prediction, label], 1)
  return optax.losses.softmax_cross_entropy_with_integer_labels(prediction, label.astype(jnp.int32))


def masked_mean(values: Array, mask: Array) -> Array:
  """Mean of the values that count; 0 where none does.

  Args:
    values: [...].
    mask: weights or bools that broadcast against `values`, such as `valid[..., None]` against
      [B, L, D].

  Returns:
    [] sum(values · mask) / sum(mask).
  """
  weight = jnp.broadcast_to(jnp.asarray(mask).astype(values.dtype), values.shape)
  total = weight.sum()
  # where, not a product: what is masked out may be NaN
  summed = jnp.where(weight != 0, values, 0) * weight
  return summed.sum() / jnp.where(total == 0, 1, total)


def reconstruction(
  prediction: Array,
  target: Array,
  mask: Array | None = None,
  *,
  error: Elementwise = optax.losses.squared_error,
) -> Array:
  """Mean error of reconstructed features, over all entries or over those that count.

  With `~seen & valid[..., None]` as the mask, only what was missing is to be restored, as in
  TFR-Net (Yuan et al. 2021, there with `optax.losses.huber_loss`). The target is not
  detached; the caller stops its gradient where the system does.

  Args:
    prediction: [...] reconstruction.
    target: [...] clean features.
    mask: weights or bools that broadcast against `target`; None counts every entry. What is
      masked out is not read.
    error: elementwise.

  Returns:
    [] mean error; 0 if nothing counts.
  """
  chex.assert_equal_shape([prediction, target])
  if mask is None:
    return error(prediction, target).mean()
  # before the error too: what is masked out may be NaN, and 0 · NaN would be its gradient
  counts = jnp.broadcast_to(jnp.asarray(mask).astype(bool), target.shape)
  prediction, target = (jnp.where(counts, a, 0) for a in (prediction, target))
  return masked_mean(error(prediction, target), mask)


def cmd(x: Array, y: Array, moments: int = 5) -> Array:
  """Central moment discrepancy of two samples (Zellinger et al. 2017, arXiv 1702.08811).

    ‖E[x] - E[y]‖ + Σ_{k=2..K} ‖E[(x - E[x])^k] - E[(y - E[y])^k]‖

  As MISA has it: the features are taken to lie in an interval of length 1 (they come out of
  a sigmoid), so no power of b - a divides. The gradient of a term is 0 where it is 0 (the
  square root's own would be NaN): two equal samples are at rest.

  Args:
    x: [N, D] features.
    y: [M, D] features.
    moments: K.

  Returns:
    [] the discrepancy.
  """
  chex.assert_rank([x, y], 2)
  chex.assert_equal(x.shape[1], y.shape[1])
  mean_x, mean_y = x.mean(0), y.mean(0)
  total = _norm(mean_x - mean_y)
  for k in range(2, moments + 1):
    total += _norm(((x - mean_x[None]) ** k).mean(0) - ((y - mean_y[None]) ** k).mean(0))
  return total


def difference(x: Array, y: Array, eps: float = 1e-6) -> Array:
  """Soft orthogonality of two representations of the same samples, DiffLoss.

  From domain separation networks (Bousmalis et al. 2016, arXiv 1608.06019, eq. 5), as MISA
  (Hazarika et al. 2020, arXiv 2005.03545) has it in code: features are centred over the batch, each
  sample is divided by its norm, which counts as a constant in the gradient, and the squares
  are averaged over the D_x · D_y pairs of features.

  Args:
    x: [B, ...] representation, flattened to [B, D_x].
    y: [B, ...] representation, flattened to [B, D_y].
    eps: added to the norms.

  Returns:
    [] mean((x̂ᵀ ŷ)²).
  """
  chex.assert_equal_shape_prefix([x, y], 1)

  def normalize(z):
    z = z.reshape(z.shape[0], -1)
    z = z - z.mean(0)[None]
    norm = jnp.linalg.norm(z, axis=1, keepdims=True)
    return z / (jax.lax.stop_gradient(norm) + eps)

  return jnp.mean((normalize(x).T @ normalize(y)) ** 2)


def info_nce(x: Array, y: Array, temperature: float = 1.0) -> Array:
  """InfoNCE: which row of `y` belongs to a row of `x` (van den Oord et al. 2018).

    -log( exp(⟨x̂_i, ŷ_i⟩ / τ) / Σ_j exp(⟨x̂_i, ŷ_j⟩ / τ) ),   x̂ = x / ‖x‖

  log B minus its mean bounds the mutual information of x and y from below. With τ = 1 and y
  predicted from a fusion it is the contrastive term of MMIM (Han et al. 2021, arXiv 2109.00412).

  Args:
    x: [B, D] representations. A row of zeros, of text that is missing altogether, has no
      direction: its products and its gradient are 0.
    y: [B, D] their partners; the other rows are the negatives.
    temperature: τ.

  Returns:
    [B] one value for each row of `x`.
  """
  chex.assert_rank([x, y], 2)
  chex.assert_equal_shape([x, y])
  logits = _direction(x) @ _direction(y).T / temperature
  return jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(logits)


def weighted_sum(terms: Mapping[str, tuple[chex.Numeric, types.LossFn]]) -> types.LossFn:
  """Σ weight · loss over named losses, as one loss.

  The losses run in the given order with keys of their own; each reads the `extra` that the one
  before it returned. Parts of one forward pass are better added up inside of one loss.

  Args:
    terms: `{name: (weight, loss)}`.

  Returns:
    A loss; its metrics hold each unweighted value by its name, and what the losses log as
    "name/metric".
  """

  def loss(params, batch, key, extra):
    total: Any = 0.0
    metrics = {}
    for i, (name, (weight, term)) in enumerate(terms.items()):
      term_key = None if key is None else jax.random.fold_in(key, i)
      value, aux = term(params, batch, term_key, extra)
      total, extra = total + weight * value, aux.extra
      metrics |= {name: value} | {f"{name}/{k}": v for k, v in aux.metrics.items()}
    return total, types.Aux(metrics, extra)

  return loss


def with_l2(loss: types.LossFn, coefficient: chex.Numeric, pattern: str = "") -> types.LossFn:
  """Adds coefficient · Σ θ² of the parameters whose "a/b/c" path matches.

  It is part of the loss, hence of M³S's inner steps too, unlike the optimizer's weight decay.

  Args:
    loss: any loss.
    coefficient: of the sum of squares.
    pattern: regex searched in each parameter's path; "" takes all.

  Returns:
    A loss; "l2" in its metrics is the sum of squares.
  """

  def regularized(params, batch, key, extra):
    value, aux = loss(params, batch, key, extra)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    chosen = [
      leaf
      for path, leaf in leaves
      if re.search(pattern, jax.tree_util.keystr(path, simple=True, separator="/"))
    ]
    if not chosen:
      raise ValueError(f"with_l2: no parameter's path matches {pattern!r}.")
    squares = sum(jnp.sum(leaf**2) for leaf in chosen)
    return value + coefficient * squares, aux._replace(metrics={**aux.metrics, "l2": squares})

  return regularized


def _direction(x: Array) -> Array:
  """x [B, D] with rows of length 1; rows of zeros stay, with a gradient of zeros."""
  squared = jnp.sum(x**2, axis=1, keepdims=True)
  exists = squared > 0  # replaced before the root: its derivative at 0 is infinite
  return jnp.where(exists, x, 0.0) / jnp.sqrt(jnp.where(exists, squared, 1.0))


def _norm(x: Array) -> Array:
  """‖x‖, exact, with gradient 0 at 0."""
  squared = jnp.sum(x**2)
  zero = squared == 0
  return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squared)))
