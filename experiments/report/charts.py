"""Figures that answer to the pointer: Altair -> Vega-Lite, which the page draws as SVG.

Altair, because all of a figure is then SVG: the page's style sheet colours it (light, dark, print),
and screen readers find its description. And because what a browser needs for it is 0.9 MB, against
1.3 MB for Bokeh, which paints on canvases, and 4.8 MB for Plotly. `vl-convert-python` holds these
scripts, so that a page loads nothing.
"""

import functools
import importlib.util
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mmjax import metrics, plots, types

HEIGHT = 250
POINTS = 8000  # of all clouds, so that pages of many systems stay small

Spec = dict[str, Any]


def check() -> None:
  """Raises a UsageError if there is nothing to draw with: before a study trains for hours."""
  if any(importlib.util.find_spec(name) is None for name in ("altair", "vl_convert")):
    raise types.UsageError("the report needs Altair: pip install 'mmjax[report]'.")


@functools.cache
def library() -> str:
  """The scripts that draw: Vega, Vega-Lite and Vega-Embed."""
  import altair as alt
  import vl_convert

  version = alt.SCHEMA_VERSION.removeprefix("v").rpartition(".")[0]
  return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", version)


def curves(table: pd.DataFrame, metric: str, lines: Sequence[str], *, x: str, x_label: str) -> Spec:
  """A metric against numbers: a line for each model, its ± std as a band.

  Args:
    table: a summary with the columns "model", `x`, "n", the metric and its deviation.
    metric: on the vertical axis.
    lines: all models of the page, in the order of their looks (`plots.style`).
    x: the column of the horizontal axis.
    x_label: its title.

  Returns:
    The figure. Its signal "hidden" lists the models that are not drawn.
  """
  import altair as alt

  near = alt.selection_point(fields=["model"], nearest=True, on="pointerover", clear="pointerout")
  axis = alt.Axis(tickMinStep=1) if x == "epoch" else alt.Axis()
  base = _marks(lines).encode(
    x=alt.X("x:Q", title=x_label, scale=alt.Scale(nice=False, padding=10), axis=axis),
    y=_height(metric),
  )
  many = len(set(table["model"])) > plots.BANDS
  shade = alt.when(near, empty=False).then(alt.value(0.18)).otherwise(alt.value(0.0))
  lit = alt.when(near).then(alt.value(1.0)).otherwise(alt.value(0.2))
  layers = (
    base.mark_area().encode(
      y=alt.Y("low:Q"), y2="high:Q", opacity=shade if many else alt.value(0.15)
    ),
    base.mark_line(strokeWidth=1.6).encode(strokeDash=_look(lines, "dash"), opacity=lit),
    base.mark_point(filled=True, size=38)
    .encode(shape=_look(lines, "shape"), opacity=lit, tooltip=_told(x_label, metric))
    .add_params(near),
  )
  table = table.assign(**{x: table[x].astype(float)})
  return _finish(alt.layer(*layers), _values(table, metric, x))


def dots(table: pd.DataFrame, metric: str, lines: Sequence[str], *, x: str, x_label: str) -> Spec:
  """A metric in categories: a dot with a ± std bar for each model; otherwise as `curves`."""
  import altair as alt

  near = alt.selection_point(fields=["model"], on="pointerover", clear="pointerout")
  lit = alt.when(near).then(alt.value(1.0)).otherwise(alt.value(0.2))
  axis = alt.Axis(labelAngle=0, bandPosition=0, grid=True, tickBand="extent")
  base = _marks(lines).encode(
    x=alt.X("x:N", title=x_label, sort=list(table[x].drop_duplicates()), axis=axis),
    xOffset=alt.XOffset("model:N", sort=list(lines)),
    y=_height(metric),
    opacity=lit,
  )
  layers = (
    base.mark_rule().encode(y=alt.Y("low:Q"), y2="high:Q"),
    base.mark_point(filled=True, size=46)
    .encode(shape=_look(lines, "shape"), tooltip=_told(x_label, metric))
    .add_params(near),
  )
  return _finish(alt.layer(*layers), _values(table, metric, x))


