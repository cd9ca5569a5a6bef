"""Means over the missing data: areas, differences, a paper's values beside ours."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mmjax import metrics, tables

from . import papers

KEYS = ("model", "split", "selection", "kind", "condition", "seed", "mask_seed")


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


def differences(rows: Sequence[dict], baseline: str, kind: str = "rate") -> pd.DataFrame:
  """Per model, the means over the conditions of a kind against the baseline's.

  Columns per metric m: m, "Δ m", "p m" of Welch's two-tailed t-test over the training seeds, and
  "Holm p m", corrected for the number of models that are compared.
  """
  runs = run_averages(rows, kind)
  names = [name for name in metrics.METRICS if name in runs[0]]
  runs = [{key: row[key] for key in ("model", "seed", *names)} for row in runs]
  found = tables.against(runs, by="model", baseline=baseline)
  parts = []
  groups: Any = found.groupby("metric", sort=False)
  for metric, part in groups:
    part = part.set_index("model")[["mean", "delta", "p", "p_holm"]]
    parts.append(part.set_axis([metric, f"Δ {metric}", f"p {metric}", f"Holm p {metric}"], axis=1))
  return pd.concat(parts, axis=1).reset_index()


def beside_paper(rows: Sequence[dict], paper: pd.DataFrame) -> pd.DataFrame:
  """Long table: condition, model, metric, ours, std, the paper's value where it has one, its note.

  The condition "rate=average" is over all missing rates. A metric "…_swapped" has no other value to
  stand beside than the one that the paper may have computed so.

  Args:
    rows: long results.
    paper: of `papers.read`.

  Returns:
    The table.
  """
  keys = paper["condition"] + " " + paper["method"].map(papers.plain) + " " + paper["metric"]
  values = {key: row for key, row in zip(keys, paper.to_dict("records"), strict=True)}
  found = []
  for row in _with_averages(rows, rows):
    for metric in metric_names(rows):
      key = f"{row['condition']} {papers.plain(row['model'])} {metric.removesuffix('_swapped')}"
      printed = values.get(key, {})
      found.append(
        {
          "condition": row["condition"],
          "model": row["model"],
          "metric": metric,
          "ours": row[metric],
          "std": row[f"{metric}_std"],
          "paper": printed.get("value"),
          "note": printed.get("note", ""),
        }
      )
  return pd.DataFrame(found)


def _with_averages(rows: Sequence[dict], runs: Sequence[dict]) -> list[dict]:
  """Means and deviations by model and condition, "rate=0.5", and of each kind "rate=average".

  The deviations of conditions are those of `runs`, the averages' are over the training seeds.
  """
  table = tables.summarize(runs, ("kind", "condition", "model")).to_dict("records")
  for row in table:
    row["condition"] = f"{row['kind']}={row['condition']}"
  for kind in sorted({row["kind"] for row in rows}):
    means = tables.summarize(run_averages(rows, kind), ("model",))
    table = means.assign(condition=f"{kind}=average").to_dict("records") + table
  return table


def as_printed(
  rows: Sequence[dict],
  paper: pd.DataFrame | None,
  layout: Sequence[tuple[str, str, str]],
  metric: str,
) -> pd.DataFrame:
  """A table as a paper prints it: of each system our values, and below them the paper's.

  Args:
    rows: long results.
    paper: of `papers.read`, whose further systems follow; or None.
    layout: the columns: title, kind of condition, condition.
    metric: whose values.

  Returns:
    The columns "model", "values" ("ours" or "paper"), "n", and for each title its mean and
    "TITLE_std", over the training seeds; empty where there is nothing.
  """
  ours: dict[str, dict] = {}
  keys = ["model", "kind", "condition", "seed"]  # a training counts once, whatever its test masks
  groups: Any = pd.DataFrame(rows).groupby(keys, sort=False)[metric]
  runs = groups.mean().reset_index()
  for row in _with_averages(rows, runs.to_dict("records")):
    ours.setdefault(row["model"], {})[row["condition"]] = row
  printed: dict[str, dict] = {}
  own: Any = pd.DataFrame() if paper is None else paper[paper["metric"] == metric]
  for row in own.to_dict("records"):
    printed.setdefault(row["method"], {})[row["condition"]] = row["value"]
  names = {papers.plain(name): name for name in printed}

  def line(model, values, n, cells):
    found = {"model": model, "values": values, "n": n}
    for title, cell in cells.items():
      found |= {title: cell[0], f"{title}_std": cell[1]}
    return found

  def of_paper(name):
    cells = {t: (printed[name].get(f"{kind}={c}"), None) for t, kind, c in layout}
    return line(name, "paper", 1, cells)

  found = []
  for model, by in ours.items():
    cells = {t: by.get(f"{kind}={c}", {}) for t, kind, c in layout}
    n = max((cell.get("n", 0) for cell in cells.values()), default=0)
    pairs = {t: (cell.get(metric), cell.get(f"{metric}_std")) for t, cell in cells.items()}
    found.append(line(model, "ours", n, pairs))
    if name := names.pop(papers.plain(model), None):
      found.append(of_paper(name))
  found += [of_paper(name) for name in names.values()]
  table = pd.DataFrame(found)
  titles = [title for title, _, _ in layout]
  return table.astype({t: float for t in (*titles, *(f"{t}_std" for t in titles))})
