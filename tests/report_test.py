"""The report of a robust evaluation, from made-up results."""

import numpy as np
import pandas as pd
from scipy import stats

from experiments.configs import lnln
from experiments.report import averages, methods, page, predictions
from mmjax import types

SPEC = types.Spec(*[types.ModalitySpec(2, 2)] * 3, num_train=4)
LABEL = np.float32([-2.6, -1.0, 0.2, 1.4, 2.9, 0.0])


def make_rows():
  """MAE grows linearly with the rate, by another slope for each model."""
  return [
    {
      "model": model,
      "kind": kind,
      "condition": condition,
      "seed": seed,
      "mask_seed": mask_seed,
      "mae": base + slope * (0.5 if kind == "missing" else float(condition)) + 0.1 * seed,
      "acc7": 0.3 + 0.01 * seed + 0.001 * mask_seed,
    }
    for model, base, slope in (("lnln", 1.0, 0.4), ("self_mm", 1.2, 0.2))
    for kind, condition in (("rate", "0"), ("rate", "0.5"), ("rate", "0.9"), ("missing", "la"))
    for seed in (0, 1)
    for mask_seed in (0, 1)
  ]


def test_the_area_is_a_mean_over_the_rates():
  table = pd.DataFrame(make_rows())
  table = table[table["kind"] == "rate"]
  table = table.groupby(["model", "condition"], as_index=False)["mae"].mean()
  found = averages.area(table, "mae")
  np.testing.assert_allclose(found["lnln"], 1.05 + 0.4 * 0.45)  # a line: its value in the middle
  np.testing.assert_allclose(found["self_mm"], 1.25 + 0.2 * 0.45)


def test_averages_are_over_rates_alone_and_spread_over_seeds():
  table = averages.averages(make_rows()).set_index("model")
  np.testing.assert_allclose(table.loc["lnln", "mae"], 1.05 + 0.4 * 1.4 / 3)
  np.testing.assert_allclose(table.loc["lnln", "mae_std"], 0.1 / np.sqrt(2))
  assert table.loc["lnln", "n"] == 2


def test_the_papers_values_stand_beside_ours():
  table = averages.beside_paper(make_rows(), "mosi")
  one = table[(table["condition"] == "rate=0") & (table["metric"] == "acc7")].set_index("model")
  paper = pd.read_csv(averages.PAPER)
  paper = paper[(paper["dataset"] == "MOSI") & (paper["condition"] == "rate=0")]
  paper = paper[paper["metric"] == "acc7"].set_index("method")["value"]
  np.testing.assert_allclose(one.loc["self_mm", "paper"], paper["Self-MM"] / 100)
  np.testing.assert_allclose(one.loc["lnln", "paper"], paper["LNLN"] / 100)


def test_averages_stand_beside_the_papers_too():
  rows = [{**row, "f1_non0": 0.5, "f1_non0_swapped": 0.6} for row in make_rows()]
  table = averages.beside_paper(rows, "mosi")
  table = table[(table["condition"] == "rate=average") & (table["model"] == "lnln")]
  one = table.set_index("metric")
  np.testing.assert_allclose(one.loc["mae", ["ours", "paper"]].to_list(), [1.05 + 0.56 / 3, 1.046])
  assert one.loc["f1_non0_swapped", "paper"] == one.loc["f1_non0", "paper"]


def test_differences_from_a_baseline():
  table = averages.differences(make_rows(), "lnln").set_index("model")
  np.testing.assert_allclose(table.loc["self_mm", "Δ mae"], 0.2 - 0.2 * 1.4 / 3)
  assert np.isnan(table.loc["lnln", "p mae"]) and 0 < table.loc["self_mm", "p mae"] < 1


def test_the_papers_ablations_are_those_of_the_config():
  paper = pd.read_csv(averages.PAPER, dtype={"table": str})
  paper = paper[paper["table"].isin(["4", "5", "7"])]["method"].str.removeprefix("LNLN ")
  ours = {
    name for key in ("components", "regularization", "weights") for name in lnln.ABLATIONS[key]
  }
  assert set(paper) == ours


def test_the_view_is_the_plane_of_the_first_cloud():
  plane = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 2)))[0]
  flat = np.random.default_rng(2).normal(size=(30, 2)) @ plane.T
  found = predictions.view({"0": flat, "0.9": flat + 3 * np.eye(4)[0]})
  distance = np.linalg.norm(flat[0] - flat[1])
  np.testing.assert_allclose(np.linalg.norm(found["rate 0"][0] - found["rate 0"][1]), distance)
  moved = found["rate 0.9"] - found["rate 0"]
  np.testing.assert_allclose(np.linalg.norm(moved[0]), 3 * np.linalg.norm(plane[0]))


