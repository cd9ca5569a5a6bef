"""Writes results as tables and figures; shared by the binaries."""

import pathlib
from collections.abc import Sequence

import pandas as pd

from mmjax import plots, tables

# Figures show the first four of these that the task has.
HEADLINE = ("mae", "corr", "acc2_non0", "acc7", "acc2", "acc", "uar", "f1")


def robustness(
  rows: Sequence[dict],
  out: str | pathlib.Path,
  *,
  by: Sequence[str] = ("kind", "condition"),
  lines: str | None = None,
) -> pd.DataFrame:
  """Prints and writes robustness rows: `robustness.csv`, `.md`, `_runs.csv` and `.png`.

  Args:
    rows: from `mmjax.evaluate.robustness`, with further columns if `by` names them.
    out: the output folder.
    by: the columns that tell the table's rows apart.
    lines: the column whose values are the curves' lines.

  Returns:
    The summary, mean and standard deviation over seeds.
  """
  out = pathlib.Path(out)
  table = tables.write(out, "robustness", rows, by)
  print(tables.to_text(table))
  rates = table[(table["kind"] == "rate") & ~table["condition"].str.contains("-")]
  if len(rates):
    shown = [name for name in HEADLINE if name in table.columns][:4]
    path = plots.curves(
      rates, shown, out / "robustness.png", x="condition", x_label="missing rate", lines=lines
    )
    print(f"\nCurves: {path}")
  print(f"Tables: {out / 'robustness.md'}, {out / 'robustness.csv'}")
  return table
