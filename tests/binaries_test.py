"""The binaries as a user runs them: in processes of their own, killed and started again."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import chex
import orbax.checkpoint as ocp
import pandas as pd
import pytest

from data_prep import convert
from mmjax import synthetic

ROOT = pathlib.Path(__file__).parents[1]
EPOCHS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("binaries")
  synthetic.write_pickle(
    folder / "tiny.pkl", synthetic.make_arrays(seed=1, num_train=64, num_valid=24, num_test=24)
  )
  convert.convert(folder / "tiny.pkl", "tiny", folder / "data")
  return folder


def start(module, *flags, **kwargs):
  command = [sys.executable, "-m", f"experiments.{module}", *flags]
  return subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
  )


def train(folder, name, *more):
  return start(
    "train",
    "--config=experiments/configs/quickstart.py:tiny",
    "--config.model.hidden_size=4",
    f"--config.train.epochs={EPOCHS}",
    "--config.train.batch_size=8",
    f"--data_dir={folder / 'data'}",
    f"--workdir={folder / name}",
    *more,
  )


def finish(process):
  output, _ = process.communicate(timeout=300)
  return process.returncode, output


def final(path):
  """Everything in the newest checkpoint of a run."""
  with ocp.CheckpointManager(path / "checkpoints") as checkpoints:
    return checkpoints.restore(checkpoints.latest_step(), args=ocp.args.StandardRestore())


def epochs_logged(path):
  log = path / "metrics.jsonl"
  return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture(scope="module")
def uninterrupted(folder):
  code, output = finish(train(folder, "whole"))
  assert code == 0, output
  assert "Best epoch" in output and "experiments.evaluate" in output
  return final(folder / "whole")


def wait_until(condition, process):
  while not condition():
    assert process.poll() is None, process.communicate()[0]
    time.sleep(0.01)


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(folder, uninterrupted):
  for epochs in (2, 6):
    process = train(folder, "killed", "--checkpoint_every=0")
    wait_until(lambda at=epochs: epochs_logged(folder / "killed") >= at, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert epochs_logged(folder / "killed") < EPOCHS
  code, output = finish(train(folder, "killed", "--checkpoint_every=0"))
  assert code == 0, output
  chex.assert_trees_all_equal(final(folder / "killed"), uninterrupted)
  logs = [(folder / name / "metrics.jsonl").read_text() for name in ("killed", "whole")]
  assert logs[0] == logs[1]
  assert [json.loads(line)["epoch"] for line in logs[0].splitlines()] == list(range(EPOCHS))


def test_sigterm_saves_and_says_how_to_go_on(folder, uninterrupted):
  process = train(folder, "stopped")
  wait_until(lambda: epochs_logged(folder / "stopped") >= 2, process)
  process.send_signal(signal.SIGTERM)
  code, output = finish(process)
  assert code == 128 + signal.SIGTERM and "The same command goes on" in output
  assert epochs_logged(folder / "stopped") < EPOCHS
  code, output = finish(train(folder, "stopped"))
  assert code == 0, output
  chex.assert_trees_all_equal(final(folder / "stopped"), uninterrupted)


def test_a_folder_of_another_config_is_refused(folder, uninterrupted):
  code, output = finish(train(folder, "whole", "--config.optimizer.learning_rate=0.5"))
  assert code == 1
  assert "config.optimizer.learning_rate: 0.001 there, 0.5 asked for" in output
  assert "Traceback" not in output
  chex.assert_trees_all_equal(final(folder / "whole"), uninterrupted)


def test_a_loss_that_is_not_finite_names_the_step_and_the_checkpoint(folder):
  code, output = finish(train(folder, "nan", "--config.optimizer.learning_rate=1e30"))
  assert code == 1 and "is not finite in phase" in output and "checkpoint" in output
  assert "Traceback" not in output


def test_evaluate_writes_table_and_curves(folder, uninterrupted):
  code, output = finish(
    start(
      "evaluate",
      f"--workdir={folder / 'whole'}",
      "--rates=0:0.9:0.3",
      "--mask_seeds=2",
      "--missing=l,av",
    )
  )
  assert code == 0, output
  out = folder / "whole" / "robustness"
  runs = (out / "robustness_runs.csv").read_text().splitlines()
  assert len(runs) == 1 + (4 + 2) * 2
  assert (out / "robustness.png").stat().st_size > 5000
  assert "0.3" in (out / "robustness.md").read_text() and "±" in output


def test_evaluating_a_folder_without_a_run_says_so(folder):
  code, output = finish(start("evaluate", f"--workdir={folder / 'nothing'}"))
  assert code == 1 and "holds no training run" in output and "Traceback" not in output
  assert not (folder / "nothing").exists()


def test_compare_trains_what_is_missing_and_writes_tables_and_figures(folder):
  """One seed in processes, then a second one side by side; what is finished stays as it is."""
  out = folder / "compared"

  def compare(*more):
    code, output = finish(
      start(
        "compare",
        "--config=experiments/configs/self_mm.py:tiny",
        "--config.train.batch_size=8",
        "--config.train.epochs=3",
        f"--data_dir={folder / 'data'}",
        f"--out={out}",
        "--methods=orig,m3s",
        "--test_rate=0.4,0.6",
        "--test_rate=0.6,0.8",
        *more,
      )
    )
    assert code == 0, output
    return output

  assert "orig, 0.4,0.6, seed 0: Best epoch" in compare("--seeds=1", "--schedule=processes")
  first = final(out / "m3s-0.4,0.6" / "seed-0")
  output = compare("--seeds=2", "--schedule=together")
  assert "seeds [1]" in output and "seeds [0" not in output
  chex.assert_trees_all_equal(first, final(out / "m3s-0.4,0.6" / "seed-0"))
  table = pd.read_csv(out / "comparison.csv")
  assert set(table["test_rate"]) == {"0.4-0.6", "0.6-0.8"}
  mae = table[table["metric"] == "mae"]
  assert (mae["n"] == 2).all() and mae["p"].notna().tolist() == [False, True] * 2
  assert not (out / "m3s-0.4,0.6" / "together").exists()
  for seed in (0, 1):
    log = (out / "m3s-0.4,0.6" / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == [0, 1, 2]
    assert json.loads(log[-1])["test"]["mae"] > 0
  for name in ("epochs_valid.png", "epochs_test.png", "robustness.png"):
    assert (out / name).stat().st_size > 5000
  assert "seed" not in compare("--seeds=2").split("Curves")[0]  # nothing left to train


@pytest.mark.slow
def test_ablate_trains_variants_and_tabulates_their_differences(folder):
  out = folder / "ablated"

  def ablate():
    code, output = finish(
      start(
        "ablate",
        "--model=quickstart",
        "--change=blind: mask.drop=('text',); missing_rate=0",
        "--dataset=tiny",
        f"--data_dir={folder / 'data'}",
        f"--out={out}",
        "--set=quickstart/model.hidden_size=4",
        "--set=train.epochs=2",
        "--set=train.batch_size=16",
        "--seeds=1",
        "--mask_seeds=2",
        "--selection=test_oracle",
      )
    )
    assert code == 0, output
    return output

  assert ablate().count("Best epoch") == 2
  table = pd.read_csv(out / "differences.csv").set_index("model")
  assert table.loc["quickstart", "Δ mae"] == 0 and table.loc["quickstart blind", "Δ mae"] != 0
  page = (out / "report.html").read_text(encoding="utf-8")
  assert "TEST ORACLE" in page and "experiments.ablate --model=quickstart" in page
  rows = pd.read_csv(out / "robustness_runs.csv")
  assert len(rows) == 2 * (10 + 6) * 2  # variants x conditions x masks
  # without language, audio and vision nothing is seen: no mask makes a difference
  silent = rows[(rows["model"] == "quickstart blind") & (rows["kind"] == "missing")]
  assert silent[silent["condition"] == "av"]["mae"].nunique() == 1


def test_an_entry_for_a_model_that_does_not_run_is_refused(folder):
  code, output = finish(
    start(
      "robustness",
      "--configs=quickstart",
      "--dataset=tiny",
      f"--data_dir={folder / 'data'}",
      f"--out={folder / 'refused'}",
      "--set=quickstrat/train.epochs=2",
    )
  )
  assert code == 1 and "'quickstrat' is none of quickstart" in output and "Traceback" not in output
  assert not (folder / "refused").exists()
