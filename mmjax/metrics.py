"""The field's metrics, on the host: numpy and scikit-learn, unrounded.

Regression metrics follow MMSA and LNLN, which agree but for rounding:

  sentiment (MOSI, MOSEI; labels -3 … 3):
    mae, corr
    acc2_has0, f1_has0   negative against non-negative
    acc2_non0, f1_non0   negative against positive, samples whose label is 0 left out
    acc3, acc5, acc7     clipped to ±1, ±2, ±3 and rounded half to even (acc3: computed, but
                         not reported, by LNLN)
  sims (SIMS, SIMS v2; labels -1 … 1, all clipped to ±1):
    mae, corr
    acc2, f1             up to 0 against above
    acc3, acc5           bins that end, inclusively, at ±0.1, and at ±0.1, ±0.7

F1 is weighted by the classes' support, with the truth as the first argument. All binning is
in float32, as in the references: a prediction of float32(0.1) stays in the middle bin.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import confusion_matrix, f1_score

from mmjax import types

Metrics = dict[str, float]
MetricFn = Callable[[ArrayLike, ArrayLike], Metrics]

# What every metric is, and in which direction it gets better.
METRICS: Mapping[str, str] = {
  "loss": "min",
  "mae": "min",
  "corr": "max",
  "acc2_has0": "max",
  "acc2_non0": "max",
  "f1_has0": "max",
  "f1_non0": "max",
  "acc2": "max",
  "acc3": "max",
  "acc5": "max",
  "acc7": "max",
  "acc": "max",
  "uar": "max",
  "f1": "max",
}
LOWER_IS_BETTER = frozenset(name for name, better in METRICS.items() if better == "min")


def compute(
  task: str | types.Spec, prediction: ArrayLike, label: ArrayLike, *, swapped: bool = False
) -> Metrics:
  """All metrics of a task.

  Args:
    task: dataset name or spec, see `for_task`.
    prediction: [N] or [N, 1] sentiment, or [N, C] logits.
    label: [N] or [N, 1] sentiment, or [N] classes.
    swapped: also the F1 with swapped arguments, see `sentiment`; regression only.

  Returns:
    Each metric's value by its name.
  """
  function = for_task(task)
  if swapped and function is not classification:
    return function(prediction, label, swapped=True)
  return function(prediction, label)


def names(spec: types.Spec) -> tuple[str, ...]:
  """The metrics of a dataset, as `compute` names them."""
  classes = max(spec.num_classes, 1)
  return tuple(compute(spec, np.eye(classes), np.arange(classes)))


def for_task(task: str | types.Spec) -> MetricFn:
  """The metric function of a task.

  Args:
    task: a `Spec`, whose `num_classes` and `label_range` decide; or a dataset's name: "sims…"
      has `sims`, "iemocap…" `classification`, "mosi…" and "mosei…" `sentiment`. Under any
      other name, logits [N, C > 1] get `classification` and the rest `sentiment`.

  Returns:
    `(prediction, label) -> {name: value}`.
  """
  if isinstance(task, types.Spec):
    if task.num_classes:
      return classification
    return sims if max(map(abs, task.label_range)) <= 1 else sentiment
  name = task.lower()
  if name.startswith("sims"):
    return sims
  if name.startswith("iemocap"):
    return classification
  if name.startswith(("mosi", "mosei")):
    return sentiment
  return lambda p, y: (classification if np.size(p) > np.size(y) else sentiment)(p, y)


def sentiment(prediction: ArrayLike, label: ArrayLike, *, swapped: bool = False) -> Metrics:
  """MAE, Corr and the binned accuracies of MOSI and MOSEI; see the module's docstring.

  Args:
    prediction, label: [N] or [N, 1], on the scale -3 … 3.
    swapped: also "f1_has0_swapped" and "f1_non0_swapped", F1 with its arguments swapped, as
      an earlier version of LNLN's code had it: for comparison with its published values only.

  Returns:
    Each metric's value; those of "non0" are NaN where all labels are 0.
  """
  p, y = _flat(prediction, label)
  some = y != 0
  has0, non0 = (p >= 0, y >= 0), (p[some] > 0, y[some] > 0)
  found = {
    **_errors(p, y),
    "acc2_has0": _accuracy(*has0),
    "acc2_non0": _accuracy(*non0),
    "f1_has0": _weighted_f1(*has0),
    "f1_non0": _weighted_f1(*non0),
  }
  for classes in (3, 5, 7):
    half = classes // 2
    found[f"acc{classes}"] = _accuracy(*(np.round(np.clip(x, -half, half)) for x in (p, y)))
  if swapped:
    found["f1_has0_swapped"] = _weighted_f1(*has0[::-1])
    found["f1_non0_swapped"] = _weighted_f1(*non0[::-1])
  return found


def sims(prediction: ArrayLike, label: ArrayLike, *, swapped: bool = False) -> Metrics:
  """MAE, Corr and the binned accuracies of SIMS; see the module's docstring.

  Args:
    prediction, label: [N] or [N, 1], clipped to -1 … 1.
    swapped: also "f1_swapped", see `sentiment`.

  Returns:
    Each metric's value.
  """
  p, y = (np.clip(x, -1, 1) for x in _flat(prediction, label))
  found = _errors(p, y)
  for classes, ends in ((2, [0]), (3, [-0.1, 0.1]), (5, [-0.7, -0.1, 0.1, 0.7])):
    binned = [np.digitize(x, np.float32(ends), right=True) for x in (p, y)]
    found[f"acc{classes}"] = _accuracy(*binned)
    if classes == 2:
      found["f1"] = _weighted_f1(*binned)
      if swapped:
        found["f1_swapped"] = _weighted_f1(*binned[::-1])
  return found


def classification(prediction: ArrayLike, label: ArrayLike) -> Metrics:
  """Accuracy, unweighted average recall, weighted F1, and the F1 of each class.

  Args:
    prediction: [N, C] logits, or probabilities.
    label: [N] classes 0 … C - 1.

  Returns:
    "acc"; "uar", the mean recall of the classes that occur among the labels; "f1"; and
    "f1_0" … "f1_{C-1}", 0 for a class that is neither predicted nor a label.

  Raises:
    ValueError: on misshapen arguments, or labels that are not among the C classes.
  """
  counts = confusion(prediction, label)
  hits, support, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
  f1 = 2 * hits / np.maximum(support + predicted, 1)
  return {
    "acc": float(hits.sum() / support.sum()),
    "uar": float(np.mean(hits[support > 0] / support[support > 0])),
    "f1": float(f1 @ support / support.sum()),
    **{f"f1_{c}": float(value) for c, value in enumerate(f1)},
  }


def confusion(prediction: ArrayLike, label: ArrayLike) -> np.ndarray:
  """Confusion matrix: how many samples of a true class (row) got which class (column).

  Args:
    prediction: [N, C] logits, or probabilities.
    label: [N] or [N, 1] classes 0 … C - 1.

  Returns:
    [C, C] int.

  Raises:
    ValueError: on misshapen arguments, or labels that are not among the C classes.
  """
  prediction, label = np.asarray(prediction), np.asarray(label)
  if prediction.ndim != 2 or label.size != len(prediction) or not label.size:
    raise ValueError(
      f"expected logits [N, C] and N classes, got {prediction.shape} and {label.shape}."
    )
  classes = prediction.shape[1]
  if label.min() < 0 or label.max() >= classes:
    raise ValueError(
      f"labels range from {label.min()} to {label.max()}, but there are {classes} logits."
    )
  return confusion_matrix(
    label.ravel().astype(int), prediction.argmax(1), labels=np.arange(classes)
  )


def _flat(prediction: ArrayLike, label: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """Both as [N] float32."""
  p, y = np.asarray(prediction, np.float32), np.asarray(label, np.float32)
  if p.size != y.size or not p.size:
    raise ValueError(f"expected N predictions and N labels, got {p.shape} and {y.shape}.")
  return p.ravel(), y.ravel()


def _errors(p: np.ndarray, y: np.ndarray) -> Metrics:
  """MAE and Pearson's correlation; of a constant, the latter is undefined and given as 0."""
  constant = np.ptp(p) == 0 or np.ptp(y) == 0
  corr = 0.0 if constant else float(np.corrcoef(p, y)[0, 1])
  return {"mae": float(np.mean(np.abs(p - y))), "corr": corr}


def _accuracy(p: np.ndarray, y: np.ndarray) -> float:
  return float(np.mean(p == y)) if len(y) else float("nan")


def _weighted_f1(p: np.ndarray, y: np.ndarray) -> float:
  if not len(y):
    return float("nan")
  return float(f1_score(y, p, average="weighted", zero_division=0))


class Metric(NamedTuple):  # stand-in: the metrics rows are another branch's
  better: str


def info(name: str) -> Metric:
  return Metric(METRICS[name])