def clouds(
  named: Mapping[str, Mapping[str, np.ndarray]], ids: Sequence[str], label: Sequence[str]
) -> Spec:
  """Points in a plane, coloured by condition, of the model that the signal "chosen" names.

  Args:
    named: model -> {condition: [N, 2]}; `drawn` of the N, evenly picked, are drawn.
    ids, label: N names and labels.

  Returns:
    The figure.
  """
  import altair as alt

  rows, conditions = [], list(next(iter(named.values())))
  picked = np.unique(np.linspace(0, len(ids) - 1, drawn(named)).astype(int)).tolist()
  for model, found in named.items():
    every = np.concatenate(list(found.values()))
    low, span = every.min(0), np.maximum(np.ptp(every, 0), 1e-12)
    for number, points in enumerate(found.values()):
      places = np.round(1000 * (points[picked] - low) / span).astype(int).tolist()
      rows += [{"m": model, "c": number, "i": i, "x": x, "y": y} for i, (x, y) in enumerate(places)]
  lookup = f"{json.dumps(conditions)}[datum.c]"
  base = alt.Chart(alt.Data(values=rows)).add_params(alt.param("chosen", value=next(iter(named))))
  chart = (
    base.transform_filter("datum.m == chosen")
    .transform_calculate(condition=lookup, id="samples[datum.i]", label="labels[datum.i]")
    .add_params(
      alt.param("samples", value=[ids[i] for i in picked]),
      alt.param("labels", value=[label[i] for i in picked]),
    )
    .mark_point(filled=True, size=34, opacity=0.65)
    .encode(
      x=alt.X("x:Q", axis=None),
      y=alt.Y("y:Q", axis=None),
      color=alt.Color(
        "condition:N",
        title=None,
        scale=_scale(conditions, "color"),
        legend=alt.Legend(orient="top"),
      ),
      shape=alt.Shape("condition:N", title=None, scale=_scale(conditions, "shape")),
      tooltip=["id:N", "label:N", "condition:N"],
    )
  )
  return _configure(chart.properties(height=360)).to_dict()


def drawn(named: Mapping[str, Mapping[str, np.ndarray]]) -> int:
  """How many points of a cloud are drawn at most."""
  return min(150, POINTS // sum(len(found) for found in named.values()))


def _scale(names: Sequence[str], part: str) -> Any:
  import altair as alt

  looks = [getattr(plots.style(number), part) for number in range(len(names))]
  looks = [list(look) if part == "dash" else look for look in looks]
  return alt.Scale(domain=list(names), range=looks)


def _look(lines: Sequence[str], part: str) -> Any:
  import altair as alt

  channel = {"color": alt.Color, "shape": alt.Shape, "dash": alt.StrokeDash}[part]
  return channel("model:N", scale=_scale(lines, part), legend=None)


def _marks(lines: Sequence[str]) -> Any:
  import altair as alt

  return alt.Chart().encode(color=_look(lines, "color"))


def _height(metric: str) -> Any:
  import altair as alt

  return alt.Y("y:Q", title=heading(metric), scale=alt.Scale(zero=False))


def _told(x_label: str, metric: str) -> list[Any]:
  import altair as alt

  titles = {"model": "system", "x": x_label.partition(",")[0], "told": heading(metric), "n": "runs"}
  # "format", though empty: without it Vega-Lite 6.4 looks for texts in the wrong place if the
  # pointer may be anywhere near
  return [alt.Tooltip(f"{name}:N", title=title, format="") for name, title in titles.items()]


def heading(metric: str) -> str:
  """ "MAE ↓": a metric's title and which direction is better, if it is known."""
  title = plots.title(metric).removesuffix(" (lower is better)")
  return f"{title} {arrow(metric)}".strip()


def arrow(metric: str) -> str:
  """ "↓" where less is better, "↑" where more is, else nothing."""
  if metric == "train_loss":
    return "↓"
  try:
    return {"min": "↓", "max": "↑"}[metrics.info(metric).better]
  except ValueError:  # no metric
    return ""


def _values(table: pd.DataFrame, metric: str, x: str) -> list[dict[str, Any]]:
  rows = []
  for row in table.to_dict("records"):
    mean, std = row[metric], row[f"{metric}_std"]
    if mean != mean:
      continue
    told = f"{mean:.3f} ± {std:.3f}" if row["n"] > 1 else f"{mean:.3f}"
    at = {"model": row["model"], "x": row[x], "n": row["n"], "told": told}
    ends = {"y": mean, "low": mean - std, "high": mean + std}
    rows.append({**at, **{name: round(float(value), 5) for name, value in ends.items()}})
  return rows


def _finish(chart: Any, rows: list[dict[str, Any]]) -> Spec:
  import altair as alt

  chart = chart.properties(data=alt.Data(values=rows), height=HEIGHT)
  chart = chart.add_params(alt.param("hidden", value=[]))
  return _configure(chart.transform_filter("indexof(hidden, datum.model) < 0")).to_dict()


def _configure(chart: Any) -> Any:
  """As wide as its place, and without what the page's style sheet decides."""
  import altair as alt

  return (
    chart.properties(
      width="container",
      background="transparent",
      autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
    )
    .configure(font="system-ui, sans-serif")
    .configure_view(stroke=None)
    .configure_axis(titleFontWeight="normal", titleFontSize=12, labelFontSize=11, tickCount=6)
    .configure_legend(labelFontSize=12, symbolSize=70)
  )
