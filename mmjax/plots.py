"""Results -> figures. matplotlib is imported when a figure is drawn, not before."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from mmjax import metrics, types

# Reads well in print and for colour-blind readers (Okabe-Ito).
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")


def title(metric: str) -> str:
  """How a figure writes a metric; what is none, such as a loss, by its own name."""
  try:
    found = metrics.info(metric)
  except types.UsageError:
    return metric
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
      color = COLORS[number % len(COLORS)]
      panel.plot(at, mean, marker="o", markersize=3.5, color=color, label=label)
      panel.fill_between(at, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
    panel.set_xlabel(x_label)
    panel.set_ylabel(title(metric))
    panel.grid(alpha=0.25)
  if lines is not None:
    panels[0].legend(frameon=False)
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
      color = COLORS[number % len(COLORS)]
      axis.loglog(line[x], line[y], marker="o", markersize=3.5, color=color, label=label)
    ticks = sorted(part[x].unique())
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.yaxis.set_major_formatter(ticker.LogFormatter())
    axis.yaxis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(2, 0.5)))
    axis.set_xlabel(title)
    axis.set_ylabel(y)
    axis.grid(alpha=0.25, which="both")
  axes[0].legend(frameon=False)
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
      color = COLORS[number % len(COLORS)]
      panel.scatter(*points.T, s=6, color=color, alpha=0.5, linewidths=0, label=label)
    panel.set_title(title, fontsize=9)
    panel.set_xticks([])
    panel.set_yticks([])
  panels[0].legend(frameon=False, fontsize=8)
  return _save(drawn, path)


def matrices(
  named: Mapping[str, np.ndarray],
  names: Sequence[object],
  path: str | pathlib.Path,
  *,
  columns: int,
) -> pathlib.Path:
  """Draws square matrices of counts, each row as shares of its sum.

  Args:
    named: title -> [C, C] counts.
    names: C names of rows and columns.
    path: where to write the figure; its suffix picks the format.
    columns: panels side by side.

  Returns:
    The path.
  """
  drawn, panels = _figure(len(named), columns=columns, size=(2.6, 2.7))
  for panel, (title, counts) in zip(panels, named.items(), strict=False):
    panel.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), vmin=0, vmax=1, cmap="Blues")
    panel.set_title(title, fontsize=8)
    panel.set_xticks(range(len(names)), names, fontsize=6)
    panel.set_yticks(range(len(names)), names, fontsize=6)
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
  panel.legend(frameon=False)
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
