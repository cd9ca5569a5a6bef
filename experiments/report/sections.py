"""Sections of the report, from rows of results."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mmjax import metrics, types

from . import (
  averages,
  charts,
  constant,
  flips,
  markup,
  papers,
  predictions,
  summary,
)
from .document import Section


def _constants(rows: Sequence[dict]) -> list[str]:
  """The models that need no input: they compete with none."""
  return list(dict.fromkeys(r["model"] for r in rows if r["selection"] == constant.SELECTION))


def _lines(rows: Sequence[dict]) -> list[str]:
  """The models in the order of the figures' looks."""
  return list(dict.fromkeys(row["model"] for row in rows))


def _provenance(rows: Sequence[dict]) -> str:
  """What every number stands for: the split, and what selected the epochs."""
  told: dict[tuple[str, str], list[str]] = {}
  for row in rows:
    if row["selection"] != constant.SELECTION:
      told.setdefault((row["split"], row["selection"]), []).append(row["model"])
  if len(told) == 1:
    ((split, how),) = told
    return f"{split.capitalize()} split; epochs selected by {how}."
  named = ((", ".join(dict.fromkeys(models)), *key) for key, models in told.items())
  return " ".join(f"{m}: {split} split, epochs selected by {how}." for m, split, how in named)


def make_summary(
  rows: Sequence[dict], kinds: Mapping[str, str], shown: Sequence[str], words: Mapping[str, str]
) -> Section:
  """Protocol, who leads, by how much, how sure that is, and what to beware of.

  Args:
    rows: long results with the columns `averages.KEYS`.
    kinds: kind of condition -> title.
    shown: metrics.
    words: what was done, by heading; "protocol" stands here.

  Returns:
    The section.
  """
  found = summary.leaders(rows, kinds, shown)
  leaders = "".join(f"<li>{text}</li>" for text in summary.sentences(found, kinds))
  warned = "".join(f"<li>{markup.text(w)}</li>" for w in summary.cautions(rows, kinds, shown[0]))
  told = found.assign(
    data=[kinds[kind] for kind in found["data"]],
    metric=[charts.heading(name) for name in found["metric"]],
  )
  titles = {
    "data": "mean over",
    "mean": "value",
    "next": "next best",
    "lead": "better by",
    "constant": "constant answer",
  }
  caption = (
    "Leaders by metric. Means over all conditions and test masks, ± over training seeds; p of the"
    f" leader against the next. {markup.text(_provenance(rows))}"
  )
  return Section(
    "summary",
    "Summary",
    f'<p>{markup.text(words.get("protocol", ""))}</p><ul class="leaders">{leaders}</ul>'
    + (f'<ul class="cautions">{warned}</ul>' if warned else "")
    + markup.table(told, caption, titles=titles),
  )


def make_kind(
  table: pd.DataFrame,
  rows: Sequence[dict],
  kind: str,
  title: str,
  shown: Sequence[str],
  quantity: str,
  average: pd.DataFrame,
  differences: pd.DataFrame | None = None,
  baseline: str | None = None,
) -> Section:
  """One kind of missing data: figures, means, differences from a baseline, every condition.

  Args:
    table: a summary of the rows by "model", "kind", "condition".
    rows: long results.
    kind: which.
    title: its title.
    shown: metrics that are drawn.
    quantity: what a missing rate is.
    average: of `averages.averages`.
    differences: of `averages.differences`, from `baseline`; or None.
    baseline: whose.

  Returns:
    The section.
  """
  part: Any = table[table["kind"] == kind]
  numbers = ~part["condition"].str.contains("-") & (kind != "missing")
  every, names, beside = part["condition"].unique(), _lines(rows), _constants(rows)
  word = summary.spoken(title)
  figures = []
  for name in shown if len(every) > 1 else ():
    if kind == "missing":
      drawn = charts.dots(part, name, names, x="condition", x_label="missing modalities")
    elif numbers.sum() > len(names):
      drawn = charts.curves(part[numbers], name, names, x="condition", x_label=quantity)
    else:
      continue
    told = f"{metrics.info(name).title} of {len(names)} systems, {word}; the numbers are below."
    figures.append(markup.figure(drawn, told))
  body = ""
  if figures:
    body = f'{markup.legend(names)}<div class="figures">{"".join(figures)}</div>'
  own = [c for c in average if c in ("model", "n") or not str(c).startswith("area ")]
  own = [c for c in own if "_swapped" not in c]
  caption = f"Means over all conditions ({markup.text(word)}), ± over training seeds"
  body += markup.table(average[own], caption, beside=beside)
  if differences is not None:
    columns = [c for name in shown for c in differences if c.split(" ")[-1] == name]
    caption = f"Differences from {markup.text(str(baseline))} in these means; p over training seeds"
    body += markup.table(differences[["model", *columns]], caption, beside=beside)
  if len(every) > 1:
    body += _conditions(part, kind, word, shown, beside)
  return Section(kind, title, body)


