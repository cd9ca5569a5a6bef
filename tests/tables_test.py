"""Long results -> tables: closed forms."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mmjax import tables

ROWS = [
  {"method": m, "condition": c, "mask_seed": s, "mae": base + s}
  for m, base in (("b", 1.0), ("a", 2.0))
  for c in ("0.5", "0")
  for s in (0, 1)
]


def test_a_summary_has_mean_and_std_over_the_seeds_and_is_written_with_its_runs(tmp_path):
  table = tables.write(tmp_path, "t", ROWS, ("method", "condition"))
  assert list(table["method"]) == ["b", "b", "a", "a"] and list(table["n"]) == [2] * 4
  np.testing.assert_allclose(table["mae"], [1.5, 1.5, 2.5, 2.5])
  np.testing.assert_allclose(table["mae_std"], np.sqrt(0.5))
  assert "1.500 ± 0.707" in (tmp_path / "t.md").read_text(encoding="utf-8")
  assert "toprule" in (tmp_path / "t.tex").read_text(encoding="utf-8")
  assert pd.read_csv(tmp_path / "t_runs.csv")["mae"].tolist() == [row["mae"] for row in ROWS]
  np.testing.assert_allclose(pd.read_csv(tmp_path / "t.csv")["mae"], table["mae"])


def test_one_run_has_no_std_and_what_is_missing_is_blank():
  table = tables.summarize([{"method": "a", "seed": 1, "mae": 0.25}], ("method",))
  assert table.to_dict("records") == [{"method": "a", "n": 1, "mae": 0.25, "mae_std": 0.0}]
  assert tables.readable(table)["mae"].tolist() == ["0.250"]
  assert tables.readable(pd.DataFrame({"p": [0.5, np.nan]}))["p"].tolist() == ["0.500", ""]


def test_methods_against_a_baseline():
  """Mask seeds are averaged within a run; deltas and Welch's p follow."""
  values = {"ORIG": [1.0, 1.2, 1.1], "M3S": [0.7, 0.9, 0.8]}
  rows = [
    {"method": method, "seed": seed, "mask_seed": mask_seed, "mae": value + shift}
    for method, runs in values.items()
    for seed, value in enumerate(runs)
    for mask_seed, shift in enumerate((-0.1, 0.1))
  ]
  orig, m3s = tables.against(rows, by="method", baseline="ORIG").to_dict("records")
  assert (orig["method"], m3s["method"], m3s["n"], m3s["metric"]) == ("ORIG", "M3S", 3, "mae")
  np.testing.assert_allclose([orig["mean"], m3s["mean"], m3s["delta"]], [1.1, 0.8, -0.3])
  np.testing.assert_allclose([orig["std"], m3s["std"]], [0.1, 0.1])
  t = 0.3 / np.sqrt(2 * 0.1**2 / 3)  # equal variances: 4 degrees of freedom
  np.testing.assert_allclose(m3s["p"], 2 * stats.t.sf(t, 4))
  assert np.isnan(orig["p"])
  lone = tables.against(rows[:2] + rows[6:8], by="method", baseline="ORIG")
  assert lone["n"].tolist() == [1, 1] and lone["p"].isna().all() and not lone["std"].any()


def test_welch_takes_unequal_variances_and_numbers_of_runs():
  runs = {"a": [0.0, 2.0], "b": [1.0, 1.1, 1.2, 1.3]}
  rows = [
    {"method": method, "seed": seed, "mae": value}
    for method, values in runs.items()
    for seed, value in enumerate(values)
  ]
  found = tables.against(rows, by="method", baseline="a").set_index("method")
  v, w = 2.0 / 2, np.var(runs["b"], ddof=1) / 4
  degrees = (v + w) ** 2 / (v**2 / 1 + w**2 / 3)
  expected = 2 * stats.t.sf(0.15 / np.sqrt(v + w), degrees)
  np.testing.assert_allclose(found.loc["b", "p"], expected)


def test_a_pivot_has_the_conditions_against_the_methods_in_order_of_appearance():
  rows = [row for row in ROWS if (row["method"], row["condition"]) != ("a", "0.5")]
  table = tables.summarize(
    [{**row, "kind": "rate"} for row in rows], ("method", "condition", "kind")
  )
  found = tables.pivot(table, rows="condition", columns="method", metric="mae", digits=1)
  expected = [
    {"condition": "0.5", "b": "1.5 ± 0.7", "a": ""},
    {"condition": "0", "b": "1.5 ± 0.7", "a": "2.5 ± 0.7"},
  ]
  assert found.to_dict("records") == expected and list(found.columns) == ["condition", "b", "a"]
  assert tables.to_text(found).splitlines()[0].split() == ["condition", "b", "a"]
  both = tables.pivot(table, rows=["kind", "condition"], columns="method", metric="mae", digits=1)
  assert both.to_dict("records") == [{"kind": "rate", **row} for row in expected]
  with pytest.raises(ValueError, match="duplicate"):
    tables.pivot(table, rows="kind", columns="method", metric="mae")
