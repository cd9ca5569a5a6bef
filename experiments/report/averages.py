"""Means over the missing data: areas, differences, the LNLN paper's values beside ours."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mmjax import metrics, tables

from . import methods

PAPER = pathlib.Path(__file__).with_name("paper_lnln.csv")
KEYS = ("model", "kind", "condition", "seed", "mask_seed")


def area(table: pd.DataFrame, metric: str) -> pd.Series:
  """Area under each model's curve over the missing rate, divided by the rates' range.

  Args:
    table: rows with "model", "condition" (the rate) and the metric, means over seeds.
    metric: its column.

  Returns:
    Per model, in the table's order; a mean of the metric by the trapezoidal rule.
  """

  def one(part):
    rates = part["condition"].astype(float).to_numpy()
    order = np.argsort(rates)
    values = part[metric].to_numpy()[order]
    return np.trapezoid(values, rates[order]) / (rates.max() - rates.min())

  areas: Any = table.groupby("model", sort=False)[["condition", metric]].apply(one)
  return areas


def metric_names(rows: Sequence[dict]) -> list[str]:
  """The metrics of long results, in the order of the tables."""
  return metrics.ordered(name for name in rows[0] if name not in KEYS)


def run_averages(rows: Sequence[dict], kind: str = "rate") -> list[dict]:
  """A row per model and training seed: means over all conditions of a kind and all masks."""
  frame: Any = pd.DataFrame(rows)
  frame = frame[frame["kind"] == kind].drop(columns=["kind", "condition", "mask_seed"])
  runs = frame.groupby(["model", "seed"], sort=False).mean(numeric_only=True).reset_index()
  return runs[["model", "seed", *metric_names(rows)]].to_dict("records")


def averages(rows: Sequence[dict], kind: str = "rate") -> pd.DataFrame:
  """Tables 2-8 ("rate"), 11 and 12 ("missing"): means over the conditions, ± std over seeds.

  "area m" is the area under the curve of metric m over the missing rate.
  """
  average = tables.summarize(run_averages(rows, kind), ("model",))
  if kind != "rate":
    return average
  frame: Any = pd.DataFrame([row for row in rows if row["kind"] == "rate"])
  means = frame.groupby(["model", "condition"], sort=False).mean(numeric_only=True).reset_index()
  for metric in (name for name in metrics.METRICS if name in means):
    average[f"area {metric}"] = area(means, metric).reindex(average["model"]).to_numpy()
  return average


def differences(rows: Sequence[dict], baseline: str) -> pd.DataFrame:
  """Ablations: per variant, the means over the missing rates against the baseline's.

  Columns per metric m: m, "Δ m", and "p m" of Welch's two-tailed t-test over the
  training seeds.
  """
  runs = run_averages(rows)
  names = [name for name in metrics.METRICS if name in runs[0]]
  runs = [{key: row[key] for key in ("model", "seed", *names)} for row in runs]
  found = tables.against(runs, by="model", baseline=baseline)
  parts = []
  groups: Any = found.groupby("metric", sort=False)
  for metric, part in groups:
    part = part.set_index("model")[["mean", "delta", "p"]]
    parts.append(part.rename(columns={"mean": metric, "delta": f"Δ {metric}", "p": f"p {metric}"}))
  return pd.concat(parts, axis=1).reset_index()


def beside_paper(rows: Sequence[dict], dataset: str) -> pd.DataFrame:
  """Long table: condition, model, metric, ours, std, and the paper's value where it has one.

  The condition "rate=average" is over all missing rates. The paper's accuracies and F1 are
  percentages; they are divided by 100 here. A metric "…_swapped" has no other value to stand
  beside than the one that the paper may have computed so.
  """
  paper: Any = pd.read_csv(PAPER, dtype={"table": str})
  paper = paper[paper["dataset"].str.lower() == dataset.lower()]
  percent = ~paper["metric"].isin(["mae", "corr"])
  paper["value"] = paper["value"].where(~percent, paper["value"] / 100)
  keys = paper["condition"] + " " + paper["method"].map(methods.plain) + " " + paper["metric"]
  values = dict(zip(keys, paper["value"], strict=True))
  table = tables.summarize(rows, ("kind", "condition", "model")).to_dict("records")
  for row in table:
    row["condition"] = f"{row['kind']}={row['condition']}"
  for kind in sorted({row["kind"] for row in rows}):
    means = tables.summarize(run_averages(rows, kind), ("model",))
    table = means.assign(condition=f"{kind}=average").to_dict("records") + table
  found = []
  for row in table:
    for metric in metric_names(rows):
      key = f"{row['condition']} {methods.plain(row['model'])} {metric.removesuffix('_swapped')}"
      found.append(
        {
          "condition": row["condition"],
          "model": row["model"],
          "metric": metric,
          "ours": row[metric],
          "std": row[f"{metric}_std"],
          "paper": values.get(key),
        }
      )
  return pd.DataFrame(found)