def _conditions(part, kind, word, shown, beside) -> str:
  """For each metric, models × conditions, of which the reader picks one."""
  names = [n for n in metrics.ordered(part.columns) if f"{n}_std" in part and part[n].notna().any()]
  names = [*shown, *(n for n in names if n not in shown)]
  cases = []
  for name in names:
    found: dict[str, dict] = {}
    for row in part.to_dict("records"):
      line = found.setdefault(row["model"], {"model": row["model"], "n": row["n"]})
      line |= {row["condition"]: row[name], f"{row['condition']}_std": row[f"{name}_std"]}
    better = dict.fromkeys(part["condition"].unique(), metrics.info(name).better)
    caption = f"{charts.heading(name)}, {markup.text(word)}, ± over trainings and test masks"
    body = markup.table(pd.DataFrame(found.values()), caption, better=better, beside=beside)
    cases.append(markup.case(f"{kind}-metric", name, body, name == names[0]))
  titles = {name: metrics.info(name).title for name in names}
  return markup.choice("Each condition by", f"{kind}-metric", titles) + "".join(cases)


def make_paper(
  rows: Sequence[dict],
  paper: Any,
  layout: Sequence[tuple[str, str, str]],
  beside: pd.DataFrame,
) -> Section:
  """Our values with the paper's below them, one metric at a time.

  Args:
    rows: long results.
    paper: of `papers.read`.
    layout: columns as the paper prints them; without, all conditions that both have.
    beside: of `averages.beside_paper`, for its notes.

  Returns:
    The section.
  """
  if not layout:
    keys = dict.fromkeys((row["kind"], row["condition"]) for row in rows)
    kinds = dict.fromkeys(kind for kind, _ in keys)
    keys = [*((kind, "average") for kind in kinds), *keys]
    printed = set(paper["condition"])
    layout = [(_column(*key), *key) for key in keys if "=".join(key) in printed]
    # of further systems those whose values are printed by condition, and not a mean alone
    counts = paper.groupby("method")["condition"].nunique()
    known = {papers.plain(row["model"]) for row in rows}
    kept = [name for name in counts.index if counts[name] > 1 or papers.plain(name) in known]
    paper = paper[paper["method"].isin(kept)]
  names = [n for n in averages.metric_names(rows) if n in set(paper["metric"])]
  cases = []
  for name in names:
    table = averages.as_printed(rows, paper, layout, name)
    better = {title: metrics.info(name).better for title, *_ in layout}
    caption = f"{charts.heading(name)}: ours, ± over training seeds, and as printed"
    body = markup.table(table, caption, better=better, beside=_constants(rows))
    cases.append(markup.case("paper-metric", name, body, name == names[0]))
  noted: Any = beside[beside["note"] != ""]
  notes = "".join(
    f"<li>{markup.text('{model}, {condition}, {metric}: {note}'.format(**row))}</li>"
    for row in noted.to_dict("records")
  )
  if notes:
    notes = f"<details><summary>Corrected or withdrawn</summary><ul>{notes}</ul></details>"
  titles = {name: metrics.info(name).title for name in names}
  picks = markup.choice("Metric", "paper-metric", titles)
  return Section("paper", "Beside the paper's values", picks + "".join(cases) + notes)


def _column(kind: str, condition: str) -> str:
  """A condition as the title of a column among other kinds."""
  if condition == "average":
    return f"mean of {'rates' if kind == 'rate' else 'missing' if kind == 'missing' else kind}"
  return {"missing": f"no {condition}", "complete": "complete"}.get(kind, condition)


