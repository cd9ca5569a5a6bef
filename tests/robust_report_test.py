"""The report of a robust evaluation, from made-up results."""

import numpy as np
import pandas as pd

from experiments import robust_report
from mmjax import types

SPEC = types.Spec(*[types.ModalitySpec(2, 2)] * 3, num_train=4)
LABEL = np.float32([-2.6, -1.0, 0.2, 1.4, 2.9, 0.0])


def make_rows():
  """MAE grows linearly with the rate, by another slope for each model."""
  return [
    {
      "model": model, "kind": kind, "condition": condition, "seed": seed, "mask_seed": mask_seed,
      "mae": base + slope * (0.5 if kind == "missing" else float(condition)) + 0.1 * seed,
      "acc7": 0.3,
    }
    for model, base, slope in (("lnln", 1.0, 0.4), ("self_mm", 1.2, 0.2))
    for kind, condition in (("rate", "0"), ("rate", "0.5"), ("rate", "0.9"), ("missing", "la"))
    for seed in (0, 1)
    for mask_seed in (0, 1)
  ]  # fmt: skip


def test_the_area_is_a_mean_over_the_rates():
  table = pd.DataFrame(make_rows())
  table = table[table["kind"] == "rate"]
  table = table.groupby(["model", "condition"], as_index=False)["mae"].mean()
  found = robust_report.area(table, "mae")
  np.testing.assert_allclose(found["lnln"], 1.05 + 0.4 * 0.45)  # a line: its value in the middle
  np.testing.assert_allclose(found["self_mm"], 1.25 + 0.2 * 0.45)


def test_averages_are_over_rates_alone_and_spread_over_seeds():
  table = robust_report.averages(make_rows()).set_index("model")
  np.testing.assert_allclose(table.loc["lnln", "mae"], 1.05 + 0.4 * 1.4 / 3)
  np.testing.assert_allclose(table.loc["lnln", "mae_std"], 0.1 / np.sqrt(2))
  assert table.loc["lnln", "n"] == 2


def test_the_papers_values_stand_beside_ours():
  table = robust_report.beside_paper(make_rows(), "mosi")
  one = table[(table["condition"] == "rate=0") & (table["metric"] == "acc7")].set_index("model")
  paper = pd.read_csv(robust_report.PAPER)
  paper = paper[(paper["dataset"] == "MOSI") & (paper["condition"] == "rate=0")]
  paper = paper[paper["metric"] == "acc7"].set_index("method")["value"]
  np.testing.assert_allclose(one.loc["self_mm", "paper"], paper["Self-MM"] / 100)
  np.testing.assert_allclose(one.loc["lnln", "paper"], paper["LNLN"] / 100)


def test_laziness_of_one_answer():
  shown = {"m": {"0": LABEL, "0.9": np.full(6, 0.4)}}
  table = robust_report.laziness(shown, LABEL, SPEC).set_index(["model", "condition"])
  assert table.loc[("m", "0.9"), "largest share"] == 1
  np.testing.assert_allclose(table.loc[("m", "0.9"), "entropy"], 0, atol=1e-9)
  assert table.loc[("labels", ""), "entropy"] == table.loc[("m", "0"), "entropy"] > 1.5


def test_the_page_holds_everything(tmp_path, capsys):
  shown = {name: {"0": LABEL, "0.9": LABEL * 0} for name in ("lnln", "self_mm")}
  protocol = {
    "command": "python -m experiments.robustness --configs=lnln,<b>",
    "selection": robust_report.selection_in_words("test_oracle", "0.5"),
  }
  path = robust_report.write(
    make_rows(), shown, LABEL, SPEC, tmp_path, protocol, dataset="mosi"
  )
  page = path.read_text(encoding="utf-8")
  assert page.count("data:image/png;base64,") == 2
  assert "lnln,&lt;b&gt;" in page and "TEST ORACLE" in page
  assert "http://" not in page and "src=\"/" not in page  # self-contained
  assert (tmp_path / "confusion.png").stat().st_size > 5000
  for name in ("average", "beside_paper", "laziness", "robustness"):
    assert len(pd.read_csv(tmp_path / f"{name}.csv")) > 0
  assert "Report" in capsys.readouterr().out
