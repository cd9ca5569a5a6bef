"""Results -> figures. matplotlib is imported when a figure is drawn, not before."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from mmjax import metrics, types

# Reads well in print, on dark ground, and for colour-blind readers (Okabe-Ito; grey for black).
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F")
# Eight, which shares no factor with seven colours; as matplotlib and as Vega call them.
MARKERS = {
  "o": "circle",
  "s": "square",
  "^": "triangle-up",
  "D": "diamond",
  "v": "triangle-down",
  "P": "cross",
  "<": "triangle-left",
  ">": "triangle-right",
}
DASHES = ((), (5, 2), (1.5, 1.5), (6, 1.5, 1.5, 1.5))
BANDS = 4  # lines, above which bands of deviations would hide each other


class Style(NamedTuple):
  """How one of many lines is drawn: `shape` is what Vega calls the marker."""

  color: str
  marker: str
  shape: str
  dash: tuple[float, ...]


def style(number: int) -> Style:
  """The look of a figure's line by its number: no two of the first 28 share two of three parts."""
  marker, shape = list(MARKERS.items())[number % len(MARKERS)]
  dash = DASHES[number // len(COLORS) % len(DASHES)]
  return Style(COLORS[number % len(COLORS)], marker, shape, dash)


def title(metric: str) -> str:
  """How a figure writes a metric; a name that is of none as it is."""
  try:
    found = metrics.info(metric)
  except types.UsageError:
    return metric.replace("_", " ")
  return f"{found.title} (lower is better)" if found.better == "min" else found.title


def _figure(count: int, *, columns: int | None = None, size: tuple[float, float] = (4.6, 3.6)):
  """A figure with `count` panels in rows of `columns`; those left over are empty."""
  from matplotlib import figure  # the object interface: no display, no global state

  columns = min(columns or count, count)
  rows = -(-count // columns)
  drawn = figure.Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
  panels = drawn.subplots(rows, columns, squeeze=False).ravel()
  for panel in panels[count:]:
    panel.axis("off")
  return drawn, panels


def _legend(drawn, panel) -> None:
  """What tells a panel's lines apart, below all panels: it covers no data."""
  handles, labels = panel.get_legend_handles_labels()
  if not labels:
    return
  width = 0.55 + 0.085 * max(len(label) for label in labels)  # inches
  columns = max(1, min(len(labels), int(drawn.get_figwidth() / width)))
  drawn.set_figheight(drawn.get_figheight() + 0.1 + 0.19 * -(-len(labels) // columns))
  where = dict(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
  drawn.legend(handles, labels, handlelength=3, **where)


def _save(drawn, path: str | pathlib.Path) -> pathlib.Path:
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  drawn.savefig(path, dpi=150)
  return path


def curves(
  table: pd.DataFrame,
  metrics: Sequence[str],
  path: str | pathlib.Path,
  *,
  x: str,
  x_label: str,
  lines: str | None = None,
) -> pathlib.Path:
  """Draws one panel per metric: a line with a ± std band for each value of `lines`.

  Args:
    table: a summary (`tables.summarize`) with the columns `x`, `lines` and the metrics.
    metrics: names of the metrics, one panel each.
    path: where to write the figure; its suffix picks the format.
    x: the column on the horizontal axis.
    x_label: its title.
    lines: the column whose values tell the lines apart (None: a single line).

  Returns:
    The path.
  """
  drawn, panels = _figure(len(metrics))
  groups = [(None, table)] if lines is None else list(table.groupby(lines, sort=False))
  for panel, metric in zip(panels, metrics, strict=True):
    for number, (label, part) in enumerate(groups):
      at, mean, std = part[x].astype(float), part[metric], part[f"{metric}_std"]
      look = style(number)
      _line(panel.plot, at, mean, look, label)
      if len(groups) <= BANDS:
        panel.fill_between(at, mean - std, mean + std, color=look.color, alpha=0.15, linewidth=0)
    panel.set_xlabel(x_label)
    panel.set_ylabel(title(metric))
    panel.grid(alpha=0.25)
  _legend(drawn, panels[0])
  return _save(drawn, path)


def _line(plot, x, y, look: Style, label) -> None:
  drawn = plot(x, y, marker=look.marker, markersize=3.5, lw=1.3, color=look.color, label=label)
  if look.dash:
    drawn[0].set_dashes(look.dash)


def dots(
  table: pd.DataFrame,
  metrics: Sequence[str],
  path: str | pathlib.Path,
  *,
  x: str,
  x_label: str,
  lines: str,
) -> pathlib.Path:
  """Draws one panel per metric: a dot with a ± std bar for each category and value of `lines`.

  Args:
    table: a summary (`tables.summarize`) with the columns `x`, `lines` and the metrics.
    metrics: names of the metrics, one panel each.
    path: where to write the figure; its suffix picks the format.
    x: the column of categories, which stand in order of appearance.
    x_label: their title.
    lines: the column whose values tell the dots of a category apart.

  Returns:
    The path.
  """
  drawn, panels = _figure(len(metrics), columns=2)
  categories = list(table[x].drop_duplicates())
  groups = list(table.groupby(lines, sort=False))
  for panel, metric in zip(panels, metrics, strict=False):
    for number, (label, part) in enumerate(groups):
      look, shift = style(number), 0.8 * ((number + 0.5) / len(groups) - 0.5)
      at = np.array([categories.index(value) for value in part[x]]) + shift
      bars = dict(fmt=look.marker, markersize=3.5, color=look.color, elinewidth=0.8, label=label)
      panel.errorbar(at, part[metric], part[f"{metric}_std"], **bars)
    panel.set_xticks(range(len(categories)), categories)
    panel.set_xticks(np.arange(len(categories) - 1) + 0.5, minor=True)
    panel.tick_params(axis="x", length=0, which="both")
    panel.grid(alpha=0.25, axis="y")
    panel.grid(alpha=0.4, axis="x", which="minor")
    panel.set_xlabel(x_label)
    panel.set_ylabel(title(metric))
  _legend(drawn, panels[0])
  return _save(drawn, path)


def lines(
  table: pd.DataFrame, y: str, path: str | pathlib.Path, *, panels: str, x: str, lines: str
) -> pathlib.Path:
  """Draws `y` against `x` on logarithmic axes: a panel for each value of a column.

  Args:
    table: the columns.
    y: the column on the vertical axis.
    path: where to write the figure; its suffix picks the format.
    panels: the column whose values tell the panels apart, and are their horizontal titles.
    x: the column on the horizontal axis.
    lines: the column whose values tell the lines apart.

  Returns:
    The path.
  """
  from matplotlib import ticker

  groups = list(table.groupby(panels, sort=False))
  drawn, axes = _figure(len(groups))
  for axis, (title, part) in zip(axes, groups, strict=True):
    for number, (label, line) in enumerate(part.groupby(lines, sort=False)):
      _line(axis.loglog, line[x], line[y], style(number), label)
    ticks = sorted(part[x].unique())
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.yaxis.set_major_formatter(ticker.LogFormatter())
    axis.yaxis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(2, 0.5)))
    axis.set_xlabel(title)
    axis.set_ylabel(y)
    axis.grid(alpha=0.25, which="both")
  _legend(drawn, axes[0])
  return _save(drawn, path)


def scatter(
  named: Mapping[str, Mapping[str, np.ndarray]], path: str | pathlib.Path
) -> pathlib.Path:
  """Draws clouds of points, one panel per name.

  Args:
    named: title -> {label: [N, 2]}.
    path: where to write the figure; its suffix picks the format.

  Returns:
    The path.
  """
  drawn, panels = _figure(len(named), columns=3)
  for panel, (title, clouds) in zip(panels, named.items(), strict=False):
    for number, (label, points) in enumerate(clouds.items()):
      look = dict(color=style(number).color, marker=style(number).marker)
      panel.scatter(*points.T, s=8, alpha=0.5, linewidths=0, label=label, **look)
    panel.set_title(title, fontsize=9)
    panel.set_xticks([])
    panel.set_yticks([])
  _legend(drawn, panels[0])
  return _save(drawn, path)


def matrices(
  named: Mapping[str, np.ndarray],
  names: Sequence[object],
  path: str | pathlib.Path,
  *,
  columns: int,
  y_label: str = "label",
  x_label: str = "predicted",
) -> pathlib.Path:
  """Draws square matrices of counts, coloured by their shares of the row's sum.

  Args:
    named: title -> [C, C] counts.
    names: C names of rows and columns.
    path: where to write the figure; its suffix picks the format.
    columns: panels side by side.
    y_label, x_label: what rows and columns are.

  Returns:
    The path.
  """
  side = 1.1 + 0.26 * max(5, len(names))
  drawn, panels = _figure(len(named), columns=columns, size=(side, side + 0.1))
  turned = 90 if max(len(str(name)) for name in names) > 4 else 0
  for panel, (title, counts) in zip(panels, named.items(), strict=False):
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    panel.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    for (row, column), count in np.ndenumerate(counts):
      color = "white" if shares[row, column] > 0.55 else "#333333" if count else "#aaaaaa"
      panel.text(column, row, count, ha="center", va="center", fontsize=6, color=color)
    panel.set_title(title, fontsize=8)
    panel.set_xticks(range(len(names)), names, fontsize=6, rotation=turned)
    panel.set_yticks(range(len(names)), names, fontsize=6)
    panel.set_xlabel(x_label, fontsize=7)
    panel.set_ylabel(y_label, fontsize=7)
  return _save(drawn, path)


def search_history(
  values: Mapping[int, float], path: str | pathlib.Path, label: str, better: str
) -> pathlib.Path:
  """Draws what each trial of a search reached, and the best so far.

  Args:
    values: number of a trial -> its value.
    path: where to write the figure; its suffix picks the format.
    label: what the values are.
    better: "min" or "max".

  Returns:
    The path.
  """
  drawn, (panel,) = _figure(1, size=(5.6, 3.6))
  numbers = sorted(values)
  found = [values[n] for n in numbers]
  best = {"min": np.minimum, "max": np.maximum}[better].accumulate(found)
  panel.scatter(numbers, found, s=14, color=COLORS[0], label="trial")
  panel.step(numbers, best, where="post", color=COLORS[1], label="best so far")
  panel.set_xlabel("trial")
  panel.set_ylabel(label)
  panel.grid(alpha=0.25)
  _legend(drawn, panel)
  return _save(drawn, path)


def importance(shares: Mapping[str, float], path: str | pathlib.Path) -> pathlib.Path:
  """Draws how much of a search's differences each setting explains.

  Args:
    shares: setting -> share of the variance.
    path: where to write the figure; its suffix picks the format.

  Returns:
    The path.
  """
  drawn, (panel,) = _figure(1, size=(5.6, 1.2 + 0.3 * len(shares)))
  names = sorted(shares, key=lambda name: shares[name])
  panel.barh(names, [shares[name] for name in names], color=COLORS[0])
  panel.set_xlabel("share of the differences between trials")
  panel.grid(alpha=0.25, axis="x")
  return _save(drawn, path)
