"""Metrics against the missing rate and against the epoch: tables and curves."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from mmjax import masking, metrics, plots, tables


def write(
  rows: Sequence[dict],
  out: str | pathlib.Path,
  *,
  by: Sequence[str] = ("kind", "condition"),
  lines: str | None = None,
  show: bool = True,
  first: Sequence[str] = (),
  quantity: str = "missing rate",
) -> pd.DataFrame:
  """Writes robustness rows as `robustness.{csv,md,tex,png}` and `robustness_runs.csv`.

  Args:
    rows: from `mmjax.evaluate.robustness`, with further columns if `by` names them.
    out: the output folder.
    by: the columns that tell the table's rows apart.
    lines: the column whose values are the curves' lines.
    show: whether to print the results: the files hold the long table, the terminal gets the
      missing rates against the lines.
    first: metrics that are shown, if the results have any of them; else the headline ones.
    quantity: what the rate is, see `masking.quantity`.

  Returns:
    The summary, mean and standard deviation over seeds.
  """
  out = pathlib.Path(out)
  table = tables.write(out, "robustness", rows, by)
  shown = [name for name in first if name in table] or metrics.headline(table.columns)
  if show:
    print(headlines(table, by) if lines is None else pivots(table, lines, shown))
  rates: Any = table[(table["kind"] == "rate") & ~table["condition"].str.contains("-")]
  if len(rates):
    if lines == "method" and "missing_rate" in rates:
      rates = rates.assign(method=line_names(rates))
    path = plots.curves(
      rates, shown, out / "robustness.png", x="condition", x_label=quantity, lines=lines
    )
    print(f"\nCurves: {path}")
  print(f"Tables: {out / 'robustness.md'}, {out / 'robustness.csv'}")
  return table


def missing(
  rows: Sequence[dict], out: str | pathlib.Path, masks: Sequence[Mapping[str, Any]]
) -> pd.DataFrame:
  """Says which masks were drawn, and writes what they hid, `missing_data.{csv,md,tex}`.

  Args:
    rows: of `evaluate.count_missing`, sums over the mask seeds, perhaps with further columns.
    out: the output folder.
    masks: the settings of each.

  Returns:
    The table, with the share of the steps that is missing.
  """
  for given in masks:
    given = {k: v for k, v in given.items() if k not in ("rate", "drop")}
    told = masking.describe(**given)
    print(f"Missing: {told}. The rate is {masking.quantity(given['name'])}.")
  table = pd.DataFrame(rows)
  table["missing share"] = table["missing steps"] / table["of steps"].clip(lower=1)
  tables.save(table, pathlib.Path(out) / "missing_data")
  print(f"What exactly was missing: {pathlib.Path(out) / 'missing_data.md'}")
  return table


def headlines(table: Any, by: Sequence[str], first: Sequence[str] = ()) -> str:
  """A summary's first headline metrics, or those of `first`, for the terminal."""
  shown = [name for name in first if name in table] or metrics.headline(table.columns)
  return tables.to_text(table[[*by, "n", *(c for n in shown for c in (n, f"{n}_std"))]])


def pivots(table: pd.DataFrame, lines: str, shown: Sequence[str]) -> str:
  """A summary for the terminal: per headline metric, conditions × `lines`."""
  if "missing_rate" in table:
    table = table.assign(**{lines: line_names(table)})
  parts = []
  for metric in shown:
    matrix = tables.pivot(table, rows=["kind", "condition"], columns=lines, metric=metric)
    text = matrix.to_markdown(index=False, tablefmt="simple", disable_numparse=True)
    parts.append(f"{plots.title(metric)}:\n{text}")
  return "\n\n".join(parts)


def epochs(rows: Sequence[dict], out: str | pathlib.Path) -> dict[str, pd.DataFrame]:
  """Draws `epochs_valid.png` and `epochs_test.png`: metrics against the epoch, per method.

  Args:
    rows: per run and epoch: "missing_rate", "method", "seed", "split", "epoch", "train_loss"
      and metrics (none on the test split where it was not logged).
    out: the output folder.

  Returns:
    What was drawn, by split: a summary by "method" and "epoch".
  """
  out, found = pathlib.Path(out), {}
  groups: Any = pd.DataFrame(rows).groupby("split")
  for split, part in sorted(groups, reverse=True):  # validation first
    part = part.drop(columns="split").dropna(axis=1, how="all").dropna()
    shown = epoch_metrics(part)
    if len(shown) == 1 or part.empty:
      continue
    part["method"] = line_names(part)
    table = tables.summarize(part.drop(columns="missing_rate"), ("method", "epoch"))
    path = plots.curves(
      table, shown, out / f"epochs_{split}.png", x="epoch", x_label="epoch", lines="method"
    )
    print(f"Curves over the epochs: {path}")
    found[split] = table
  return found


def epoch_metrics(table: pd.DataFrame) -> list[str]:
  """What curves over the epochs show."""
  return ["train_loss", *metrics.headline(table.columns)][:4]


def line_names(frame: Any) -> Any:
  """What tells the lines of a figure apart: the method, and the missing rate if there are more."""
  if frame["missing_rate"].nunique() == 1:
    return frame["method"]
  return frame["method"] + " " + frame["missing_rate"]
