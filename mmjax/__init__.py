"""mmjax: multimodal sentiment analysis when data is missing, in JAX.

The flat names are what composing losses needs; the rest lives in the modules.
"""

from mmjax.masking import bernoulli, compose, drop, erase, observed, random_drop, span
from mmjax.meta import adapt, fixed_missing, m3s, sampled_missing
from mmjax.types import (
  MODALITIES,
  Aux,
  Batch,
  LossFn,
  MaskFn,
  Method,
  Modality,
  ModalitySpec,
  Phase,
  Spec,
  System,
  TrainState,
)

__all__ = [
  "MODALITIES",
  "Aux",
  "Batch",
  "LossFn",
  "MaskFn",
  "Method",
  "Modality",
  "ModalitySpec",
  "Phase",
  "Spec",
  "System",
  "TrainState",
  "adapt",
  "bernoulli",
  "compose",
  "drop",
  "erase",
  "fixed_missing",
  "m3s",
  "observed",
  "random_drop",
  "sampled_missing",
  "span",
]
