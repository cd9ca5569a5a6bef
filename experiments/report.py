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
  shown = [name for name in HEADLINE if name in table.columns][:4]
  print(tables.to_text(table[[*by, "n", *(c for name in shown for c in (name, f"{name}_std"))]]))
  rates = table[(table["kind"] == "rate") & ~table["condition"].str.contains("-")]
  if len(rates):
    path = plots.curves(
      rates, shown, out / "robustness.png", x="condition", x_label="missing rate", lines=lines
    )
    print(f"\nCurves: {path}")
  print(f"Tables: {out / 'robustness.md'}, {out / 'robustness.csv'}")
  return table


def comparison(
  rows: Sequence[dict],
  out: str | pathlib.Path,
  paper: pd.DataFrame,
  *,
  model: str,
  dataset: str,
) -> pd.DataFrame:
  """Prints and writes methods against ORIG: `comparison.csv`, `.md` and `.tex`.

  Args:
    rows: long results with "method" and "seed".
    out: the output folder.
    paper: the paper's values at the same missing rates ("model", "dataset", "method",
      "metric", "value"), shown beside ours where it has them.
    model, dataset: whose.

  Returns:
    The table, see `tables.against`, with the column "paper".
  """
  table = tables.against(rows, by="method", baseline="ORIG")
  same = paper[
    paper["model"].map(_plain).eq(_plain(model)) & paper["dataset"].map(_plain).eq(_plain(dataset))
  ].drop_duplicates(["method", "metric"])
  values = same.set_index(["method", "metric"])["value"]
  keys = zip(table["method"], table["metric"], strict=True)
  table["paper"] = [values.get(key) for key in keys]
  out = pathlib.Path(out)
  table.to_csv(out / "comparison.csv", index=False)
  pairs = zip(table["mean"], table["std"], strict=True)
  shown = table.assign(**{"mean ± std": [f"{mean:.4f} ± {std:.4f}" for mean, std in pairs]})
  shown = shown[["metric", "method", "n", "mean ± std", "delta", "p", "paper"]]
  formats = dict(index=False, floatfmt=".4f", missingval="")
  print(shown.to_markdown(tablefmt="simple", **formats))
  (out / "comparison.md").write_text(shown.to_markdown(**formats) + "\n", encoding="utf-8")
  (out / "comparison.tex").write_text(
    shown.to_markdown(tablefmt="latex_booktabs", **formats) + "\n", encoding="utf-8"
  )
  return table


def _plain(name: str) -> str:
  """"Self-MM", "self_mm" -> "selfmm"."""
  return name.lower().replace("-", "").replace("_", "")
