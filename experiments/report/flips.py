"""Which utterances' answers flip as data go missing."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mmjax import metrics, types

from . import predictions

# model -> (kind, condition) -> predictions [N, ...] under the first test masks
Predictions = Mapping[str, Mapping[tuple[str, str], np.ndarray]]

CELLS = 60_000  # answers that a page holds: it stays below 3 MB


def answers(values: np.ndarray, spec: types.Spec) -> np.ndarray:
  """[N] which of `names` a prediction, or a label, says: its sign where there is one, its class."""
  scale = metrics.scale_of(spec)
  if scale in ("sentiment", "sims"):
    flat = values.reshape(len(values))
    return (flat >= 0 if scale == "sentiment" else flat > 0).astype(int)
  lowest = 0 if spec.num_classes else round(spec.label_range[0])
  return predictions.classes_of(values, spec) - lowest


def names(spec: types.Spec) -> list[str]:
  """What the answers are called, from the lowest on."""
  scale = metrics.scale_of(spec)
  if scale == "sentiment":
    return ["negative", "not negative"]
  if scale == "sims":
    return ["not positive", "positive"]
  return predictions.class_names(spec)


def table(found: Predictions, label: np.ndarray, spec: types.Spec) -> pd.DataFrame:
  """How many answers flip, against those of the first condition.

  Args:
    found: of every system, under the same conditions.
    label: [N].
    spec: of the dataset.

  Returns:
    The columns "model", "kind", "condition", and shares of the utterances: "flipped", "right to
    wrong", "wrong to right".
  """
  truth, rows = answers(np.asarray(label), spec), []
  for model, by in found.items():
    first = answers(next(iter(by.values())), spec)
    for (kind, condition), values in by.items():
      now = answers(values, spec)
      told = {"model": model, "kind": kind, "condition": condition}
      lost, won = (first == truth) & (now != truth), (first != truth) & (now == truth)
      shares = {"flipped": now != first, "right to wrong": lost, "wrong to right": won}
      rows.append({**told, **{name: float(one.mean()) for name, one in shares.items()}})
  return pd.DataFrame(rows)


def drilldown(
  found: Predictions, ids: Sequence[str], label: np.ndarray, spec: types.Spec
) -> dict[str, Any]:
  """What the page's script lists of each utterance; those that flip most, if there are very many.

  Args:
    found: see `table`.
    ids: N names of utterances.
    label: [N].
    spec: of the dataset.

  Returns:
    "names" of answers; of the utterances that are kept "ids", "truth" (answers), and by model
    "answers", rows [conditions]; where the task has values "labels" and, by model, "values" in
    hundredths.
  """
  conditions = list(next(iter(found.values())))
  own = {
    model: np.stack([answers(by[c], spec) for c in conditions], 1) for model, by in found.items()
  }
  flips = sum((a != a[:, :1]).sum(1) for a in own.values())
  most = max(1, CELLS // (len(conditions) * len(found)))
  kept = np.sort(np.argsort(-flips, kind="stable")[:most])
  told = {
    "names": names(spec),
    "ids": [ids[i] for i in kept],
    "truth": answers(np.asarray(label), spec)[kept].tolist(),
    "answers": {model: a[kept].tolist() for model, a in own.items()},
  }
  if spec.num_classes:
    return told
  values = {
    model: np.stack([np.asarray(by[c]).reshape(len(ids)) for c in conditions], 1)
    for model, by in found.items()
  }
  hundredths = lambda a: np.nan_to_num(np.round(100 * a)).astype(int).tolist()  # noqa: E731
  labels = np.asarray(label).reshape(len(ids))[kept]
  return told | {
    "labels": hundredths(labels),
    "values": {model: hundredths(a[kept]) for model, a in values.items()},
  }
