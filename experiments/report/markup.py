"""Pieces of the page: tables to sort, figures, the legend, choices."""

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mmjax import metrics, plots, types

from . import charts, glossary

SIGNIFICANT = 0.05
TITLES = {"model": "system"}
# Paths within ±6 of the centre, by what `plots.MARKERS` call the shapes.
_PATHS = {
  "circle": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0Z",
  "square": "M-4.5-4.5h9v9h-9Z",
  "triangle-up": "M0-5.5l5.5 10h-11Z",
  "diamond": "M0-6l5 6-5 6-5-6Z",
  "triangle-down": "M0 5.5l5.5-10h-11Z",
  "cross": "M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4Z",
  "triangle-left": "M-5.5 0l10-5.5v11Z",
  "triangle-right": "M5.5 0l-10-5.5v11Z",
}

text = html.escape


def _narrow(title: str) -> str:
  """A title that may break behind a slash."""
  return text(title).replace("/", "/<wbr>")


def heading(column: str) -> tuple[str, str, str]:
  """A column's title in HTML, which direction is better ("min", "max", ""), and what it means."""
  prefix, _, name = column.rpartition(" ")
  try:
    found = metrics.info(name)
  except types.UsageError:
    return _narrow(TITLES.get(column, column)), "", glossary.TERMS.get(column, "")
  if prefix.endswith("p"):  # a p-value has no better
    return _narrow(f"{prefix} {found.title}"), "", glossary.TERMS["p"]
  word = {"min": "lower", "max": "higher"}[found.better]
  arrow = f'<span class="way" role="img" aria-label="{word} is better">{charts.arrow(name)}</span>'
  return (
    f"{_narrow(f'{prefix} {found.title}'.strip())}&nbsp;{arrow}",
    found.better,
    glossary.metric(name),
  )


def number(value: Any, digits: int = 3) -> str:
  """A number as tables write it."""
  if value is None or value != value:
    return ""
  if isinstance(value, int | np.integer) or (isinstance(value, float) and abs(value) >= 1e4):
    return f"{value:,.0f}"
  return f"{value:.{digits}f}".replace("-", "−")


def p_value(value: float) -> str:
  """A p-value: "<0.001", "0.02", "0.4"."""
  if value != value:
    return ""
  return "<0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def table(
  frame: Any,
  caption: str,
  *,
  better: Mapping[str, str] | None = None,
  within: Sequence[str] = (),
  beside: Iterable[str] = (),
  titles: Mapping[str, str] | None = None,
) -> str:
  """A table that sorts by any column; the best value of each is marked.

  Args:
    frame: as `tables.readable` takes it: "x_std" goes into the cells of "x", "n" says of how many.
    caption: what it is, in HTML.
    better: column -> "min" or "max" where the column's name does not tell.
    within: columns whose rows are compared with each other alone.
    beside: models that do not compete, such as the constant answer.
    titles: of columns, in HTML.

  Returns:
    HTML.
  """
  names = [name for name in frame if not (name.endswith("_std") and name[:-4] in frame)]
  beside = list(beside)
  own: Any = frame[~frame["model"].isin(beside)] if "model" in frame else frame
  names = [name for name in names if name != "n" or own["n"].nunique() > 1]
  told = {name: heading(str(name)) for name in names}
  ways = {name: (better or {}).get(name, told[name][1]) for name in names}
  marked = {name: _best(frame, name, way, within, beside) for name, way in ways.items() if way}
  head = []
  for name in names:
    title, _, meaning = told[name]
    title = (titles or {}).get(name, title)
    way = f' data-way="{ways[name]}"' if ways[name] else ""
    left = "" if frame[name].dtype.kind in "fiu" else ' class="left"'
    hint = f' title="{text(meaning)}"' if meaning else ""
    head.append(f'<th scope="col"{left}{way}><button type="button"{hint}>{title}</button></th>')
  body = []
  for position, row in enumerate(frame.to_dict("records")):
    cells = (_cell(row, name, position in marked.get(name, ())) for name in names)
    wrapped = (
      f'<th scope="row"{style}>{cell}</th>' if not column else f"<td{style}>{cell}</td>"
      for column, (cell, style) in enumerate(cells)
    )
    body.append(f"<tr>{''.join(wrapped)}</tr>")
  return (
    f'<div class="wide" role="region" tabindex="0" aria-label="table"><table class="sorts">'
    f"<caption>{caption}</caption><thead><tr>{''.join(head)}</tr></thead>"
    f"<tbody>{''.join(body)}</tbody></table></div>"
  )


