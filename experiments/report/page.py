"""The report of a robust evaluation: tables, figures, one self-contained HTML page."""

import base64
import html
import importlib.metadata
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mmjax import metrics, plots, tables, types

from .. import protocols, workdir
from . import averages, predictions, rates


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


def selection_in_words(oracle: bool, condition: str) -> str:
  """How the epoch of each run was picked, under missing data such as "missing rate 0.5"."""
  if oracle:
    return (
      f"TEST ORACLE: for each metric the epoch that is best on the test split at {condition}, as"
      " published. These numbers are too good and no estimate of anything."
    )
  return f"the epoch that is best on the validation split at {condition}"


def write(
  results: Results,
  label: np.ndarray,
  spec: types.Spec,
  out: pathlib.Path,
  words: Mapping[str, str],
  *,
  dataset: str,
  protocol: protocols.Protocol,
  paper: pd.DataFrame | None = None,
  missing: Sequence[dict] = (),
  quantity: str = "missing rate",
  view: str = "pca",
  baseline: str | None = None,
) -> pathlib.Path:
  """Writes all tables and figures, and `report.html` with all of them in it.

  Args:
    results: what the variants gave.
    label: [N] the test labels.
    spec: of the dataset.
    out: the output folder.
    words: what was done, by heading.
    dataset: its name.
    protocol: how it was done.
    paper: its values, see `papers.read`.
    missing: what was missing in the tests, see `evaluate.count_missing`.
    quantity: what the missing rate is, see `masking.quantity`.
    view: one of `predictions.VIEWS`.
    baseline: the model that the others are compared with, if any.

  Returns:
    The page's path.
  """
  rows, parts, figures = results.rows, {}, {}
  rows = [
    {**{k: row[k] for k in averages.KEYS}, **{n: row[n] for n in averages.metric_names(rows)}}
    for row in rows
  ]
  by, first = ("model", "split", "selection", "kind", "condition"), protocol.metrics
  table = rates.write(rows, out, by=by, lines="model", show=False, first=first, quantity=quantity)
  stated = {row["model"]: (row["split"], row["selection"]) for row in rows}

  def add(title, name, found):
    """Every row of a model's says its split and what selected the epoch."""
    if "model" in found and "split" not in found:
      told = [stated.get(model, ("", "")) for model in found["model"]]
      if "values" in found:  # a paper's are not ours to tell
        told = [("", "") if v == "paper" else t for v, t in zip(found["values"], told, strict=True)]
      found = found.assign(
        split=[split for split, _ in told], selection=[selection for _, selection in told]
      )
    tables.save(found, out / name)
    parts[title] = found

  kinds = {
    "rate": f"Missing rates ({quantity})",
    "interval": "Intervals of missing rates",
    "missing": "Missing modalities",
  }
  kinds = {kind: title for kind, title in kinds.items() if kind in set(table["kind"])}
  for metric in (name for name in protocol.metrics if name in table and protocol.layout):
    found = averages.as_printed(rows, paper, protocol.layout, metric)
    add(f"{metrics.info(metric).title}, by what is left", f"table_{metric}", found)
  for kind, title in kinds.items():
    average = averages.averages(rows, kind)
    print(f"\n{title}, means over all:\n{rates.headlines(average, ['model'], first)}")
    add(f"{title}: means over all, ± std over training seeds", f"average_{kind}", average)
  if "rate" in kinds:
    figures[f"Metrics against the missing rate ({quantity})"] = out / "robustness.png"
  for kind, title in kinds.items():
    if baseline is None:
      break
    title = f"Differences from {baseline}, means over all, p of a t-test. {title}"
    name = "differences" if kind == "rate" else f"differences_{kind}"
    add(title, name, averages.differences(rows, baseline, kind))
  for kind, title in kinds.items():
    found: Any = table[table["kind"] == kind].drop(columns="kind")
    told = "missing" if kind == "missing" else quantity  # what a number in this column is
    add(title, kind, found.rename(columns={"condition": told}))
  if paper is not None:
    beside: Any = averages.beside_paper(rows, paper)
    beside = beside[beside["paper"].notna() | (beside["note"] != "")]
    if len(beside):
      add("Beside the paper's values", "beside_paper", beside)
  if missing:
    parts["What was missing in the tests, exactly"] = rates.missing(missing, out, [])
  if any(results.shown.values()):
    add(
      "Laziness: do predictions collapse?",
      "laziness",
      predictions.laziness(results.shown, label, spec),
    )
    name = "Confusion matrices of the first seed (rows: labels)"
    figures[name] = predictions.confusion_figure(results.shown, label, spec, out)
  if any(results.features.values()):
    title = f"Representations at several missing rates, {predictions.TITLES[view]}"
    figures[title] = plots.scatter(
      {model: predictions.view(features, view) for model, features in results.features.items()},
      out / "view.png",
    )
  seconds = [{"model": name, "seconds": value} for name, value in results.seconds.items()]
  add("Seconds of one seed's whole grid, compiled", "seconds", pd.DataFrame(seconds))
  page = _page(parts, figures, words, dataset)
  path = out / "report.html"
  path.write_text(page, encoding="utf-8")
  print(f"Report: {path}")
  return path


def _page(parts, figures, words, dataset) -> str:
  versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in workdir.LIBRARIES)
  told = {**words, "versions": versions}
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
