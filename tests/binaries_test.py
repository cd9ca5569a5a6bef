"""Training and evaluating as a user does: stopped, killed, started again, refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import chex
import pytest

import mmjax
from command import ROOT, call, final, refused, start
from experiments import workdir
from mmjax import runs

EPOCHS = 12


def flags(folder, name, *more):
  return (
    f"--config={ROOT / 'tests' / 'toy_config.py'}:tiny",
    f"--config.train.epochs={EPOCHS}",
    "--config.train.batch_size=8",
    f"--data_dir={folder / 'data'}",
    f"--workdir={folder / name}",
    *more,
  )


@pytest.fixture(scope="module")
def whole(folder):
  """A run that nothing interrupted, its checkpoint and its log."""
  code, output = call("train", *flags(folder, "whole"))
  assert code == 0, output
  assert "Best epoch" in output and "experiments.evaluate" in output
  assert "compiling, kept for next time" in output.lower() and "epoch/s" not in output
  return final(folder / "whole"), (folder / "whole" / "metrics.jsonl").read_text()


def check_same(path, whole):
  chex.assert_trees_all_equal(final(path), whole[0])
  assert (path / "metrics.jsonl").read_text() == whole[1]
  assert [line["epoch"] for line in workdir.history(path)] == list(range(EPOCHS))


def wait_for_epochs(path, count, process):
  while len(workdir.history(path)) < count:
    assert process.poll() is None, process.communicate()[0]
    time.sleep(0.01)


def test_a_killed_run_goes_on_from_its_folder_alone_and_ends_with_the_same_bits(folder, whole):
  path = folder / "killed"
  process = start("train", *flags(folder, "killed", "--checkpoint_every=0"))
  wait_for_epochs(path, 2, process)
  process.send_signal(signal.SIGSTOP)
  assert len(workdir.history(path)) < EPOCHS
  assert "another process trains in" in refused("train", f"--workdir={path}")
  code, output = call("evaluate", f"--workdir={path}", "--rates=0.5", "--mask_seeds=1")
  assert code == 0 and "not finished (epoch" in output, output  # readers are not held up
  process.send_signal(signal.SIGKILL)
  process.communicate()
  code, output = call("train", f"--workdir={path}")
  assert code == 0, output
  check_same(path, whole)


def test_sigterm_saves_and_says_at_once_how_to_go_on(folder, whole):
  path = folder / "stopped"
  process = start("train", *flags(folder, "stopped"))
  wait_for_epochs(path, 2, process)
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 128 + signal.SIGTERM
  assert "Stopping after this stretch of steps; once more to abort at once." in output
  assert "The same command goes on" in output
  assert len(workdir.history(path)) < EPOCHS
  code, output = call("train", *flags(folder, "stopped"))
  assert code == 0, output
  check_same(path, whole)


def test_a_second_signal_aborts_whatever_the_program_does():
  """As while compiling: nothing of Python's own runs in the sleep."""
  code = (
    "import os, signal, time; from experiments import interrupts\n"
    "with interrupts.Watch():\n"
    "  os.kill(os.getpid(), signal.SIGINT); print('ready', flush=True)\n"
    "  time.sleep(60)\n"
  )
  command = [sys.executable, "-c", code]
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  ) as process:
    assert process.stdout is not None
    lines = [process.stdout.readline(), process.stdout.readline()]
    assert any("once more to abort" in line for line in lines)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 128 + signal.SIGINT


def test_a_folder_of_another_config_is_refused(folder, whole):
  code, output = call("train", *flags(folder, "whole", "--config.optimizer.learning_rate=0.5"))
  assert code == 1
  assert "config.optimizer.learning_rate: 0.001 there, 0.5 asked for" in output
  check_same(folder / "whole", whole)
  assert "config.seed: 0 there, 3 asked" in call("train", *flags(folder, "whole", "--seed=3"))[1]


