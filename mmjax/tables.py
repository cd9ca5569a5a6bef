"""Long results (one row per condition and seed) -> mean ± std tables as text, CSV, Markdown."""

import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, stats

SEEDS = ("seed", "mask_seed")  # the columns that a table averages over


def _welch(a, b) -> float:
  """p of Welch's two-tailed t-test; NaN where all runs are alike."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # of runs that are alike, which is no fault
    test: Any = stats.ttest_ind(a, b, equal_var=False)
  return float(test.pvalue)


def holm(p: Sequence[float]) -> list[float]:
  """p-values corrected for their number, after Holm (1979).

  Args:
    p: those of one family of tests; NaN where there was none, which does not count.

  Returns:
    The smallest level at which the step-down procedure rejects each; NaN stays.
  """
  order = sorted((i for i, value in enumerate(p) if value == value), key=lambda i: p[i])
  found, largest = [float("nan")] * len(p), 0.0
  for rank, i in enumerate(order):
    largest = max(largest, min(1.0, (len(order) - rank) * p[i]))
    found[i] = largest
  return found


def summarize(rows: Sequence[dict], by: Sequence[str]) -> pd.DataFrame:
  """Mean and standard deviation of every metric over the seeds.

  Args:
    rows: long results; every column that is neither in `by` nor a seed is a metric.
    by: the columns that tell the table's rows apart, such as ("method", "condition").

  Returns:
    One row per combination, in order of appearance; columns `by`, `n` (runs averaged) and
    for each metric `m` the mean `m` and the sample standard deviation `m_std` (0 if n = 1).
  """
  frame = pd.DataFrame(rows)
  names = [c for c in frame.columns if c not in (*by, *SEEDS) and frame[c].dtype.kind in "fiu"]
  groups: Any = frame.groupby(list(by), sort=False)[names]
  mean, std = groups.mean(), groups.std(ddof=1).fillna(0.0)
  table = mean.join(std.add_suffix("_std"))
  columns = [column for name in names for column in (name, f"{name}_std")]
  table = table[columns]
  table.insert(0, "n", groups.size())
  return table.reset_index()


def against(rows: Sequence[dict], *, by: str, baseline: str, seed: str = "seed") -> pd.DataFrame:
  """Compares methods with a baseline, metric by metric.

  Args:
    rows: long results, one per method and seed or several (mask seeds): these are averaged
      within a seed first, so that a run counts once.
    by: the column that tells the methods apart.
    baseline: its value for the baseline.
    seed: the column that tells the runs apart.

  Returns:
    One row per metric and method: "metric", `by`, "n" runs, "mean", "std" over runs, "delta"
    against the baseline's mean, "p" of Welch's two-tailed t-test against its runs (NaN
    for the baseline itself and below two runs), and "p_holm", corrected (`holm`) for the number of
    methods that the metric compares.
  """
  frame = pd.DataFrame(rows)
  runs: Any = frame.groupby([by, seed], sort=False).mean(numeric_only=True)
  found = []
  for metric in (name for name in runs.columns if name not in SEEDS):
    values = {name: part.to_numpy() for name, part in runs[metric].groupby(by, sort=False)}
    for name, value in values.items():
      enough = name != baseline and min(len(value), len(values[baseline])) > 1
      p = _welch(value, values[baseline]) if enough else float("nan")
      found.append(
        {
          "metric": metric,
          by: name,
          "n": len(value),
          "mean": value.mean(),
          "std": value.std(ddof=1) if len(value) > 1 else 0.0,
          "delta": value.mean() - values[baseline].mean(),
          "p": p,
        }
      )
  table = pd.DataFrame(found)
  table["p_holm"] = table.groupby("metric", sort=False)["p"].transform(lambda p: holm(list(p)))
  return table


def paired(
  rows: Sequence[dict],
  pairs: Sequence[tuple[str, str]],
  *,
  by: str,
  within: Sequence[str] = ("condition",),
  seed: str = "seed",
) -> pd.DataFrame:
  """Paired comparisons over the seeds that two methods share, metric by metric.

  Args:
    rows: long results, one per method and seed or several (mask seeds): these are averaged
      within a seed first, so that a run counts once. The same masks are tested for both.
    pairs: (method, rival) values of `by`.
    by: the column that tells the methods apart.
    within: the columns whose values are compared each by itself.
    seed: the column that pairs the runs.

  Returns:
    One row per metric, value of `within` and pair: "metric", `within`, `by`, "rival", "n" pairs,
    "delta" the mean difference method - rival with its 95 % interval "low", "high"; "effect", the
    difference in standard deviations of the differences (Cohen's d_z) with "effect_low" and
    "effect_high" (by the noncentral t); "p" of the paired two-tailed t-test, and "p_holm",
    corrected for all of the metric's rows. NaN below two pairs; effect and p too where all
    differences are alike.
  """
  runs: Any = pd.DataFrame(rows).groupby([*within, by, seed], sort=False).mean(numeric_only=True)
  found = []
  for metric in (name for name in runs.columns if name not in SEEDS):
    column = runs[metric].dropna()
    for where, part in column.groupby(list(within), sort=False):
      methods = {name: one.droplevel([*within, by]) for name, one in part.groupby(by, sort=False)}
      for method, rival in pairs:
        if method in methods and rival in methods:
          d = (methods[method] - methods[rival]).dropna().to_numpy()
          told = dict(zip(within, where, strict=True))
          found.append({"metric": metric, **told, by: method, "rival": rival, **_differences(d)})
  table = pd.DataFrame(found)
  table["p_holm"] = table.groupby("metric", sort=False)["p"].transform(lambda p: holm(list(p)))
  return table


def _differences(d: Any) -> dict[str, float]:
  """What `paired` says of the differences of n runs."""
  nan, n, delta = float("nan"), len(d), float(d.mean())
  found = {"n": n, "delta": delta, "low": nan, "high": nan, "effect": nan, "effect_low": nan}
  found |= {"effect_high": nan, "p": nan}
  if n < 2:
    return found
  deviation = float(d.std(ddof=1))
  half = float(stats.t.ppf(0.975, n - 1)) * deviation / n**0.5
  found |= {"low": delta - half, "high": delta + half}
  if deviation > 0:
    t = delta / deviation * n**0.5
    low, high = (_noncentral(t, n - 1, level) / n**0.5 for level in (0.975, 0.025))
    p = 2 * float(stats.t.sf(abs(t), n - 1))
    found |= {"effect": delta / deviation, "effect_low": low, "effect_high": high, "p": p}
  return found


def _noncentral(t: float, degrees: int, level: float) -> float:
  """The noncentrality of which t is the quantile of this level; SciPy's fails where it is large."""
  # P(T <= t) = E Φ(t s - c), s² a chi-squared draw by its degrees: at the middles of its quantiles
  middles = (np.arange(4096) + 0.5) / 4096
  at = t * np.sqrt(stats.chi2.ppf(middles, degrees) / degrees)
  excess = lambda c: float(stats.norm.cdf(at - c).mean()) - level  # noqa: E731
  found: Any = optimize.brentq(excess, at.min() - 10, at.max() + 10)
  return float(found)


def readable(table: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
  """A summary with "mean ± std" cells ("mean" where there is one run, "" where there is none)."""
  text = pd.DataFrame(index=table.index)
  for name in table.columns:
    if name.endswith("_std") and name.removesuffix("_std") in table.columns:
      continue
    if f"{name}_std" not in table.columns:
      column = table[name]
      number = column.dtype.kind == "f"
      text[name] = column.map(lambda v: f"{v:.{digits}f}") if number else column.astype(str)
      text[name] = text[name].where(column.notna(), "")
      continue
    columns = (table[name], table[f"{name}_std"], table["n"])
    text[name] = [_cell(*values, digits) for values in zip(*columns, strict=True)]
  return text


def _cell(mean: float, std: float, n: int, digits: int) -> str:
  if pd.isna(mean) and pd.isna(std):
    return ""
  return f"{mean:.{digits}f} ± {std:.{digits}f}" if n > 1 else f"{mean:.{digits}f}"


def pivot(
  table: pd.DataFrame, *, rows: str | Sequence[str], columns: str, metric: str, digits: int = 3
) -> pd.DataFrame:
  """One metric of a summary as a matrix, for the terminal: missing rate x method.

  Args:
    table: a summary (`summarize`), which has at most one row for each pair.
    rows: the column, or columns, whose values are the matrix's rows.
    columns: the column whose values are its columns.
    metric: the metric in the cells, as "mean ± std".
    digits: behind the point.

  Returns:
    The columns `rows`, then one of text for each value of `columns`, all in order of
    appearance; "" where the summary has no such pair.

  Raises:
    ValueError: if it has a pair twice.
  """
  rows = [rows] if isinstance(rows, str) else list(rows)
  found: Any = table[[*rows, columns]].assign(cell=readable(table, digits)[metric])
  matrix = found.set_index([*rows, columns])["cell"].unstack()
  order = found[rows].drop_duplicates()
  matrix = matrix.reindex(pd.MultiIndex.from_frame(order) if len(rows) > 1 else order[rows[0]])
  matrix = matrix[list(found[columns].drop_duplicates())].fillna("")
  return matrix.rename_axis(columns=None).reset_index()


def to_text(table: pd.DataFrame) -> str:
  """A summary for the terminal."""
  return readable(table).to_markdown(index=False, tablefmt="simple", disable_numparse=True)


def to_markdown(table: pd.DataFrame, tablefmt: str = "pipe") -> str:
  """A summary as a Markdown table, or in another format of tabulate's."""
  return readable(table).to_markdown(index=False, tablefmt=tablefmt, disable_numparse=True)


def save(table: pd.DataFrame, path: str | pathlib.Path) -> None:
  """Writes a table as CSV, and for readers as Markdown and LaTeX: `path` has no suffix."""
  path = pathlib.Path(path)
  table.to_csv(path.with_suffix(".csv"), index=False)
  for suffix, tablefmt in ((".md", "pipe"), (".tex", "latex_booktabs")):
    text = to_markdown(table, tablefmt)
    path.with_suffix(suffix).write_text(text + "\n", encoding="utf-8")


def write(
  directory: str | pathlib.Path, name: str, rows: Sequence[dict], by: Sequence[str]
) -> pd.DataFrame:
  """Writes the summary (`save`) and `name_runs.csv` with every run; returns the summary."""
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  table = summarize(rows, by)
  save(table, directory / name)
  pd.DataFrame(rows).to_csv(directory / f"{name}_runs.csv", index=False)
  return table
