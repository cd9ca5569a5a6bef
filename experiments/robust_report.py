"""The report of a robust evaluation: tables, figures, one self-contained HTML page."""

import base64
import html
import importlib.metadata
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import sklearn.metrics
from sklearn import decomposition

from experiments import report, workdir
from mmjax import plots, tables, types

PAPER = pathlib.Path(__file__).with_name("paper_lnln.csv")
# The order of the papers' columns; further metrics, as the F1 of a class, follow.
METRICS = (
  "acc7",
  "acc5",
  "acc3",
  "acc2_non0",
  "acc2_has0",
  "acc2",
  "f1_non0",
  "f1_has0",
  "f1",
  "mae",
  "corr",
  "acc",
  "uar",
)
AREAS = ("mae", "corr", "acc7", "acc5", "acc3", "acc2_non0", "acc2", "acc", "uar", "f1")
KEYS = ("model", "kind", "condition", "seed", "mask_seed")


class Results(NamedTuple):
  """What the variants gave.

  Attributes:
    rows: per variant, condition, seed and mask seed: the metrics.
    shown: variant -> rate -> predictions [N, ...] of the first seed.
    features: variant -> rate -> representations [N, D] of the first seed.
    seconds: variant -> seconds of one whole grid, compiled.
  """

  rows: list[dict]
  shown: dict[str, dict[str, np.ndarray]]
  features: dict[str, dict[str, np.ndarray]]
  seconds: dict[str, float]


def selection_in_words(selection: str, rate: str) -> str:
  """How the epoch of each run was picked."""
  if selection == "test_oracle":
    return (
      f"TEST ORACLE: for each metric the epoch that is best on the test split at missing rate"
      f" {rate}, as published. These numbers are too good and no estimate of anything."
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


def metric_names(rows: Sequence[dict]) -> list[str]:
  """The metrics of long results, in the order of the tables."""
  names = [name for name in rows[0] if name not in KEYS]
  known = [name for name in METRICS if name in names]
  return known + [name for name in names if name not in METRICS]


def run_averages(rows: Sequence[dict], kind: str = "rate") -> list[dict]:
  """A row per model and training seed: means over all conditions of a kind and all masks."""
  frame = pd.DataFrame(rows)
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
  frame = pd.DataFrame([row for row in rows if row["kind"] == "rate"])
  means = frame.groupby(["model", "condition"], sort=False).mean(numeric_only=True).reset_index()
  for metric in (name for name in AREAS if name in means):
    average[f"area {metric}"] = area(means, metric).reindex(average["model"]).to_numpy()
  return average


def differences(rows: Sequence[dict], baseline: str) -> pd.DataFrame:
  """Ablations: per variant, the means over the missing rates against the baseline's.

  Columns per headline metric m: m, "Δ m", and "p m" of Welch's two-tailed t-test over the
  training seeds.
  """
  runs = run_averages(rows)
  names = [name for name in AREAS if name in runs[0]]
  runs = [{key: row[key] for key in ("model", "seed", *names)} for row in runs]
  found = tables.against(runs, by="model", baseline=baseline)
  parts = []
  for metric, part in found.groupby("metric", sort=False):
    part = part.set_index("model")[["mean", "delta", "p"]]
    parts.append(part.rename(columns={"mean": metric, "delta": f"Δ {metric}", "p": f"p {metric}"}))
  return pd.concat(parts, axis=1).reset_index()


def beside_paper(rows: Sequence[dict], dataset: str) -> pd.DataFrame:
  """Long table: condition, model, metric, ours, std, and the paper's value where it has one.

  The condition "rate=average" is over all missing rates. The paper's accuracies and F1 are
  percentages; they are divided by 100 here. A metric "…_swapped" has no other value to stand
  beside than the one that the paper may have computed so.
  """
  paper = pd.read_csv(PAPER, dtype={"table": str})
  paper = paper[paper["dataset"].str.lower() == dataset.lower()]
  percent = ~paper["metric"].isin(["mae", "corr"])
  paper["value"] = paper["value"].where(~percent, paper["value"] / 100)
  keys = paper["condition"] + " " + paper["method"].map(report.plain) + " " + paper["metric"]
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
      key = f"{row['condition']} {report.plain(row['model'])} {metric.removesuffix('_swapped')}"
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
      "model": model,
      "condition": condition,
      "largest share": share.max(),
      "entropy": -(share * np.log(share)).sum(),
    }

  found = [row("labels", "", label)]
  for model, predictions in shown.items():
    found += [row(model, condition, values) for condition, values in predictions.items()]
  return pd.DataFrame(found)


