"""Training methods against a baseline: the M³S paper's comparison, and its page."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mmjax import metrics, plots, tables, types

from . import (
  averages,
  charts,
  constant,
  document,
  flips,
  markup,
  papers,
  predictions,
  rates,
  sections,
)

PAPER = pathlib.Path(__file__).with_name("paper_m3s.csv")


def comparison(
  rows: Sequence[dict],
  out: str | pathlib.Path,
  paper: pd.DataFrame,
  *,
  conditions: Sequence[str],
  model: str,
  dataset: str,
  baseline: str = "ORIG",
) -> pd.DataFrame:
  """Prints and writes methods against a baseline: `comparison.csv`, `.md` and `.tex`.

  Args:
    rows: long results with "missing_rate", "method", "split", "selection", "seed" and "condition".
    out: the output folder.
    paper: the paper's values ("model", "dataset", "input_rate", "test_rate", "method",
      "metric", "value"), shown beside ours where it has them.
    conditions: names of the test rates at which the methods are compared.
    model, dataset: whose.
    baseline: the method that the others are compared with.

  Returns:
    The table, see `tables.against`, with the columns "missing_rate", "test_rate" and "paper".
  """
  same: Any = paper[
    paper["model"].map(papers.plain).eq(papers.plain(model))
    & paper["dataset"].map(papers.plain).eq(papers.plain(dataset))
  ]
  keys = ["input_rate", "test_rate", "method", "metric"]
  values = same.drop_duplicates(keys).set_index(keys)["value"]
  frame: Any = pd.DataFrame(rows)
  frame = frame[frame["condition"].isin(conditions)]
  told = frame.drop_duplicates("method").set_index("method")
  found = []
  for (rate, test_rate), part in frame.groupby(["missing_rate", "condition"], sort=False):
    table = tables.against(part, by="method", baseline=baseline)
    pairs = zip(table["method"], table["metric"], strict=True)
    table["paper"] = [values.get((rate, test_rate, *pair)) for pair in pairs]
    table.insert(0, "missing_rate", rate)
    table.insert(1, "test_rate", test_rate)
    for column in ("split", "selection"):
      table[column] = told[column].reindex(table["method"]).to_numpy()
    found.append(table)
  table = pd.concat(found, ignore_index=True)
  out = pathlib.Path(out)
  table.to_csv(out / "comparison.csv", index=False)
  pairs = zip(table["mean"], table["std"], strict=True)
  shown: Any = table.assign(**{"mean ± std": [f"{mean:.4f} ± {std:.4f}" for mean, std in pairs]})
  numbers = ["n", "mean ± std", "delta", "p", "p_holm", "paper"]
  shown = shown[["missing_rate", "test_rate", "metric", "method", *numbers, "split", "selection"]]
  shown = shown.astype(dict.fromkeys(("p", "p_holm", "paper"), object)).where(shown.notna(), None)
  formats = dict(index=False, floatfmt=".4f", missingval="")
  print(shown.to_markdown(tablefmt="simple", **formats))
  (out / "comparison.md").write_text(shown.to_markdown(**formats) + "\n", encoding="utf-8")
  (out / "comparison.tex").write_text(
    shown.to_markdown(tablefmt="latex_booktabs", **formats) + "\n", encoding="utf-8"
  )
  return table


def write_page(
  rows: Sequence[dict],
  compared: pd.DataFrame,
  tested: flips.Predictions,
  label: np.ndarray,
  spec: types.Spec,
  ids: Sequence[str],
  out: str | pathlib.Path,
  words: Mapping[str, str],
  *,
  title: str,
  conditions: Sequence[str],
  epochs: Mapping[str, pd.DataFrame],
  missing: pd.DataFrame,
  quantity: str,
) -> pathlib.Path:
  """Writes `report.html`, see `page.write`, of training methods.

  Args:
    rows: long results as in `comparison`, with "kind".
    compared: of `comparison`.
    tested: method -> (kind, condition) -> predictions [N, ...] of the first seed and mask.
    label: [N] the test labels.
    spec: of the dataset.
    ids: N names of the test utterances.
    out: the output folder.
    words: what was done, by heading.
    title: of the page.
    conditions: names of the test rates at which the methods are compared.
    epochs: of `rates.epochs`.
    missing: of `rates.missing`.
    quantity: what the missing rate is, see `masking.quantity`.

  Returns:
    The page's path.
  """
  frame: Any = pd.DataFrame(rows)
  frame = frame.assign(model=rates.line_names(frame))
  asked = frame[frame["condition"].isin(conditions)].assign(kind="interval")
  frame = pd.concat([asked, frame[~frame["condition"].str.contains("-")]], ignore_index=True)
  names = [name for name in metrics.names(spec) if name in frame]
  frame = frame[[*averages.KEYS, *names]]
  long = frame.to_dict("records")
  table = tables.summarize(long, ("model", "split", "selection", "kind", "condition"))
  kinds = {"interval": f"Test rates {', '.join(conditions)}", "rate": "Missing rates"}
  kinds = {kind: told for kind, told in kinds.items() if kind in set(table["kind"])}
  shown = metrics.headline(names)
  parts = [sections.make_summary(long, kinds, shown, words), _compared(compared, shown)]
  for kind, told in kinds.items():
    average = averages.averages(long, kind)
    parts.append(sections.make_kind(table, long, kind, told, shown, quantity, average))
  if epochs:
    parts.append(_epochs(epochs))
  flipped = flips.table(tested, label, spec)
  parts.append(sections.make_flips(tested, flipped, ids, label, spec))
  rated = {m: {c: v for (k, c), v in by.items() if "-" not in c} for m, by in tested.items()}
  drawn = {m: {c: by[c] for c in list(by)[:: max(1, len(by) // 2)]} for m, by in rated.items()}
  if any(drawn.values()):
    classes, found = predictions.confusions(drawn, label, spec)
    lazy = predictions.laziness(drawn, label, spec)
    parts.append(sections.make_predictions(classes, found, lazy))
  parts.append(sections.make_missing(missing))
  path = document.write(pathlib.Path(out) / "report.html", title, words, parts, names)
  print(f"Report: {path}")
  return path


def _compared(table: pd.DataFrame, shown: Sequence[str]) -> document.Section:
  """The comparison, one metric at a time."""
  cases, every = [], metrics.ordered(dict.fromkeys(table["metric"]))
  every = [*shown, *(name for name in every if name not in shown)]
  fixed = list(table["method"][table["selection"] == constant.SELECTION])
  for name in every:
    part: Any = table[table["metric"] == name]
    part = pd.DataFrame(
      {
        "model": part["method"],
        "trained at": part["missing_rate"],
        "tested at": part["test_rate"],
        "n": part["n"],
        name: part["mean"],
        f"{name}_std": part["std"],
        f"Δ {name}": part["delta"],
        "p": part["p"],
        "Holm p": part["p_holm"],
        "paper": part["paper"].astype(float),
      }
    ).dropna(axis=1, how="all")
    caption = f"{charts.heading(name)}: ± over training seeds; Δ and p against the baseline"
    body = markup.table(
      part,
      caption,
      within=["trained at", "tested at"],
      beside=fixed,
      titles={"model": "method", f"Δ {name}": "Δ"},
    )
    cases.append(markup.case("compared-metric", name, body, name == every[0]))
  titles = {name: metrics.info(name).title for name in every}
  picks = markup.choice("Metric", "compared-metric", titles)
  return document.Section("comparison", "Methods against the baseline", picks + "".join(cases))


def _epochs(found: Mapping[str, pd.DataFrame]) -> document.Section:
  """Curves over the epochs."""
  names = list(next(iter(found.values()))["method"].drop_duplicates())
  body = markup.legend(names)
  for split, table in found.items():
    table = table.rename(columns={"method": "model"})
    drawn = "".join(
      markup.figure(
        charts.curves(table, name, names, x="epoch", x_label="epoch"),
        f"Line chart: {plots.title(name)} on the {split} split against the epoch.",
      )
      for name in rates.epoch_metrics(table)
    )
    word = {"valid": "Validation"}.get(split, split.capitalize())
    body += f'<h3>{word} split</h3><div class="figures">{drawn}</div>'
  return document.Section("epochs", "Over the epochs", body)
