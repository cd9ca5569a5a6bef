"""Rows of the study -> its tables, as CSV and Markdown."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from mmjax import metrics, plots, tables

ORDER = ("condition", "method", "rival", "n", "delta", "95 % interval", "effect", "p", "p (Holm)")


def comparisons(
  rows: Sequence[dict], pairs: Sequence[tuple[str, str]], metric: str, out: pathlib.Path, name: str
) -> pd.DataFrame:
  """Writes the paired comparisons of all metrics, `NAME.csv`, and of one for readers, `NAME.md`.

  Args:
    rows: long results with "method", "condition", "seed", "mask_seed".
    pairs: (method, rival).
    metric: the one that selects.
    out: the folder.
    name: of the files.

  Returns:
    The table, see `tables.paired`.
  """
  kept = [{k: v for k, v in row.items() if k not in ("kind", "selection", "split")} for row in rows]
  table = tables.paired(kept, pairs, by="method")
  table.to_csv(out / f"{name}.csv", index=False)
  shown: Any = table[table["metric"] == metric]
  interval = [f"{low:+.4f} … {high:+.4f}" for low, high in zip(shown.low, shown.high, strict=True)]
  ends = zip(shown.effect, shown.effect_low, shown.effect_high, strict=True)
  effect = [f"{d:+.2f} ({low:+.2f} … {high:+.2f})" for d, low, high in ends]
  shown = shown.assign(**{"95 % interval": interval, "effect": effect, "p (Holm)": shown.p_holm})
  text = shown[list(ORDER)].to_markdown(
    index=False, floatfmt=("", "", "", "", "+.4f", *[".3g"] * 4)
  )
  better = "lower is better" if metrics.info(metric).better == "min" else "higher is better"
  _write(
    out / f"{name}.md",
    f"{metrics.info(metric).title} ({better}): method minus rival, paired by training seed; effect"
    " is Cohen's d_z; intervals of 95 %.",
    text,
  )
  return table


def means(
  rows: Sequence[dict], metric: str, out: pathlib.Path, name: str, told: str, curve: bool = False
) -> pd.DataFrame:
  """Writes mean ± std over the runs: `NAME.csv` of all metrics, `NAME.md` of one.

  Args:
    rows: long results with "method", "kind", "condition", "seed", "mask_seed".
    metric: the one that selects.
    out: the folder.
    name: of the files.
    told: what stands above the table.
    curve: whether to draw the single rates as `NAME.png`.
  """
  kept = [{k: v for k, v in row.items() if k not in ("selection", "split")} for row in rows]
  table = tables.summarize(kept, ("method", "kind", "condition"))
  table.to_csv(out / f"{name}.csv", index=False)
  matrix = tables.pivot(table, rows="condition", columns="method", metric=metric, digits=4)
  _write(out / f"{name}.md", told, matrix.to_markdown(index=False, disable_numparse=True))
  single: Any = table[~table["condition"].str.contains("-")]
  if curve and len(single):
    path = out / f"{name}.png"
    plots.curves(single, [metric], path, x="condition", x_label="missing rate", lines="method")
  return table


def costs(rows: Sequence[Mapping[str, Any]], out: pathlib.Path, name: str) -> pd.DataFrame:
  """Writes what each line costs, `NAME.csv` and `NAME.md`; no seconds where none were timed."""
  table = pd.DataFrame(rows).dropna(axis="columns", how="all")
  table.to_csv(out / f"{name}.csv", index=False)
  told = (
    "A gradient is one of B rows, the base's batch; a product with the Hessian counts as two, a"
    " loss without a derivative as a third. Seconds: a step of the last phase, timed on this"
    " machine, times all steps."
  )
  _write(out / f"{name}.md", told, table.to_markdown(index=False, floatfmt=".4g"))
  return table


def explanation(rows: Sequence[dict], names: Sequence[str], out: pathlib.Path) -> pd.DataFrame:
  """Writes what `why` measured along training: `why.csv`, `why.md` of some epochs, `why.png`."""
  table = tables.summarize(rows, ("method", "epoch"))
  table.to_csv(out / "why.csv", index=False)
  plots.curves(table, names, out / "why.png", x="epoch", x_label="epoch", lines="method")
  shown: Any = []
  for _, part in table.groupby("method", sort=False):
    shown.append(part.iloc[sorted({0, len(part) // 4, len(part) // 2, len(part) - 1})])
  columns = ["method", "epoch", *names]
  text = pd.concat(shown)[columns].to_markdown(index=False, floatfmt=".3g")
  told = "On the training split after some epochs, means over the runs."
  _write(out / "why.md", told, text)
  return table


def _write(path: pathlib.Path, told: str, text: str) -> None:
  path.write_text(f"{told}\n\n{text}\n", encoding="utf-8")
  print(f"\n{told}\n\n{text}", flush=True)