def _cell(row: Mapping[str, Any], name: str, best: bool) -> tuple[str, str]:
  """A cell's content and attributes."""
  value = row[name]
  if isinstance(value, str):
    return text(value), ' class="left"'
  if re.search(r"(^|Holm )p( |$)", name):
    return p_value(value), ' class="sure"' if value < SIGNIFICANT else ""
  found, std = number(value), row.get(f"{name}_std")
  if found and std is not None and std == std and row.get("n", 2) > 1:
    found += f" <small>± {number(std)}</small>"
  return (f"<strong>{found}</strong>", ' class="best"') if best else (found, "")


def _best(frame, name, way, within, beside) -> set[int]:
  """Positions of the rows that have a column's best value, as far as it is printed."""
  competing = frame[name].notna()
  if "model" in frame:
    competing &= ~frame["model"].isin(beside)
  if "values" in frame:  # a paper's stand beside ours
    competing &= frame["values"].ne("paper")
  values = frame[name].astype(float).round(3)[competing]
  groups = [frame[key] for key in within] or [pd.Series(0, frame.index)]
  parts = values.groupby([group[competing] for group in groups], sort=False)
  best = (values == parts.transform(way)) & (parts.transform("nunique") > 1)
  return {frame.index.get_loc(label) for label in values.index[best]}


def figure(spec: Mapping[str, Any], alt: str, caption: str = "") -> str:
  """A figure of `charts`, which the page's script draws."""
  shown = f"<figcaption>{caption}</figcaption>" if caption else ""
  place = f'<div class="chart" role="img" aria-label="{text(alt)}"></div>'
  return f"<figure>{place}{data(spec)}{shown}</figure>"


def data(value: Any) -> str:
  """JSON that the page's script reads."""
  found = json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
  return f'<script type="application/json">{found}</script>'


def legend(lines: Sequence[str]) -> str:
  """What tells the lines of all figures apart; each can be switched off."""
  items = []
  for i, name in enumerate(lines):
    look = plots.style(i)
    dash = f' stroke-dasharray="{" ".join(f"{d:g}" for d in look.dash)}"' if look.dash else ""
    items.append(
      f'<label><input type="checkbox" checked data-line="{text(name)}">'
      f'<svg viewBox="-17 -7 34 14" width="34" height="14" aria-hidden="true">'
      f'<path d="M-17 0h34" stroke="{look.color}" stroke-width="2" fill="none"{dash}/>'
      f'<path d="{_PATHS[look.shape]}" fill="{look.color}"/></svg>{text(name)}</label>'
    )
  return (
    f'<fieldset class="legend"><legend>Systems in the figures</legend>{"".join(items)}</fieldset>'
  )


def choice(title: str, kind: str, names: Mapping[str, str] | Sequence[str]) -> str:
  """A choice of what the page shows: of `case`s of a kind, or of a figure's "chosen"."""
  named = names if isinstance(names, Mapping) else dict(zip(names, names, strict=True))
  options = "".join(f'<option value="{text(k)}">{text(v)}</option>' for k, v in named.items())
  return (
    f'<label class="choice">{text(title)} <select data-picks="{kind}">{options}</select></label>'
  )


def case(kind: str, name: str, body: str, first: bool) -> str:
  """What a choice shows."""
  hidden = "" if first else " hidden"
  return f'<div data-case="{kind}" data-name="{text(name)}"{hidden}>{body}</div>'


def confusion(counts: np.ndarray, names: Sequence[object], title: str) -> str:
  """A confusion matrix with its numbers, coloured by their shares of the row."""
  shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
  head = "".join(f'<th scope="col">{text(str(name))}</th>' for name in names)
  rows = []
  for name, row, part in zip(names, counts, shares, strict=True):
    cells = "".join(
      f'<td style="--share:{100 * s:.0f}%" title="{100 * s:.0f} % of the label">{n}</td>'
      for n, s in zip(row, part, strict=True)
    )
    rows.append(f'<tr><th scope="row">{text(str(name))}</th>{cells}</tr>')
  return (
    f'<table class="confusion"><caption>{text(title)}</caption><thead><tr><td></td>'
    f'<th colspan="{len(names)}" scope="colgroup">predicted</th></tr>'
    f'<tr><th scope="col">label</th>{head}</tr>'
    f"</thead><tbody>{''.join(rows)}</tbody></table>"
  )
