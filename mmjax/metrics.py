"""The field's metrics, on the host: numpy and scikit-learn, unrounded.

The task and the scale of the labels decide which there are (`scale_of`):

  regression (any scale): mae, corr; nothing else where no binning is defined, such as 1 … 7,
    0 … 1 or beyond ±3: there "negative" or "seven classes" would mean nothing
  sentiment (MOSI, MOSEI; labels -3 … 3), beside these:
    acc2_has0, f1_has0   negative against non-negative
    acc2_non0, f1_non0   negative against positive, samples whose label is 0 left out
    acc3, acc5, acc7     clipped to ±1, ±2, ±3 and rounded half to even (acc3: computed, but
                         not reported, by LNLN)
  sims (SIMS, SIMS v2; labels -1 … 1, all clipped to ±1), beside these:
    acc2, f1             up to 0 against above
    acc3, acc5           bins that end, inclusively, at ±0.1, and at ±0.1, ±0.7
  classification: acc, uar, f1, and f1_0, f1_1 … of the classes
  binary (IEMOCAP's four emotions, each its own problem): f1_happy, f1_sad … weighted over no and
    yes; acc and f1 are the means over the problems

They follow MMSA and LNLN, which agree but for rounding. F1 is weighted by the classes'
support, with the truth as the first argument. All binning is in float32, as in the
references: a prediction of float32(0.1) stays in the middle bin. One prediction that is NaN
makes every metric NaN: a model that diverged has no accuracy.
"""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import confusion_matrix, f1_score

from mmjax import registry, types

Metrics = dict[str, float]
MetricFn = Callable[..., Metrics]

SLACK = 1e-3  # by which labels may lie beyond the ends of a scale


class Metric(NamedTuple):
  """What is known of a metric.

  Attributes:
    better: "min" or "max".
    title: how figures write it.
    headline: whether it is one of those that figures and the terminal show.
    needs: the scales of `scale_of` on which it is defined.
  """

  better: str
  title: str
  headline: bool
  needs: tuple[str, ...]


def compute(
  spec: types.Spec, prediction: ArrayLike, label: ArrayLike, *, swapped: bool = False
) -> Metrics:
  """All metrics of a task.

  Args:
    spec: of the dataset, see `for_task`.
    prediction: [N] or [N, 1] sentiment, or [N, C] logits.
    label: [N] or [N, 1] sentiment, or [N] classes.
    swapped: also the F1 with swapped arguments, see `sentiment`; where there is a binary one.

  Returns:
    Each metric's value by its name, in the order of `METRICS`; NaN if any prediction is.
  """
  function = for_task(spec)
  also = {"swapped": True} if swapped and function in (sentiment, sims) else {}
  found = function(prediction, label, **also)
  return {name: found[name] for name in ordered(found)}


def names(spec: types.Spec) -> tuple[str, ...]:
  """The metrics of a dataset, as `compute` names them."""
  scale = scale_of(spec)
  if scale == "binary":
    return tuple(ordered(["acc", "f1", *(f"f1_{problem}" for problem in spec.problems)]))
  own = tuple(name for name, metric in METRICS.items() if scale in metric.needs)
  return own + tuple(f"f1_{c}" for c in range(spec.num_classes))


def scale_of(spec: types.Spec) -> str:
  """What the labels of a dataset are: the one rule that decides its metrics.

  Args:
    spec: whose `num_classes` and `label_range` decide. The latter may be that of the labels
      which occur, and need not reach the ends of the scale.

  Returns:
    "binary" where there are binary problems; "classification"; "sims" for labels of both signs
    within ±1; "sentiment" for labels of both signs within ±3; "regression" for all others.
  """
  if spec.problems:
    return "binary"
  if spec.num_classes:
    return "classification"
  low, high = spec.label_range
  if not low < 0 < high:
    return "regression"
  largest = max(-low, high) - SLACK
  return "sims" if largest <= 1 else "sentiment" if largest <= 3 else "regression"


def for_task(spec: types.Spec) -> MetricFn:
  """The metric function `(prediction, label) -> {name: value}` of a dataset, by `scale_of`."""
  if spec.problems:
    return functools.partial(binary, problems=spec.problems)
  functions = (classification, sims, sentiment, regression)
  return {function.__name__: function for function in functions}[scale_of(spec)]


def info(name: str) -> Metric:
  """What is known of a metric.

  Args:
    name: a key of `METRICS`, the F1 of a class ("f1_3"), or one with "_swapped" behind it.

  Returns:
    Its row.

  Raises:
    UsageError: on any other name.
  """
  if name in METRICS:
    return METRICS[name]
  if match := re.fullmatch(r"f1_(\d+)", name):
    return Metric("max", f"F1 of class {match[1]}", False, ("classification",))
  if name.startswith("f1") and (of := METRICS.get(name.removesuffix("_swapped"))):
    return of._replace(title=f"{of.title}, swapped", headline=False)
  raise types.UsageError(
    f"unknown metric {name!r}{registry.nearest(name, METRICS)}; there are {', '.join(METRICS)}."
  )


def ordered(names: Iterable[str]) -> list[str]:
  """The names in the order of tables: that of `METRICS`, then all others as they come."""
  names = list(names)
  known = [name for name in METRICS if name in names]
  return known + [name for name in names if name not in METRICS]


def headline(names: Iterable[str], most: int = 4) -> list[str]:
  """The first headline metrics among the names, for figures and the terminal."""
  return [name for name in ordered(names) if name in METRICS and METRICS[name].headline][:most]


