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

from mmjax.meta.hard import hardest
from mmjax.meta.inner import MODES, ORDERS, REMATS, MetaKeys, adapt, meta_keys
from mmjax.meta.methods import (
  METHODS,
  fixed_missing,
  m3s,
  sampled_missing,
  split_support_query,
)

__all__ = [
  "METHODS",
  "MODES",
  "ORDERS",
  "REMATS",
  "MetaKeys",
  "adapt",
  "fixed_missing",
  "hardest",
  "m3s",
  "meta_keys",
  "sampled_missing",
  "split_support_query",
]