def test_a_failed_start_leaves_nothing_and_what_has_not_begun_is_taken_over(folder):
  path = folder / "failed"
  for wrong, told in (
    ("--config.method.order=third", "order is 'third'"),
    ("--config.train.select=valid/acc9", "config.train.select=valid/acc9"),
    ("--config.train.select=mse", "of mae, corr"),
    ("--config.data.task=clasification", "task is 'clasification'"),
    ("--config.mask.axis=space", "axis is 'space'"),
    ("--config.phase_optimizer.mian.weight_decay=0", "has the phases main"),
  ):
    assert told in refused("train", *flags(folder, "failed", wrong))
    assert not path.exists()
  asked = {"config": {"seed": 1}, "data": "of others"}
  workdir.Workdir(path, asked, "elsewhere").close()
  workdir.check(path, {"config": {"seed": 2}})  # nothing was trained there
  (path / "metrics.jsonl").write_text('{"epoch": 0}\n')
  with pytest.raises(runs.RunError, match="config.seed: 1 there, 2 asked for"):
    workdir.check(path, {"config": {"seed": 2}})


def test_a_folder_of_the_old_format_is_refused(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"run": {"config": {}}, "data_dir": "data"}))
  (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\n')
  for binary in ("train", "evaluate"):
    assert "older format" in refused(binary, f"--workdir={tmp_path}")


def test_one_training_at_a_time_in_a_folder(tmp_path):
  asked = {"seed": 0}
  first = workdir.Workdir(tmp_path, asked, "data")
  with pytest.raises(runs.RunError, match="another process"):
    workdir.Workdir(tmp_path, asked, "data")
  first.close()
  workdir.Workdir(tmp_path, asked, "data").close()


def test_a_loss_that_is_not_finite_names_the_step_and_the_checkpoint(folder):
  code, output = call("train", *flags(folder, "nan", "--config.optimizer.learning_rate=1e30"))
  assert code == 1 and "is not finite in phase" in output and "checkpoint" in output


def test_an_oracle_is_labelled(folder):
  more = ("--config.train.select=test/mae", "--config.train.epochs=3")
  code, output = call("train", *flags(folder, "oracle", *more))
  assert code == 0 and "TEST ORACLE" in output and "test/corr" in output, output
  lines = workdir.history(folder / "oracle")
  best = json.loads((folder / "oracle" / "done.json").read_text())
  for metric, pick in (("mae", min), ("corr", max)):
    values = [line["test"][metric] for line in lines]
    assert best[f"test/{metric}"]["score"] == pytest.approx(pick(values), rel=1e-6)
    assert values[best[f"test/{metric}"]["epoch"]] == pick(values)
  output = call("evaluate", f"--workdir={folder / 'oracle'}", "--rates=0", "--mask_seeds=1")[1]
  assert "TEST ORACLE" in output


def test_evaluate_writes_table_and_curves(folder, whole):
  del whole
  code, output = call(
    "evaluate",
    f"--workdir={folder / 'whole'}",
    "--rates=0:0.9:0.3",
    "--mask_seeds=2",
    "--missing=l,av",
  )
  assert code == 0, output
  out = folder / "whole" / "robustness"
  runs = (out / "robustness_runs.csv").read_text().splitlines()
  assert len(runs) == 1 + (4 + 2) * 2
  assert (out / "robustness.png").stat().st_size > 5000
  assert "0.3" in (out / "robustness.md").read_text() and "±" in output
  assert "not finished" not in output
  for more, told in (("--mask=spam", "span"), ("--rates=a", "rates"), ("--missing=x", "'x'")):
    assert told in refused("evaluate", f"--workdir={folder / 'whole'}", more)
  nothing = folder / "nothing"
  assert "holds no training run" in refused("evaluate", f"--workdir={nothing}")
  assert not nothing.exists()


def test_a_trained_run_is_loaded_without_its_data(folder, whole):
  moved = shutil.copytree(folder / "whole", folder / "moved")
  spec = json.loads((moved / "config.json").read_text()) | {"data_dir": "gone"}
  (moved / "config.json").write_text(json.dumps(spec))
  run = mmjax.load(moved)
  best = whole[0]["best"]["valid/mae"]
  chex.assert_trees_all_equal(run.params, best["params"])
  done = json.loads((moved / "done.json").read_text())
  assert done["valid/mae"] == {"epoch": run.epoch, "score": run.score}
  # of an older version: training's command writes what is lacking, and trains nothing
  kept = (moved / "spec.json").read_text()
  (moved / "spec.json").unlink()
  asked = ("--pickle=a.pkl", f"--out={folder / 'a.csv'}")
  assert f"train --workdir={moved}" in refused("predict", f"--workdir={moved}", *asked)
  assert call("train", f"--workdir={moved}", f"--data_dir={folder / 'data'}")[0] == 0
  assert (moved / "spec.json").read_text() == kept
  chex.assert_trees_all_equal(final(moved), whole[0])


PARTS = """
import jax
import jax.numpy as jnp

from mmjax import masking, meta, types


def make(*, scale: float = 1.0):
  def init(key, spec):
    return {"head": {"w": scale * jax.random.normal(key, (spec.text.dim,))}}, {}

  def predict(params, batch, extra):
    feature = masking.observed(batch.text).mean(1)
    return {"prediction": feature @ params["head"]["w"], "feature": feature}

  def loss(params, batch, key, extra):
    error = predict(params, batch, extra)["prediction"] - batch.label
    return jnp.abs(error).mean(), types.Aux({}, extra)

  return types.System(init, predict, (types.Phase("main", loss),))


def blinks(rate=0.5, *, softer: float = 1.0):
  return masking.bernoulli(jnp.asarray(rate) * softer)


def patient(mask, *, weight: float = 1.0):
  return meta.METHODS["spl"](mask)._replace(title="Patient")
"""
CONFIG = """
from experiments.configs import common


def get_config(dataset="tiny"):
  config = common.get_config(dataset)
  config.model = dict(name="own_parts:make")
  config.mask = dict(name="own_parts:blinks", rate=(0.4, 0.6), softer=0.9, drop=())
  config.method = dict(name="own_parts:patient", weight=2.0)
  config.train.epochs, config.train.batch_size, config.train.patience = 2, 16, 0
  return config
"""


def test_own_model_mask_and_method_from_a_folder_of_ones_own(folder, tmp_path, monkeypatch):
  (tmp_path / "own_parts.py").write_text(PARTS)
  config = tmp_path / "own_config.py"
  config.write_text(CONFIG)
  data, run = f"--data_dir={folder / 'data'}", tmp_path / "run"
  for wrong, told in (
    ("--config.model.scal=2", "did you mean 'scale'"),
    ("--method=own_parts:patent", "module 'own_parts' has no 'patent'"),
    ("--method=own_part:patient", "is its folder in PYTHONPATH?"),
  ):
    monkeypatch.syspath_prepend(tmp_path)
    assert told in refused("train", f"--config={config}:tiny", data, f"--workdir={run}", wrong)
  code, output = call(
    "train", f"--config={config}:tiny", data, f"--workdir={run}", "--config.model.scale=0.5"
  )
  assert code == 0 and "Best epoch" in output, output
  code, output = call("evaluate", f"--workdir={run}", "--rates=0,0.8", "--mask_seeds=1")
  assert code == 0 and "±" not in output.split("Curves")[0], output
  # its trainings are processes of their own
  paths = (str(tmp_path), str(ROOT))
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
  code, output = call(
    "robustness",
    f"--configs={config}",
    "--dataset=tiny",
    data,
    f"--out={tmp_path / 'robust'}",
    "--mask=own_parts:blinks",
    "--method=own_parts:patient",
    "--seeds=7,",
    "--mask_seeds=1",
    "--shown=0,0.9",
  )
  assert code == 0 and "own_config, seed 7: Best epoch" in output, output
  page = (tmp_path / "robust" / "report.html").read_text(encoding="utf-8")
  assert "Patient, missing rate 0,1, own_parts:blinks masks, seeds 7" in page
