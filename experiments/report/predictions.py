"""What predictions and representations look like: confusion, collapse, a plane."""

import pathlib
from collections.abc import Mapping

import numpy as np
import pandas as pd
import sklearn.metrics
from sklearn import decomposition

from mmjax import plots, types


def classes_of(values: np.ndarray, spec: types.Spec) -> np.ndarray:
  """Classes for confusion matrices: [N] rounded labels or predictions, or the arg-max."""
  if spec.num_classes:
    return values.argmax(-1) if values.ndim == 2 else values
  low, high = (round(end) for end in spec.label_range)
  return np.clip(np.round(values), low, high).astype(int)


def laziness(
  shown: Mapping[str, Mapping[str, np.ndarray]], label: np.ndarray, spec: types.Spec
) -> pd.DataFrame:
  """How much predictions collapse: share of the most predicted class, entropy in nats."""

  def row(model, condition, values):
    share = np.unique(classes_of(values, spec), return_counts=True)[1] / len(values)
    return {
      "model": model,
      "condition": condition,
      "largest share": share.max(),
      "entropy": -(share * np.log(share)).sum(),
    }

  found = [row("labels", "", label)]
  for model, predictions in shown.items():
    found += [row(model, condition, values) for condition, values in predictions.items()]
  return pd.DataFrame(found)


def view(features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Fig. 8: {condition: [N, D]} -> {condition: [N, 2]}, principal components of the first one."""
  first = next(iter(features.values()))
  components = decomposition.PCA(min(2, *first.shape)).fit(first)
  flat = {f"rate {name}": components.transform(values) for name, values in features.items()}
  return {name: np.pad(p, ((0, 0), (0, 2 - p.shape[1]))) for name, p in flat.items()}


def confusion_figure(shown, label, spec, out) -> pathlib.Path:
  """`confusion.png`: a row per model, a column per missing rate (Figs. 5-7)."""
  truth = classes_of(label, spec)
  low, high = (round(end) for end in spec.label_range)
  names = list(range(spec.num_classes)) if spec.num_classes else list(range(low, high + 1))
  found = {
    f"{model}, rate {condition}": sklearn.metrics.confusion_matrix(
      truth, classes_of(values, spec), labels=names
    )
    for model, predictions in shown.items()
    for condition, values in predictions.items()
  }
  columns = max(len(predictions) for predictions in shown.values())
  return plots.matrices(found, names, out / "confusion.png", columns=columns)