def make_flips(
  found: flips.Predictions,
  table: pd.DataFrame,
  ids: Sequence[str],
  label: np.ndarray,
  spec: types.Spec,
) -> Section:
  """Which utterances' answers flip: shares by condition, and each utterance.

  Args:
    found: predictions.
    table: of `flips.table`.
    ids: N names of utterances.
    label: [N].
    spec: of the dataset.

  Returns:
    The section.
  """
  conditions = list(next(iter(found.values())))
  kind, condition = conditions[0]
  first, lines = f"rate {condition}" if kind == "rate" else _column(kind, condition), []
  for model, own in table.groupby("model", sort=False):
    flipped = zip(own["kind"], own["condition"], own["flipped"], strict=True)
    lines.append({"model": model, **{_column(k, c): share for k, c, share in list(flipped)[1:]}})
  caption = (
    f"Share of the {len(ids)} test utterances whose answer is not that at {markup.text(first)}."
    " First training seed and test mask. A system that always says the same never flips."
  )
  told = flips.drilldown(found, ids, label, spec)
  kept = len(told["ids"])
  rest = (
    f" Of {len(ids)} utterances, the {kept} that flip most are here." if kept < len(ids) else ""
  )
  which = {
    "flip": "whose answer flips",
    "lost": "right, then wrong",
    "won": "wrong, then right",
    "all": "all",
  }
  controls = (
    markup.choice("System", "flips-model", list(found)),
    markup.choice("Utterances", "flips-which", which),
    '<label class="choice">Find <input type="search" placeholder="part of an id"></label>',
  )
  body = (
    f'{markup.table(pd.DataFrame(lines), caption)}<div class="flips"><div class="controls">'
    f'{"".join(controls)}</div><p class="key"><span class="right">right</span>'
    f' <span class="wrong">wrong</span> <span class="flip">flipped</span> against'
    f" {markup.text(first)}; cells say what is predicted.{rest}</p>"
    '<div class="wide" role="region" tabindex="0" aria-label="utterances"><table class="sorts">'
    '<thead></thead><tbody></tbody></table></div><p class="more" aria-live="polite"></p>'
    f"{markup.data(told | {'heads': [_column(*one) for one in conditions]})}</div>"
  )
  return Section("flips", "Which answers flip", body)


def make_predictions(
  names: Sequence[str], found: Mapping[str, Mapping[str, np.ndarray]], laziness: pd.DataFrame
) -> Section:
  """Confusion matrices of one system at a time (`predictions.confusions`), and collapse."""
  cases = []
  for number, (model, one) in enumerate(found.items()):
    drawn = "".join(markup.confusion(counts, names, f"rate {c}") for c, counts in one.items())
    drawn = f'<div class="matrices">{drawn}</div>'
    cases.append(markup.case("confusion", model, drawn, not number))
  picks = markup.choice("Confusion matrices of", "confusion", list(found))
  lines: dict[str, dict] = {}
  for row in laziness.to_dict("records"):
    at = f" at {row['condition']}" if row["condition"] else ""
    line = lines.setdefault(row["model"], {"model": row["model"]})
    line |= {f"{name}{at}": row[name] for name in ("largest share", "entropy")}
  own = [line for model, line in lines.items() if model != "labels"]
  told = lines["labels"]
  caption = (
    f"Laziness: do predictions collapse? Of the labels, the largest share is"
    f" {markup.number(told['largest share'])} and the entropy {markup.number(told['entropy'])}."
  )
  lazy = markup.table(pd.DataFrame(own), caption)
  return Section("predictions", "What is predicted", picks + "".join(cases) + lazy)


def make_view(
  points: Mapping[str, Mapping[str, np.ndarray]],
  ids: Sequence[str],
  label: np.ndarray,
  spec: types.Spec,
  how: str,
) -> Section:
  """Representations in a plane, of one system at a time.

  Args:
    points: model -> {condition: [N, 2]}.
    ids: N names of utterances.
    label: [N].
    spec: of the dataset.
    how: the points came about.

  Returns:
    The section.
  """
  names = predictions.class_names(spec) if spec.num_classes else []
  told = [names[value] if names else f"{value:.2f}" for value in np.asarray(label).ravel()]
  alt = f"Scatter plot of one system's representations at several missing rates: {how}."
  few = f", {charts.drawn(points)} of {len(ids)} utterances"
  few = few if charts.drawn(points) < len(ids) else ""
  drawn = markup.figure(charts.clouds(points, ids, told), alt, f"First training seed{few}")
  title = f"Representations, {how}"
  return Section("view", title, markup.choice("System", "chosen", list(points)) + drawn)


def make_missing(table: pd.DataFrame) -> Section:
  """What the tests hid, counted."""
  caption = "Sums over all utterances and test masks"
  told = markup.table(table, caption)
  body = f"<details><summary>Steps, modalities and samples by condition</summary>{told}</details>"
  return Section("missing-data", "What was missing in the tests, exactly", body)


def make_seconds(seconds: pd.DataFrame) -> Section:
  """How long a system's tests took."""
  caption = "Seconds of one seed's whole grid, compiled"
  body = markup.table(seconds, caption, better={"seconds": "min"})
  return Section("seconds", "What the tests took", body)