def test_laziness_of_one_answer():
  shown = {"m": {"0": LABEL, "0.9": np.full(6, 0.4)}}
  table = predictions.laziness(shown, LABEL, SPEC).set_index(["model", "condition"])
  assert table.loc[("m", "0.9"), "largest share"] == 1
  np.testing.assert_allclose(table.loc[("m", "0.9"), "entropy"], 0, atol=1e-9)
  assert table.loc[("labels", ""), "entropy"] == table.loc[("m", "0"), "entropy"] > 1.5


def test_the_page_holds_everything(tmp_path, capsys):
  shown = {name: {"0": LABEL, "0.9": LABEL * 0} for name in ("lnln", "self_mm")}
  points = np.random.default_rng(0).normal(size=(2, 6, 5))
  features = {name: dict(zip(("0", "0.9"), points, strict=True)) for name in shown}
  results = page.Results(make_rows(), shown, features, {"lnln": 1.5, "self_mm": 0.5})
  protocol = {
    "command": "python -m experiments.robustness --configs=lnln,<b>",
    "selection": page.selection_in_words(True, "0.5"),
  }
  path = page.write(results, LABEL, SPEC, tmp_path, protocol, dataset="mosi", baseline="lnln")
  text = path.read_text(encoding="utf-8")
  assert text.count("data:image/png;base64,") == 3
  assert "lnln,&lt;b&gt;" in text and "TEST ORACLE" in text
  assert "http://" not in text and 'src="/' not in text  # self-contained
  assert (tmp_path / "confusion.png").stat().st_size > 5000
  for name in ("average_rate", "average_missing", "rate", "missing", "beside_paper", "differences"):
    assert len(pd.read_csv(tmp_path / f"{name}.csv")) > 0
    assert r"\toprule" in (tmp_path / f"{name}.tex").read_text(encoding="utf-8")
  assert "Report" in capsys.readouterr().out


def test_methods_against_a_baseline(tmp_path, capsys):
  """Mask seeds are averaged within a run; deltas, Welch's p and the paper's values follow."""
  values = {"ORIG": [1.0, 1.2, 1.1], "M3S": [0.7, 0.9, 0.8]}
  rows = [
    {
      "missing_rate": "0.4-0.6",
      "method": method,
      "seed": seed,
      "mask_seed": mask_seed,
      "kind": "rate",
      "condition": condition,
      "mae": value + shift + (condition == "0.6-0.8"),
    }
    for condition in ("0.4-0.6", "0.5", "0.6-0.8")
    for method, runs in values.items()
    for seed, value in enumerate(runs)
    for mask_seed, shift in enumerate((-0.1, 0.1))
  ]
  paper = pd.DataFrame(
    [
      {
        "model": "Self-MM",
        "dataset": "SIMS",
        "input_rate": "0.4-0.6",
        "test_rate": "0.4-0.6",
        "method": "M3S",
        "metric": "mae",
        "value": 0.5053,
      }
    ]
  )
  table = methods.comparison(
    rows,
    tmp_path,
    paper,
    conditions=["0.4-0.6", "0.6-0.8"],
    model="self_mm",
    dataset="sims",
  )
  orig, m3s, *shifted = table.to_dict("records")
  np.testing.assert_allclose([row["mean"] for row in shifted], [2.1, 1.8])
  assert [row["test_rate"] for row in shifted] == ["0.6-0.8"] * 2
  assert (orig["method"], m3s["method"], m3s["n"]) == ("ORIG", "M3S", 3)
  np.testing.assert_allclose([orig["mean"], m3s["mean"], m3s["delta"]], [1.1, 0.8, -0.3])
  np.testing.assert_allclose([orig["std"], m3s["std"]], [0.1, 0.1])
  t = 0.3 / np.sqrt(2 * 0.1**2 / 3)  # equal variances: 4 degrees of freedom
  np.testing.assert_allclose(m3s["p"], 2 * stats.t.sf(t, 4))
  assert np.isnan(orig["p"]) and m3s["paper"] == 0.5053 and np.isnan(orig["paper"])
  assert "0.8000 ± 0.1000" in (tmp_path / "comparison.md").read_text(encoding="utf-8")
  assert "toprule" in (tmp_path / "comparison.tex").read_text(encoding="utf-8")
  assert "M3S" in capsys.readouterr().out
