"""Training methods against a baseline: the M³S paper's comparison."""

import pathlib
from collections.abc import Sequence
from typing import Any

import pandas as pd

from mmjax import tables

from . import papers

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
