"""What predictions and representations look like: confusion, collapse, a plane."""

import pathlib
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import sklearn.metrics
import threadpoolctl
from sklearn import decomposition, manifold

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


def view(features: Mapping[str, np.ndarray], how: str = "pca") -> dict[str, np.ndarray]:
  """{condition: [N, D]} -> {"rate CONDITION": [N, 2]}, by one of `VIEWS`."""
  flat = VIEWS[how](list(features.values()))
  return {
    f"rate {name}": np.pad(p, ((0, 0), (0, 2 - p.shape[1])))
    for name, p in zip(features, flat, strict=True)
  }


def _principal(clouds: list[np.ndarray]) -> list[np.ndarray]:
  """The plane of the first cloud's principal components (LNLN's Fig. 8)."""
  components = decomposition.PCA(min(2, *clouds[0].shape)).fit(clouds[0])
  return [components.transform(cloud) for cloud in clouds]


def _neighbours(clouds: list[np.ndarray]) -> list[np.ndarray]:
  """t-SNE of all clouds together."""
  points = np.concatenate(clouds).astype(np.float64)
  dims = min(2, points.shape[1])
  perplexity = min(30.0, (len(points) - 1) / 3)
  made = manifold.TSNE(dims, perplexity=perplexity, init="pca", random_state=0)
  # one thread: the same bits on any machine, and no threads that wait for each other on a busy one
  with threadpoolctl.threadpool_limits(1):
    flat = made.fit_transform(points)
  return np.split(flat, np.cumsum([len(cloud) for cloud in clouds])[:-1])


# How representations become points of a plane: [N, D] each -> [N, 2] each.
VIEWS: dict[str, Callable[[list[np.ndarray]], list[np.ndarray]]] = {
  "pca": _principal,
  "tsne": _neighbours,
}
TITLES = {"pca": "two principal components", "tsne": "t-SNE of all together"}


def class_names(spec: types.Spec) -> list[str]:
  """What `classes_of` gives, from the lowest on."""
  if spec.problems:  # all sets of those whose answer is yes
    yes = ([p for k, p in enumerate(spec.problems) if n >> k & 1] for n in range(spec.num_classes))
    return ["+".join(one) or "-" for one in yes]
  low, high = (0, spec.num_classes - 1) if spec.num_classes else map(round, spec.label_range)
  return [str(n) for n in range(low, high + 1)]


def confusions(
  shown: Mapping[str, Mapping[str, np.ndarray]], label: np.ndarray, spec: types.Spec
) -> tuple[list[str], dict[str, dict[str, np.ndarray]]]:
  """Confusion matrices [C, C], rows being labels, by model and condition.

  Args:
    shown: model -> condition -> predictions [N, ...].
    label: [N].
    spec: of the dataset.

  Returns:
    The C names of the classes (of binary problems, only of answers that occur), and the counts.
  """
  low = 0 if spec.num_classes else round(spec.label_range[0])
  truth, names = classes_of(label, spec) - low, class_names(spec)
  found = {
    model: {c: classes_of(values, spec) - low for c, values in one.items()}
    for model, one in shown.items()
  }
  kept = list(range(len(names)))
  if spec.problems:
    every = [truth, *(values for one in found.values() for values in one.values())]
    kept = np.unique(np.concatenate(every)).tolist()
  return [names[n] for n in kept], {
    model: {c: sklearn.metrics.confusion_matrix(truth, v, labels=kept) for c, v in one.items()}
    for model, one in found.items()
  }


def confusion_figure(names, found, out: pathlib.Path) -> pathlib.Path:
  """`confusion.png`: a row per model, a column per missing rate (Figs. 5-7), of `confusions`."""
  titled = {f"{model}, rate {c}": counts for model, of in found.items() for c, counts in of.items()}
  columns = max(len(one) for one in found.values())
  return plots.matrices(titled, names, out / "confusion.png", columns=columns)
