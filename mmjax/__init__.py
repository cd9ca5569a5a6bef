"""mmjax: multimodal sentiment analysis when data is missing, in JAX.

The flat names are what composing losses needs; the rest lives in the modules, which
`mmjax.data`, `mmjax.train` and so on load when they are first named. So do `mmjax.load`, a trained
model out of its folder, and `mmjax.export`, which serves it.
"""

import importlib as _importlib
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
  from mmjax import (
    checkpoint,
    conversations,
    data,
    evaluate,
    files,
    losses,
    masking,
    meta,
    metrics,
    models,
    optim,
    plots,
    predict,
    runs,
    serving,
    synthetic,
    systems,
    tables,
    train,
    types,
  )
  from mmjax.runs import load
  from mmjax.serving import export

__version__ = "0.2.0"

_MODULES = (
  "checkpoint",
  "conversations",
  "data",
  "evaluate",
  "files",
  "losses",
  "masking",
  "meta",
  "metrics",
  "models",
  "optim",
  "plots",
  "predict",
  "runs",
  "serving",
  "synthetic",
  "systems",
  "tables",
  "train",
  "types",
)
# Functions by the module that brings them.
_FUNCTIONS = {"export": "serving", "load": "runs"}

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
  "export",
  "fixed_missing",
  "load",
  "m3s",
  "observed",
  "random_drop",
  "sampled_missing",
  "span",
]


def __getattr__(name: str):
  if name in _MODULES:
    return _importlib.import_module(f"mmjax.{name}")
  if name in _FUNCTIONS:
    return getattr(_importlib.import_module(f"mmjax.{_FUNCTIONS[name]}"), name)
  raise AttributeError(f"module 'mmjax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*__all__, *_MODULES])
