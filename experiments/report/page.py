"""The report of a robust evaluation: tables, figures, one self-contained HTML page."""

import base64
import html
import importlib.metadata
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mmjax import plots, tables, types

from .. import workdir
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


def selection_in_words(oracle: bool, rate: str) -> str:
  """How the epoch of each run was picked."""
  if oracle:
    return (
      f"TEST ORACLE: for each metric the epoch that is best on the test split at missing rate"
      f" {rate}, as published. These numbers are too good and no estimate of anything."
    )
  return f"the epoch that is best on the validation split at missing rate {rate}"


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
  rows = [
    {**{k: row[k] for k in averages.KEYS}, **{n: row[n] for n in averages.metric_names(rows)}}
    for row in rows
  ]
  table = rates.write(rows, out, by=("model", "kind", "condition"), lines="model", show=False)

  def add(title, name, found):
    tables.save(found, out / name)
    parts[title] = found

  kinds = {"rate": "Missing rates", "missing": "Missing modalities"}
  kinds = {kind: title for kind, title in kinds.items() if kind in set(table["kind"])}
  for kind, title in kinds.items():
    average = averages.averages(rows, kind)
    print(f"\n{title}, means over all:\n{rates.headlines(average, ['model'])}")
    add(f"{title}: means over all, ± std over training seeds", f"average_{kind}", average)
  if "rate" in kinds:
    figures["Metrics against the missing rate"] = out / "robustness.png"
    if baseline is not None:
      title = f"Differences from {baseline}: means over the missing rates, p of a t-test"
      add(title, "differences", averages.differences(rows, baseline))
  for kind, title in kinds.items():
    add(title, kind, table[table["kind"] == kind].drop(columns="kind"))
  paper: Any = averages.beside_paper(rows, dataset)
  if paper["paper"].notna().any():
    add("Beside the paper's values", "beside_paper", paper[paper["paper"].notna()])
  if any(results.shown.values()):
    add(
      "Laziness: do predictions collapse?",
      "laziness",
      predictions.laziness(results.shown, label, spec),
    )
    name = "Confusion matrices of the first seed (rows: labels)"
    figures[name] = predictions.confusion_figure(results.shown, label, spec, out)
  if any(results.features.values()):
    figures["Representations at several missing rates, two principal components"] = plots.scatter(
      {model: predictions.view(features) for model, features in results.features.items()},
      out / "view.png",
    )
  seconds = [{"model": name, "seconds": value} for name, value in results.seconds.items()]
  add("Seconds of one seed's whole grid, compiled", "seconds", pd.DataFrame(seconds))
  page = _page(parts, figures, protocol, dataset)
  path = out / "report.html"
  path.write_text(page, encoding="utf-8")
  print(f"Report: {path}")
  return path


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