def write(
  results: Results,
  label: np.ndarray,
  spec: types.Spec,
  out: pathlib.Path,
  protocol: Mapping[str, str],
  *,
  dataset: str,
  baseline: str | None = None,
) -> pathlib.Path:
  """Writes all tables and figures, and `report.html` with all of them in it.

  Args:
    results: what the variants gave.
    label: [N] the test labels.
    spec: of the dataset.
    out: the output folder.
    protocol: what was done, in words, by heading.
    dataset: its name.
    baseline: the model that the others are compared with, if any.

  Returns:
    The page's path.
  """
  rows, parts, figures = results.rows, {}, {}
  rows = [{**{k: row[k] for k in KEYS}, **{n: row[n] for n in metric_names(rows)}} for row in rows]
  table = report.robustness(rows, out, by=("model", "kind", "condition"), lines="model", show=False)

  def add(title, name, found):
    tables.save(found, out / name)
    parts[title] = found

  kinds = {"rate": "Missing rates", "missing": "Missing modalities"}
  kinds = {kind: title for kind, title in kinds.items() if kind in set(table["kind"])}
  for kind, title in kinds.items():
    average = averages(rows, kind)
    print(f"\n{title}, means over all:\n{report.headlines(average, ['model'])}")
    add(f"{title}: means over all, ± std over training seeds", f"average_{kind}", average)
  if "rate" in kinds:
    figures["Metrics against the missing rate"] = out / "robustness.png"
    if baseline is not None:
      title = f"Differences from {baseline}: means over the missing rates, p of a t-test"
      add(title, "differences", differences(rows, baseline))
  for kind, title in kinds.items():
    add(title, kind, table[table["kind"] == kind].drop(columns="kind"))
  paper = beside_paper(rows, dataset)
  if paper["paper"].notna().any():
    add("Beside the paper's values", "beside_paper", paper[paper["paper"].notna()])
  if any(results.shown.values()):
    add("Laziness: do predictions collapse?", "laziness", laziness(results.shown, label, spec))
    name = "Confusion matrices of the first seed (rows: labels)"
    figures[name] = confusion_figure(results.shown, label, spec, out)
  if any(results.features.values()):
    figures["Representations at several missing rates, two principal components"] = plots.scatter(
      {model: view(features) for model, features in results.features.items()}, out / "view.png"
    )
  seconds = [{"model": name, "seconds": value} for name, value in results.seconds.items()]
  add("Seconds of one seed's whole grid, compiled", "seconds", pd.DataFrame(seconds))
  page = _page(parts, figures, protocol, dataset)
  path = out / "report.html"
  path.write_text(page, encoding="utf-8")
  print(f"Report: {path}")
  return path


def view(features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Fig. 8: {condition: [N, D]} -> {condition: [N, 2]}, principal components of the first one."""
  first = next(iter(features.values()))
  components = decomposition.PCA(min(2, *first.shape)).fit(first)
  flat = {f"rate {name}": components.transform(values) for name, values in features.items()}
  return {name: np.pad(p, ((0, 0), (0, 2 - p.shape[1]))) for name, p in flat.items()}


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
    text = tables.readable(table).to_html(index=False)
    body.append(f"<h2>{html.escape(title)}</h2>{text}")
  style = (
    "body{font:15px sans-serif;max-width:1200px;margin:2em auto}table{border-collapse:collapse;"
    "font-size:13px;display:block;overflow-x:auto}td,th{padding:2px 8px;text-align:right;"
    "border-bottom:1px solid #ddd}dt{font-weight:bold}img{max-width:100%}"
  )
  return (
    f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Robustness</title>'
    f"<style>{style}</style><body>{''.join(body)}</body></html>\n"
  )
