"""The report of a robust evaluation: tables, figures, one self-contained HTML page."""

import base64
import html
import importlib.metadata
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import sklearn.metrics

from experiments import report, workdir
from mmjax import plots, tables, types

PAPER = pathlib.Path(__file__).with_name("paper_lnln.csv")
METRICS = ("acc7", "acc5", "acc3", "acc2_non0", "acc2_has0", "f1_non0", "f1_has0", "mae", "corr",
           "acc", "uar", "f1")  # fmt: skip


def selection_in_words(selection: str, rate: str) -> str:
  """How the epoch of each run was picked."""
  if selection == "test_oracle":
    return (
      f"TEST ORACLE: the epoch that is best on the test split at missing rate {rate}, as the"
      " published code has it. These numbers are too good and no estimate of anything."
    )
  return f"the epoch that is best on the validation split at missing rate {rate}"


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

  return table.groupby("model", sort=False)[["condition", metric]].apply(one)


def averages(rows: Sequence[dict]) -> pd.DataFrame:
  """Tables 2, 3 and 8: means over all missing rates, ± std over the training seeds."""
  frame = pd.DataFrame(rows)
  frame = frame[frame["kind"] == "rate"].drop(columns=["kind", "condition"])
  runs = frame.groupby(["model", "seed"], sort=False).mean(numeric_only=True).reset_index()
  return tables.summarize(runs.drop(columns="mask_seed"), ("model",))


def beside_paper(rows: Sequence[dict], dataset: str) -> pd.DataFrame:
  """Long table: condition, model, metric, ours, std, and the paper's value where it has one.

  The paper's accuracies and F1 are percentages; they are divided by 100 here.
  """
  paper = pd.read_csv(PAPER, dtype={"table": str})
  paper = paper[paper["dataset"].str.lower() == dataset.lower()]
  percent = ~paper["metric"].isin(["mae", "corr"])
  paper["value"] = paper["value"].where(~percent, paper["value"] / 100)
  keys = paper["condition"] + " " + paper["method"].map(_plain) + " " + paper["metric"]
  values = dict(zip(keys, paper["value"], strict=True))
  table = tables.summarize(rows, ("kind", "condition", "model"))
  found = []
  for row in table.to_dict("records"):
    condition = f"{row['kind']}={row['condition']}"
    for metric in (name for name in METRICS if name in row):
      found.append(
        {
          "condition": condition, "model": row["model"], "metric": metric, "ours": row[metric],
          "std": row[f"{metric}_std"],
          "paper": values.get(f"{condition} {_plain(row['model'])} {metric}"),
        }
      )  # fmt: skip
  return pd.DataFrame(found)


def classes_of(values: np.ndarray, spec: types.Spec) -> np.ndarray:
  """Classes for confusion matrices: [N] rounded labels or predictions, or the arg-max."""
  if spec.num_classes:
    return values.argmax(-1) if values.ndim == 2 else values
  low, high = (round(end) for end in spec.label_range)
  return np.clip(np.round(values), low, high).astype(int)


def laziness(
  shown: Mapping[str, Mapping[str, np.ndarray]], label: np.ndarray, spec: types.Spec
) -> pd.DataFrame:
  """How much predictions collapse: share of the most predicted class, entropy in nats."""

  def row(model, condition, values):
    share = np.unique(classes_of(values, spec), return_counts=True)[1] / len(values)
    return {
      "model": model, "condition": condition, "largest share": share.max(),
      "entropy": -(share * np.log(share)).sum(),
    }  # fmt: skip

  found = [row("labels", "", label)]
  for model, predictions in shown.items():
    found += [row(model, condition, values) for condition, values in predictions.items()]
  return pd.DataFrame(found)


def write(
  rows: Sequence[dict],
  shown: Mapping[str, Mapping[str, np.ndarray]],
  label: np.ndarray,
  spec: types.Spec,
  out: pathlib.Path,
  protocol: Mapping[str, str],
  *,
  dataset: str,
) -> pathlib.Path:
  """Writes all tables and figures, and `report.html` with all of them in it.

  Args:
    rows: per model, condition, seed and mask seed: the metrics.
    shown: per model and missing rate: predictions [N, ...] to look at.
    label: [N] the test labels.
    spec: of the dataset.
    out: the output folder.
    protocol: what was done, in words, by heading.
    dataset: its name.

  Returns:
    The page's path.
  """
  by = ("model", "kind", "condition")
  table = report.robustness(rows, out, by=by, lines="model")
  parts, figures = {}, {}
  rates = table[table["kind"] == "rate"]
  if len(rates):
    average = averages(rows)
    for metric in (name for name in METRICS if name in average):
      average[f"area {metric}"] = area(rates, metric).reindex(average["model"]).to_numpy()
    parts["Means over the missing rates, ± std over training seeds"] = average
    average.to_csv(out / "average.csv", index=False)
    figures["Metrics against the missing rate"] = out / "robustness.png"
  parts["Every condition"] = table
  paper = beside_paper(rows, dataset)
  paper.to_csv(out / "beside_paper.csv", index=False)
  if paper["paper"].notna().any():
    parts["Beside the paper's values"] = paper[paper["paper"].notna()]
  if any(shown.values()):
    lazy = laziness(shown, label, spec)
    lazy.to_csv(out / "laziness.csv", index=False)
    parts["Laziness: do predictions collapse?"] = lazy
    figures["Confusion matrices (rows: labels)"] = confusion_figure(shown, label, spec, out)
  page = _page(parts, figures, protocol, dataset)
  path = out / "report.html"
  path.write_text(page, encoding="utf-8")
  print(f"Report: {path}")
  return path


def confusion_figure(shown, label, spec, out) -> pathlib.Path:
  """`confusion.png`: a row per model, a column per missing rate (Figs. 5-7)."""
  truth = classes_of(label, spec)
  low, high = (round(end) for end in spec.label_range)
  names = list(range(spec.num_classes)) if spec.num_classes else list(range(low, high + 1))
  found = {
    f"{model}, rate {condition}": sklearn.metrics.confusion_matrix(
      truth, classes_of(values, spec), labels=names
    )
    for model, predictions in shown.items()
    for condition, values in predictions.items()
  }
  columns = max(len(predictions) for predictions in shown.values())
  return plots.matrices(found, names, out / "confusion.png", columns=columns)


def _page(parts, figures, protocol, dataset) -> str:
  versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in workdir.LIBRARIES)
  told = {**protocol, "versions": versions}
  body = [f"<h1>Robust evaluation on {html.escape(dataset)}</h1>", "<dl>"]
  body += [f"<dt>{k}</dt><dd>{html.escape(v)}</dd>" for k, v in told.items()]
  body.append("</dl>")
  for title, path in figures.items():
    image = base64.b64encode(path.read_bytes()).decode()
    body.append(f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{image}">')
  for title, table in parts.items():
    text = tables.readable(table) if "n" in table else table
    body.append(f"<h2>{title}</h2>{text.to_html(index=False, float_format='%.3f', na_rep='')}")
  style = (
    "body{font:15px sans-serif;max-width:1200px;margin:2em auto}table{border-collapse:collapse;"
    "font-size:13px;display:block;overflow-x:auto}td,th{padding:2px 8px;text-align:right;"
    "border-bottom:1px solid #ddd}dt{font-weight:bold}img{max-width:100%}"
  )
  return (
    f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Robustness</title>'
    f"<style>{style}</style><body>{''.join(body)}</body></html>\n"
  )


def _plain(name: str) -> str:
  """"Self-MM", "self_mm" -> "selfmm"."""
  return name.lower().replace("-", "").replace("_", "")
