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
  show: bool = True,
) -> pd.DataFrame:
  """Writes robustness rows as `robustness.{csv,md,tex,png}` and `robustness_runs.csv`.

  Args:
    rows: from `mmjax.evaluate.robustness`, with further columns if `by` names them.
    out: the output folder.
    by: the columns that tell the table's rows apart.
    lines: the column whose values are the curves' lines.
    show: whether to print the table.

  Returns:
    The summary, mean and standard deviation over seeds.
  """
  out = pathlib.Path(out)
  table = tables.write(out, "robustness", rows, by)
  shown = [name for name in HEADLINE if name in table.columns][:4]
  if show:
    print(headlines(table, by))
  rates = table[(table["kind"] == "rate") & ~table["condition"].str.contains("-")]
  if len(rates):
    if lines == "method" and "missing_rate" in rates:
      rates = rates.assign(method=_lines(rates))
    path = plots.curves(
      rates, shown, out / "robustness.png", x="condition", x_label="missing rate", lines=lines
    )
    print(f"\nCurves: {path}")
  print(f"Tables: {out / 'robustness.md'}, {out / 'robustness.csv'}")
  return table


def headlines(table: pd.DataFrame, by: Sequence[str]) -> str:
  """A summary's first headline metrics, for the terminal."""
  shown = [name for name in HEADLINE if name in table.columns][:4]
  return tables.to_text(table[[*by, "n", *(c for n in shown for c in (n, f"{n}_std"))]])


def epochs(rows: Sequence[dict], out: str | pathlib.Path) -> None:
  """Draws `epochs_valid.png` and `epochs_test.png`: metrics against the epoch, per method.

  Args:
    rows: per run and epoch: "missing_rate", "method", "seed", "split", "epoch", "train_loss"
      and metrics (none on the test split where it was not logged).
    out: the output folder.
  """
  out = pathlib.Path(out)
  for split, part in pd.DataFrame(rows).groupby("split"):
    part = part.drop(columns="split").dropna(axis=1, how="all").dropna()
    shown = ["train_loss", *(name for name in HEADLINE if name in part.columns)][:4]
    if len(shown) == 1 or part.empty:
      continue
    part["method"] = _lines(part)
    table = tables.summarize(part.drop(columns="missing_rate"), ("method", "epoch"))
    path = plots.curves(
      table, shown, out / f"epochs_{split}.png", x="epoch", x_label="epoch", lines="method"
    )
    print(f"Curves over the epochs: {path}")


def _lines(frame: pd.DataFrame) -> pd.Series:
  """What tells the lines of a figure apart: the method, and the missing rate if there are more."""
  if frame["missing_rate"].nunique() == 1:
    return frame["method"]
  return frame["method"] + " " + frame["missing_rate"]


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
    rows: long results with "missing_rate", "method", "seed" and "condition"; those whose
      condition is an interval of test rates are compared.
    out: the output folder.
    paper: the paper's values ("model", "dataset", "input_rate", "test_rate", "method",
      "metric", "value"), shown beside ours where it has them.
    model, dataset: whose.

  Returns:
    The table, see `tables.against`, with the columns "missing_rate", "test_rate" and "paper".
  """
  same = paper[
    paper["model"].map(plain).eq(plain(model)) & paper["dataset"].map(plain).eq(plain(dataset))
  ]
  keys = ["input_rate", "test_rate", "method", "metric"]
  values = same.drop_duplicates(keys).set_index(keys)["value"]
  frame = pd.DataFrame(rows)
  frame = frame[frame["condition"].str.contains("-")]
  found = []
  for (rate, test_rate), part in frame.groupby(["missing_rate", "condition"], sort=False):
    table = tables.against(part, by="method", baseline="ORIG")
    pairs = zip(table["method"], table["metric"], strict=True)
    table["paper"] = [values.get((rate, test_rate, *pair)) for pair in pairs]
    table.insert(0, "missing_rate", rate)
    table.insert(1, "test_rate", test_rate)
    found.append(table)
  table = pd.concat(found, ignore_index=True)
  out = pathlib.Path(out)
  table.to_csv(out / "comparison.csv", index=False)
  pairs = zip(table["mean"], table["std"], strict=True)
  shown = table.assign(**{"mean ± std": [f"{mean:.4f} ± {std:.4f}" for mean, std in pairs]})
  shown = shown[
    ["missing_rate", "test_rate", "metric", "method", "n", "mean ± std", "delta", "p", "paper"]
  ]
  shown = shown.astype({"p": object, "paper": object}).where(shown.notna(), None)
  formats = dict(index=False, floatfmt=".4f", missingval="")
  print(shown.to_markdown(tablefmt="simple", **formats))
  (out / "comparison.md").write_text(shown.to_markdown(**formats) + "\n", encoding="utf-8")
  (out / "comparison.tex").write_text(
    shown.to_markdown(tablefmt="latex_booktabs", **formats) + "\n", encoding="utf-8"
  )
  return table


def plain(name: str) -> str:
  """ "Self-MM", "self_mm" -> "selfmm"."""
  return name.lower().replace("-", "").replace("_", "")
