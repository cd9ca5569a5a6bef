"""Studies: variants × seeds in their folders, trained where needed, evaluated, tabulated."""

import pathlib

import chex
import numpy as np
import pandas as pd
import pytest
from absl import flags

from command import ROOT, call, final, refused
from data_prep import convert
from experiments import protocol, protocols, robustness, workdir
from mmjax import data, runs, stream, synthetic, types

# A registered system in tiny, as a config.
EMOTIONAL = """
from experiments.configs import common


def get_config(dataset="iemocap"):
  config = common.get_config(dataset)
  config.model = dict(name="lmf", hidden_sizes=(4, 3, 4), rank=2)
  config.train.epochs, config.train.batch_size, config.train.patience = 1, 16, 0
  return config
"""
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
  assert mae["method"].tolist() == ["ORIG", "M3S", "median"] * 2
  assert (
    mae["n"].tolist() == [2, 2, 1] * 2 and mae["p"].notna().tolist() == [False, True, False] * 2
  )
  assert set(mae["split"]) == {"test"} and "valid/mae at rate 0.4-0.6" in set(mae["selection"])
  counted = pd.read_csv(out / "missing_data.csv").set_index(["condition", "modality"])
  assert counted.loc[("0", "all"), "missing steps"] == 0
  some = counted.loc[("0.9", "text")]
  assert 0.8 < some["missing steps"] / some["of steps"] < 0.9 and some["of samples"] == 2 * 24
  assert "Missing: One contiguous span" in output and "The rate is r, share of" in output
  for method, seed in (("orig", 0), ("orig", 1), ("m3s", 0), ("m3s", 1)):
    path = out / f"{method}-0.4,0.6" / f"seed-{seed}"
    log = workdir.history(path)
    assert [line["epoch"] for line in log] == [0, 1] and log[-1]["test"]["mae"] > 0
    asked = runs.read_config(path)["run"]["config"]
    assert (asked["method"]["name"], asked["seed"]) == (method, seed)
    assert not (path.parent / "together").exists()
  for name in ("epochs_valid.png", "epochs_test.png", "robustness.png"):
    assert (out / name).stat().st_size > 5000
  told = (out / "report.html").read_text(encoding="utf-8")
  for part in ("Methods against the baseline", "Over the epochs", "Which answers flip", "M3S"):
    assert part in told, part
  rows = pd.read_csv(out / "robustness_runs.csv")
  assert len(rows) == (2 * 2 * 2 + 1) * (2 + 10)  # and the constant's
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


def test_protocols_are_values_that_every_config_can_serve():
  """Each one's masks exist, its entries fit any config, and its test conditions differ."""
  flag_values = flags.FlagValues()
  protocol.define(flag_values)
  for name, value in protocols.PROTOCOLS.items():
    flag_values(["", f"--protocol={name}", "--dataset=iemocap", "--set=train.epochs=3"])
    asked = protocol.Asked(flag_values, ["misa"])
    for model in ("misa", "hrlf", "lnln"):
      config = asked.variant(model, model, {}).config
      assert config.mask.name == value.entries["mask.name"]
      assert config.method.name == value.entries["method.name"] and config.train.epochs == 3
      conditions = asked.conditions(config)
      told = [(one.kind, one.name) for one in conditions]
      assert len(told) == len(set(told)) > 9
      assert {one.kind for one in conditions} <= {"rate", "interval", "missing", "complete"}
      assert config.data.task == ("binary" if name == "hrlf" else "classification")
    words = protocols.describe(value, list(value.tests), config)
    assert all(text.rstrip(".") and "The rate is" in text for text in words.values())
    flag_values.unparse_flags()
  # another mask may be asked for: what it does not take of the protocol's is left out
  flag_values(["", "--mask=span", "--valid_rate=0.3"])
  config = protocol.Asked(flag_values, ["misa"]).variant("misa", "misa", {}).config
  assert (config.mask.rate, config.valid.rate) == ((0.0, 1.0), (0.3, 0.3))
  assert "complete_share" not in config.mask
  flag_values.unparse_flags()
  flag_values(["", "--protocol=hrlf", "--valid_rate=0.3"])
  with pytest.raises(types.UsageError, match="valid.rate"):
    protocol.Asked(flag_values, ["misa"]).variant("misa", "misa", {})