def regression(prediction: ArrayLike, label: ArrayLike) -> Metrics:
  """MAE and Pearson's correlation, which mean something on every scale.

  Args:
    prediction, label: [N] or [N, 1].

  Returns:
    "mae" and "corr".
  """
  p, y = _flat(prediction, label)
  return _or_nan(p, _errors(p, y))


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
  return _or_nan(p, found)


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
    binned = [np.digitize(x, np.array(ends, np.float32), right=True) for x in (p, y)]
    found[f"acc{classes}"] = _accuracy(*binned)
    if classes == 2:
      found["f1"] = _weighted_f1(*binned)
      if swapped:
        found["f1_swapped"] = _weighted_f1(*binned[::-1])
  return _or_nan(p, found)


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
  found = {
    "acc": float(hits.sum() / support.sum()),
    "uar": float(np.mean(hits[support > 0] / support[support > 0])),
    "f1": float(f1 @ support / support.sum()),
    **{f"f1_{c}": float(value) for c, value in enumerate(f1)},
  }
  return _or_nan(prediction, found)


def binary(prediction: ArrayLike, label: ArrayLike, problems: Sequence[str]) -> Metrics:
  """Weighted F1 of each binary problem, as MulT and its successors tabulate IEMOCAP.

  Args:
    prediction: [N, 2^K] logits of all answers, see `layers.joint`.
    label: [N] answers by number: bit k is the answer to problem k.
    problems: their K names.

  Returns:
    "acc" and "f1", the means over the problems, and "f1_NAME" of each.

  Raises:
    ValueError: on misshapen arguments, or labels beyond the 2^K answers.
  """
  answers = [part.astype(int) for part in _classes(prediction, label)]
  pairs = [[part >> k & 1 for part in answers] for k in range(len(problems))]
  f1 = [_weighted_f1(p, y) for p, y in pairs]
  found = {"acc": float(np.mean([p == y for p, y in pairs])), "f1": float(np.mean(f1))}
  found |= {f"f1_{name}": value for name, value in zip(problems, f1, strict=True)}
  return _or_nan(prediction, found)


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
  predicted, label = _classes(prediction, label)
  return confusion_matrix(
    label.astype(int), predicted, labels=np.arange(np.asarray(prediction).shape[1])
  )


def _classes(prediction: ArrayLike, label: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """Predicted and true classes [N]."""
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
  return prediction.argmax(1), label.ravel()


def _flat(prediction: ArrayLike, label: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """Both as [N] float32."""
  p, y = np.asarray(prediction, np.float32), np.asarray(label, np.float32)
  if p.size != y.size or not p.size:
    raise ValueError(f"expected N predictions and N labels, got {p.shape} and {y.shape}.")
  return p.ravel(), y.ravel()


def _or_nan(prediction: ArrayLike, found: Metrics) -> Metrics:
  """The metrics, all of them NaN if any prediction is."""
  return dict.fromkeys(found, float("nan")) if np.isnan(prediction).any() else found


def _errors(p: np.ndarray, y: np.ndarray) -> Metrics:
  """MAE and Pearson's correlation; of a constant, the latter is undefined and given as 0."""
  if not np.isfinite(p).all():
    corr = float("nan")
  else:
    constant = np.ptp(p) == 0 or np.ptp(y) == 0
    corr = 0.0 if constant else float(np.corrcoef(p, y)[0, 1])
  return {"mae": float(np.mean(np.abs(p - y))), "corr": corr}


def _accuracy(p: np.ndarray, y: np.ndarray) -> float:
  return float(np.mean(p == y)) if len(y) else float("nan")


def _weighted_f1(p: np.ndarray, y: np.ndarray) -> float:
  if not len(y):
    return float("nan")
  return float(f1_score(y, p, average="weighted", zero_division=0))  # pyright: ignore[reportArgumentType]


_BINNED = ("sentiment", "sims")
_REAL = ("regression", *_BINNED)

# In the order of the tables' columns.
METRICS: dict[str, Metric] = {
  "mae": Metric("min", "MAE", True, _REAL),
  "corr": Metric("max", "Corr", True, _REAL),
  "acc2_non0": Metric("max", "Acc-2 (negative/positive)", True, ("sentiment",)),
  "acc2_has0": Metric("max", "Acc-2 (negative/non-negative)", False, ("sentiment",)),
  "acc7": Metric("max", "Acc-7", True, ("sentiment",)),
  "acc5": Metric("max", "Acc-5", False, _BINNED),
  "acc3": Metric("max", "Acc-3", False, _BINNED),
  "acc2": Metric("max", "Acc-2", True, ("sims",)),
  "acc": Metric("max", "Accuracy", True, ("classification", "binary")),
  "uar": Metric("max", "UAR", True, ("classification",)),
  "f1_non0": Metric("max", "F1 (negative/positive)", False, ("sentiment",)),
  "f1_has0": Metric("max", "F1 (negative/non-negative)", False, ("sentiment",)),
  "f1": Metric("max", "F1", True, ("sims", "classification", "binary")),
  "f1_happy": Metric("max", "F1 (happy or not)", True, ("binary",)),
  "f1_sad": Metric("max", "F1 (sad or not)", True, ("binary",)),
  "f1_angry": Metric("max", "F1 (angry or not)", True, ("binary",)),
  "f1_neutral": Metric("max", "F1 (neutral or not)", True, ("binary",)),
}
