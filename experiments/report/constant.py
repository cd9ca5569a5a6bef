"""The answer that needs no input, which every table shows beside the systems."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax import data, evaluate, metrics, types

SELECTION = "of the training labels"  # what a constant's rows say instead of an epoch's selection


def answer(train: Any, spec: types.Spec) -> tuple[str, np.ndarray]:
  """The best constant of the training labels.

  Args:
    train: the training split, a batch or a source of one.
    spec: of the dataset.

  Returns:
    Its name and itself as a prediction: "median" [] of values; "majority" [C], of classes or of
    each binary problem's answers.
  """
  label = np.asarray(train.label if isinstance(train, types.Batch) else train.read().label)
  if not spec.num_classes:
    return "median", np.median(label)
  if spec.problems:
    yes = (label[:, None] >> np.arange(len(spec.problems)) & 1).mean(0) > 0.5
    likeliest = int(yes @ (1 << np.arange(len(spec.problems))))
  else:
    likeliest = int(np.bincount(label).argmax())
  return "majority", np.eye(spec.num_classes)[likeliest]


def rows(
  dataset: data.Dataset,
  conditions: Sequence[evaluate.Condition],
  *,
  column: str,
  swapped: bool = False,
) -> list[dict[str, Any]]:
  """Long results of the constant on the test split: the same under every condition.

  Args:
    dataset: the data.
    conditions: the test conditions.
    column: what the systems' rows are told apart by, such as "model".
    swapped: see `metrics.compute`.

  Returns:
    A row for each condition.
  """
  name, constant = answer(dataset.train, dataset.spec)
  label = np.asarray(dataset.test.label)
  prediction = np.broadcast_to(constant, (len(label), *constant.shape))
  found = metrics.compute(dataset.spec, prediction, label, swapped=swapped)
  told = {column: name, "split": "test", "selection": SELECTION}
  return [
    {**told, "seed": 0, "kind": one.kind, "condition": one.name, "mask_seed": 0, **found}
    for one in {(one.kind, one.name): one for one in conditions}.values()
  ]