def test_hrlfs_protocol_on_four_emotions_from_mults_labels(tmp_path):
  """The whole way: MulT's pickle, a registered system, its tables with the paper's values."""
  arrays = synthetic.make_arrays(seed=4, num_train=32, num_valid=12, num_test=12)
  for fields in arrays.values():
    emotion = np.digitize(fields.pop("regression_labels"), [-1, 0, 1])
    fields.pop("classification_labels")
    fields["labels"] = np.eye(2)[np.eye(4, dtype=int)[emotion]]
  convert.convert(synthetic.write_pickle(tmp_path / "f.pkl", arrays), "iemocap", tmp_path)
  held, kept = (f(tmp_path, "iemocap", task="binary") for f in (data.load, stream.open_dataset))
  assert held.spec == kept.spec and (held.train.label == kept.train.read().label).all()
  assert set(held.train.label) == {1, 2, 4, 8}
  config = tmp_path / "hrlf.py"  # so called, the paper's values are those of HRLF
  config.write_text(EMOTIONAL)
  out = tmp_path / "out"
  code, output = call(
    "robustness",
    "--protocol=hrlf",
    f"--configs={config}",
    "--dataset=iemocap",
    f"--data_dir={tmp_path}",
    f"--out={out}",
    *("--seeds=0,", "--mask_seeds=2", "--shown=0,1"),
  )
  assert code == 0, output
  table = pd.read_csv(out / "table_f1_happy.csv").set_index(["model", "values"])
  columns = ["{l}", "{a}", "{v}", "{l,a}", "{l,v}", "{a,v}"]
  assert table.loc[("HRLF", "paper"), "Avg."] == 0.785
  ours = table.loc[("hrlf", "ours")]
  assert ours["Avg."] == pytest.approx(np.mean([ours[c] for c in columns])) and ours["{l,a,v}"] > 0
  assert ours["split"] == "test" and ours["selection"] == "valid/f1 at mask msm"
  constant = table.loc[("majority", "ours")]
  assert constant["{l}"] == constant["{l,a,v}"] and "labels" in constant["selection"]
  rows = pd.read_csv(out / "robustness_runs.csv")
  assert len(rows) == (2 + 1) * (11 + 7) and {"f1_sad", "f1_angry", "f1_neutral"} <= set(rows)
  # nothing is left at a ratio of 1: what was missing is all there was
  counted = pd.read_csv(out / "missing_data.csv").set_index(["kind", "condition", "modality"])
  gone = counted.loc[("rate", "1", "all")]
  assert gone["missing steps"] == gone["of steps"] > 0 and gone["missing modalities"] == 3 * 2 * 12
  left = counted.loc[("missing", "av", "all")]
  assert (
    left["missing modalities"] == 2 * 2 * 12 and counted.loc[("missing", "av", "text")].iloc[2] == 0
  )
  page = (out / "report.html").read_text(encoding="utf-8")
  for told in ("HRLF&#x27;s (Li et al. 2024)", "MSM", "t-SNE", "share of the valid steps"):
    assert told in page, told


def test_ablations_stand_below_their_systems():
  flag_values = flags.FlagValues()
  protocol.define(flag_values)
  flag_values(["", "--protocol=hrlf"])
  asked = protocol.Asked(flag_values, ["misa", "hrlf"])
  found = robustness.variants_of(asked, ["misa", "hrlf"], ["components", "m3s"])
  methods = {variant.name: variant.config.method.name for variant in found}
  assert methods["hrlf"] == "spl" and methods["hrlf in M³S"] == methods["misa in M³S"] == "m3s"
  names = [variant.name for variant in found]
  assert names[:3] == ["misa", "misa in M³S", "hrlf"]
  assert {"hrlf w/o FRF", "hrlf w/o HMI", "hrlf w/o HAL"} <= {*names}
  with pytest.raises(types.UsageError, match="componets.*'components'"):
    robustness.variants_of(asked, ["misa", "hrlf"], ["componets"])


@pytest.mark.slow
def test_ablate_trains_variants_and_tabulates_their_differences(folder):
  out, config = folder / "ablated", folder / "toy_config.py"
  config.write_text((ROOT / "tests" / "toy_config.py").read_text())
  code, output = call(
    "ablate",
    f"--model={config}",
    "--change=blind: mask.drop=('text',); mask.rate=0",
    "--dataset=tiny",
    f"--data_dir={folder / 'data'}",
    f"--out={out}",
    "--set=toy_config/optimizer.learning_rate=0.01",
    *SMALL,
    "--seeds=1,",
    "--mask_seeds=2",
    "--selection=test_oracle",
  )
  assert code == 0, output
  assert output.count("TEST ORACLE") >= 2
  table = pd.read_csv(out / "differences.csv").set_index("model")
  assert table.loc["toy_config", "Δ mae"] == 0 and table.loc["toy_config blind", "Δ mae"] != 0
  page = (out / "report.html").read_text(encoding="utf-8")
  assert "TEST ORACLE" in page and "experiments.ablate" in page
  rows = pd.read_csv(out / "robustness_runs.csv")
  assert len(rows) == (2 * 2 + 1) * (10 + 6)  # variants x masks, and the constant, x conditions
  # without language, audio and vision nothing is seen: no mask makes a difference
  silent = rows[(rows["model"] == "toy_config blind") & (rows["kind"] == "missing")]
  assert silent[silent["condition"] == "av"]["mae"].nunique() == 1
  asked = runs.read_config(pathlib.Path(out) / "runs" / "toy_config blind" / "seed-1")
  assert asked["run"]["config"]["mask"]["drop"] == ["text"]
  assert asked["run"]["config"]["optimizer"]["learning_rate"] == 0.01
