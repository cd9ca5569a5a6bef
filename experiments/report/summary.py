"""Who leads, by how much, and how sure that is."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from mmjax import metrics, tables

from . import averages, constant, markup

FEW = 5  # runs, below which a p-value says little


def leaders(rows: Sequence[dict], kinds: Mapping[str, str], shown: Sequence[str]) -> pd.DataFrame:
  """The leader of each metric, averaged over all conditions of a kind, against the next.

  Args:
    rows: long results, constants among them.
    kinds: kind of condition -> its title.
    shown: metrics.

  Returns:
    The columns "data" (kind), "metric", "leader", "mean", "mean_std", "n" (training seeds), "next",
    "lead" (how much better, positive), "p" of Welch's test of the leader against the next and
    "Holm p", corrected for all whom the leader beats; "constant", what the constant reaches.
  """
  own = [row for row in rows if row["selection"] != constant.SELECTION]
  found = []
  for kind in kinds:
    runs: Any = pd.DataFrame(averages.run_averages(own, kind))
    fixed = [r for r in rows if r["selection"] == constant.SELECTION and r["kind"] == kind]
    for metric in (name for name in shown if name in runs):
      means = runs.groupby("model", sort=False)[metric].mean().dropna()
      if means.empty:
        continue
      ranked = means.sort_values(ascending=metrics.info(metric).better == "min", kind="stable")
      first, *others = ranked.index
      against: Any = tables.against(
        runs[["model", "seed", metric]].to_dict("records"), by="model", baseline=first
      ).set_index("model")
      row = {
        "data": kind,
        "metric": metric,
        "leader": first,
        "mean": against.loc[first, "mean"],
        "mean_std": against.loc[first, "std"],
        "n": against.loc[first, "n"],
        "next": others[0] if others else "",
        "lead": abs(against.loc[others[0], "delta"]) if others else float("nan"),
        "p": against.loc[others[0], "p"] if others else float("nan"),
        "Holm p": against.loc[others[0], "p_holm"] if others else float("nan"),
        "constant": fixed[0][metric] if fixed else float("nan"),
      }
      found.append(row)
  return pd.DataFrame(found)


def spoken(title: str) -> str:
  """A title within a sentence."""
  return title[:1].lower() + title[1:]


def sentences(table: pd.DataFrame, kinds: Mapping[str, str]) -> list[str]:
  """In HTML, for each kind of missing data, who leads in its first metric."""
  found = []
  for row in table.drop_duplicates("data").to_dict("records"):
    title = metrics.info(row["metric"]).title
    std = f" ± {markup.number(row['mean_std'])}" if row["n"] > 1 else ""
    value = f"{title} {markup.number(row['mean'])}{std}"
    where = markup.text(spoken(kinds[row["data"]]))
    if not row["next"]:
      found.append(f"<b>{markup.text(row['leader'])}</b> on {where}: {value}.")
      continue
    sure = (
      f"p = {markup.p_value(row['p'])}, {markup.p_value(row['Holm p'])} after Holm's correction"
      if row["p"] == row["p"]
      else "one run each, so no test"
    )
    sure = sure.replace("= <", "< ").replace(", <", ", < ")
    found.append(
      f"<b>{markup.text(row['leader'])}</b> leads on {where}: {value}, better by"
      f" {markup.number(row['lead'])} than <b>{markup.text(row['next'])}</b> ({markup.text(sure)})."
    )
  return found


def cautions(rows: Sequence[dict], kinds: Mapping[str, str], metric: str) -> list[str]:
  """What a reader of the numbers must know."""
  found = []
  own: Any = pd.DataFrame([row for row in rows if row["selection"] != constant.SELECTION])
  if own["selection"].str.contains("test/").any():
    found.append("TEST ORACLE: epochs were picked on the test split. No number is an estimate.")
  runs = own.groupby("model")["seed"].nunique()
  if runs.min() < FEW:
    found.append(
      f"Systems have {runs.min()} training run{'s' if runs.min() > 1 else ''} each at least:"
      f" below {FEW}, p-values and standard deviations say little."
    )
  for name in own["model"][own[metric].isna()].unique():
    found.append(f"{name} has runs that diverged: their metrics are missing.")
  lower = metrics.info(metric).better == "min"
  for kind, title in kinds.items():
    fixed = [r for r in rows if r["selection"] == constant.SELECTION and r["kind"] == kind]
    means = own[own["kind"] == kind].groupby("model", sort=False)[metric].mean()
    if fixed:
      worse = means[means >= fixed[0][metric]] if lower else means[means <= fixed[0][metric]]
      if len(worse):
        found.append(
          f"No better in {metrics.info(metric).title} than the constant answer"
          f" ({fixed[0]['model']}) on {spoken(title)}: {', '.join(worse.index)}."
        )
  return found
