"""Compares `mmjax.metrics` with recorded values of MMSA's and LNLN's metric functions."""

from collections.abc import Iterator, Mapping

import numpy as np

from mmjax import metrics

# The references' names. "Mult_acc_7" occurs on the scale of MOSI and MOSEI only.
NAMES = {
  "MAE": "mae",
  "Corr": "corr",
  "Has0_acc_2": "acc2_has0",
  "Has0_F1_score": "f1_has0",
  "Non0_acc_2": "acc2_non0",
  "Non0_F1_score": "f1_non0",
  "Mult_acc_2": "acc2",
  "Mult_acc_3": "acc3",
  "Mult_acc_5": "acc5",
  "Mult_acc_7": "acc7",
  "F1_score": "f1",
}


def compare(z: Mapping[str, np.ndarray]) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
  """Yields (group, name, ours, theirs) for all that the file holds.

  Args:
    z: the arrays of a file of the metrics schema: `group/pred`, `group/label` and the values
      `group/<name>`. Those that the reference rounded to 4 decimals meet ours rounded alike.

  Yields:
    One group for each set of predictions.
  """
  for key in z:
    if not key.endswith("/pred"):
      continue
    group = key.removesuffix("/pred")
    scale = metrics.sentiment if f"{group}/Mult_acc_7" in z else metrics.sims
    ours = scale(z[key], z[f"{group}/label"])
    for name, our_name in NAMES.items():
      if f"{group}/{name}" in z:
        theirs = np.nan_to_num(z[f"{group}/{name}"])  # Corr of a constant: theirs NaN, ours 0
        rounded = abs(theirs - np.round(theirs, 4)) < 1e-7
        value = np.round(ours[our_name], 4) if rounded else ours[our_name]
        yield group, name, np.asarray(value), theirs
