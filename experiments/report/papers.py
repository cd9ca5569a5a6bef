"""The papers' printed values, in one form: what stands beside ours.

A paper's file `paper_NAME.csv` has the columns table, dataset, condition ("rate=0.5", "missing=la",
"rate=average"), method (a system), metric, value, and perhaps a note: what its authors corrected,
and what was printed.
"""

import pathlib
from typing import Any

import pandas as pd

FOLDER = pathlib.Path(__file__).parent
FRACTIONS = ("mae", "corr")  # all other metrics are printed as percentages


def read(name: str, dataset: str) -> pd.DataFrame:
  """A paper's values of one dataset.

  Args:
    name: of its file.
    dataset: the dataset.

  Returns:
    The columns "condition", "method", "metric", "value" (no percentage), "note" ("" without one);
    withdrawn values are NaN.
  """
  table = _of(pd.read_csv(FOLDER / f"paper_{name}.csv", dtype={"table": str}), dataset)
  percent = ~table["metric"].isin(FRACTIONS)
  table["value"] = table["value"].where(~percent, table["value"] / 100)
  note = table["note"].fillna("") if "note" in table else ""
  return table.assign(note=note)[["condition", "method", "metric", "value", "note"]]


def m3s(dataset: str, method: str, rate: str) -> pd.DataFrame:
  """`read` of the M³S paper: the values of one training method and training rate, "0.4-0.6"."""
  table = _of(pd.read_csv(FOLDER / "paper_m3s.csv"), dataset)
  table = table[table["method"].map(plain).eq(plain(method)) & table["input_rate"].eq(rate)]
  found: Any = table[["metric", "value"]]
  return found.assign(
    condition="interval=" + table["test_rate"], method=table["model"], note=""
  ).reset_index(drop=True)


def _of(table: Any, dataset: str) -> Any:
  return table[table["dataset"].map(plain) == plain(dataset)].copy()


def plain(name: str) -> str:
  """ "Self-MM", "self_mm" -> "selfmm"; "M³S" -> "m3s"."""
  return name.lower().replace("-", "").replace("_", "").replace("³", "3")
