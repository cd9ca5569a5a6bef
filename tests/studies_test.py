"""Studies: variants × seeds in their folders, trained where needed, evaluated, tabulated."""

import pathlib

import chex
import pandas as pd
import pytest

from command import ROOT, call, final, refused
from experiments import workdir
from mmjax import runs

SMALL = ("--config.train.batch_size=8", "--set=train.epochs=2")


def test_compare_trains_what_is_missing_and_writes_tables_and_figures(folder):
  """One run in a process, then the others side by side; what is finished stays as it is."""
  out = folder / "compared"
  config = folder / "toy config.py"  # with a space: workers once lost it
  config.write_text((ROOT / "tests" / "toy_config.py").read_text())

  def compare(*more):
    code, output = call(
      "compare",
      *("--config", f"{config}:tiny"),
      *SMALL,
      f"--data_dir={folder / 'data'}",
      f"--out={out}",
      "--test_rate=0.4,0.6",
      "--test_rate=0.6,0.8",
      "--mask_seeds=2",
      *more,
    )
    assert code == 0, output
    return output

  output = compare("--seeds=1", "--schedule=processes", "--methods=m3s")
  assert "m3s, 0.4,0.6, seed 0: Best epoch" in output
  assert "1 runs per method are few" in output
  first = final(out / "m3s-0.4,0.6" / "seed-0")
  output = compare("--seeds=2", "--schedule=together", "--methods=orig,m3s")
  assert "orig, 0.4,0.6, seeds [0, 1]" in output and "m3s, 0.4,0.6, seeds [1]" in output
  chex.assert_trees_all_equal(first, final(out / "m3s-0.4,0.6" / "seed-0"))
  table = pd.read_csv(out / "comparison.csv")
  assert set(table["test_rate"]) == {"0.4-0.6", "0.6-0.8"}
  mae = table[table["metric"] == "mae"]
  assert (mae["n"] == 2).all() and mae["p"].notna().tolist() == [False, True] * 2
  for method, seed in (("orig", 0), ("orig", 1), ("m3s", 0), ("m3s", 1)):
    path = out / f"{method}-0.4,0.6" / f"seed-{seed}"
    log = workdir.history(path)
    assert [line["epoch"] for line in log] == [0, 1] and log[-1]["test"]["mae"] > 0
    asked = runs.read_config(path)["run"]["config"]
    assert (asked["method"]["name"], asked["seed"]) == (method, seed)
    assert not (path.parent / "together").exists()
  for name in ("epochs_valid.png", "epochs_test.png", "robustness.png"):
    assert (out / name).stat().st_size > 5000
  rows = pd.read_csv(out / "robustness_runs.csv")
  assert len(rows) == 2 * 2 * (2 + 10) * 2
  # the terminal gets the rates against the methods, the files the long table
  pivot = output.split("MAE (lower is better):")[1]
  assert "condition" in pivot and "ORIG" in pivot.splitlines()[1] and "M3S" in pivot.splitlines()[1]


def test_what_a_study_asks_for_is_checked_before_any_work(folder):
  base = ("--dataset=tiny", f"--data_dir={folder / 'data'}", f"--out={folder / 'refused'}")
  for more, told in (
    (("--feature=feeling",), "has no output 'feeling'; it has"),
    (("--shown=0,2",), "2"),
    (("--set=method.order=second",), "'spl' has"),
    (("--set=train.select=valid/acc9",), "config.train.select=valid/acc9"),
    (("--mask=drop",), "drop"),
  ):
    assert told in refused("robustness", "--configs=quickstart", *base, *more)
  assert not (folder / "refused").exists()


@pytest.mark.slow
def test_ablate_trains_variants_and_tabulates_their_differences(folder):
  out = folder / "ablated"
  code, output = call(
    "ablate",
    "--model=quickstart",
    "--change=blind: mask.drop=('text',); mask.rate=0",
    "--dataset=tiny",
    f"--data_dir={folder / 'data'}",
    f"--out={out}",
    "--set=quickstart/model.hidden_size=4",
    *SMALL,
    "--seeds=1,",
    "--mask_seeds=2",
    "--selection=test_oracle",
  )
  assert code == 0, output
  assert output.count("TEST ORACLE") >= 2
  table = pd.read_csv(out / "differences.csv").set_index("model")
  assert table.loc["quickstart", "Δ mae"] == 0 and table.loc["quickstart blind", "Δ mae"] != 0
  page = (out / "report.html").read_text(encoding="utf-8")
  assert "TEST ORACLE" in page and "experiments.ablate" in page
  rows = pd.read_csv(out / "robustness_runs.csv")
  assert len(rows) == 2 * (10 + 6) * 2  # variants x conditions x masks
  # without language, audio and vision nothing is seen: no mask makes a difference
  silent = rows[(rows["model"] == "quickstart blind") & (rows["kind"] == "missing")]
  assert silent[silent["condition"] == "av"]["mae"].nunique() == 1
  asked = runs.read_config(pathlib.Path(out) / "runs" / "quickstart blind" / "seed-1")
  assert asked["run"]["config"]["mask"]["drop"] == ["text"]
