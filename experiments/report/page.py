"""The report of a study: tables and figures in files, and one HTML page with all of it."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mmjax import metrics, plots, tables, types

from .. import protocols
from . import averages, document, flips, predictions, rates, sections


class Results(NamedTuple):
  """What the variants gave.

  Attributes:
    rows: per variant, condition, seed and mask seed: the metrics.
    tested: variant -> (kind, condition) -> predictions [N, ...] of the first seed and mask.
    shown: variant -> rate -> predictions [N, ...] of the first seed.
    features: variant -> rate -> representations [N, D] of the first seed.
    seconds: variant -> seconds of one whole grid, compiled.
  """

  rows: list[dict]
  tested: dict[str, dict[tuple[str, str], np.ndarray]]
  shown: dict[str, dict[str, np.ndarray]]
  features: dict[str, dict[str, np.ndarray]]
  seconds: dict[str, float]


KINDS = {
  "interval": "Intervals of missing rates",
  "rate": "Missing rates",
  "missing": "Missing modalities",
  "complete": "Complete data",
}


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
  ids: Sequence[str],
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
    ids: N names of the test utterances.
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
  rows = [
    {
      **{k: row[k] for k in averages.KEYS},
      **{n: row[n] for n in averages.metric_names(results.rows)},
    }
    for row in results.rows
  ]
  by, first = ("model", "split", "selection", "kind", "condition"), protocol.metrics
  table = rates.write(rows, out, by=by, lines="model", show=False, first=first, quantity=quantity)
  stated = {row["model"]: (row["split"], row["selection"]) for row in rows}

  def save(name, found):
    """Every row of a model's says its split and what selected the epoch."""
    if "model" in found and "split" not in found:
      told = [stated.get(model, ("", "")) for model in found["model"]]
      if "values" in found:  # a paper's are not ours to tell
        told = [("", "") if v == "paper" else t for v, t in zip(found["values"], told, strict=True)]
      found = found.assign(
        split=[split for split, _ in told], selection=[selection for _, selection in told]
      )
    tables.save(found, out / name)

  kinds = {kind: title for kind, title in KINDS.items() if kind in set(table["kind"])}
  shown = [name for name in first if name in table] or metrics.headline(table.columns)
  parts = [sections.make_summary(rows, kinds, shown, words)]
  for kind, title in kinds.items():
    average, against = averages.averages(rows, kind), None
    print(f"\n{title}, means over all:\n{rates.headlines(average, ['model'], first)}")
    save(f"average_{kind}", average)
    if baseline is not None:
      against = averages.differences(rows, baseline, kind)
      save("differences" if kind == "rate" else f"differences_{kind}", against)
    found: Any = table[table["kind"] == kind].drop(columns="kind")
    told = "missing" if kind == "missing" else quantity  # what a number in this column is
    save(kind, found.rename(columns={"condition": told}))
    args = (table, rows, kind, title, shown, quantity, average, against, baseline)
    parts.append(sections.make_kind(*args))
  if "missing" in kinds:
    subsets: Any = table[table["kind"] == "missing"]
    label_x = "missing modalities"
    plots.dots(subsets, shown, out / "missing.png", x="condition", x_label=label_x, lines="model")
  for metric in (name for name in protocol.metrics if name in table and protocol.layout):
    save(f"table_{metric}", averages.as_printed(rows, paper, protocol.layout, metric))
  if paper is not None:
    beside: Any = averages.beside_paper(rows, paper)
    beside = beside[beside["paper"].notna() | (beside["note"] != "")]
    if len(beside):
      save("beside_paper", beside)
      parts.append(sections.make_paper(rows, paper, protocol.layout, beside))
  if any(results.tested.values()):
    flipped = flips.table(results.tested, label, spec)
    save("flips", flipped)
    parts.append(sections.make_flips(results.tested, flipped, ids, label, spec))
  if any(results.shown.values()):
    lazy = predictions.laziness(results.shown, label, spec)
    save("laziness", lazy)
    names, found = predictions.confusions(results.shown, label, spec)
    predictions.confusion_figure(names, found, out)
    parts.append(sections.make_predictions(names, found, lazy))
  if any(results.features.values()):
    points = {model: predictions.view(one, view) for model, one in results.features.items()}
    plots.scatter(points, out / "view.png")
    parts.append(sections.make_view(points, ids, label, spec, predictions.TITLES[view]))
  if missing:
    parts.append(sections.make_missing(rates.missing(missing, out, [])))
  if results.seconds:
    seconds = pd.DataFrame(results.seconds.items(), columns=["model", "seconds"])
    save("seconds", seconds)
    parts.append(sections.make_seconds(seconds))
  title = f"Robust evaluation on {dataset}"
  path = document.write(out / "report.html", title, words, parts, averages.metric_names(rows))
  print(f"Report: {path}")
  return path
