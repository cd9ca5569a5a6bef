"""Trackers of runs: TensorBoard, and the others where they are installed, offline."""

import os
import subprocess
import sys

import pytest

from command import ROOT, refused
from experiments import trackers, workdir
from mmjax import train

CONFIG = {"seed": 0, "model": {"name": "misa", "sizes": (1, 2)}}


def report(epoch):
  class State:
    step = epoch

  class Progress:
    state = State

  return train.EpochReport(
    epoch, {"loss": 1.0}, {"valid": {"mae": 0.5 / (epoch + 1)}}, (), Progress
  )


def test_a_run_that_goes_on_tells_what_it_told_before(tmp_path, monkeypatch):
  stories, told = [], []

  class Listener:
    def __init__(self, story):
      stories.append(story)

    def log(self, epoch, values):
      told.append((epoch, values))

    def close(self):
      told.append("closed")

  monkeypatch.setitem(trackers.TRACKERS, "own", Listener)
  asked = {"config": CONFIG}
  for finished, epochs in ((0, (0, 1, 2)), (1, (1, 2))):
    folder = workdir.Workdir(tmp_path, asked, "data", tracker="own")
    folder.rewind(finished)
    for epoch in epochs:
      folder.log(report(epoch))
    folder.close()
  assert [(story.epoch, story.told) for story in stories] == [(0, 0), (1, 3)]
  assert stories[0].config == CONFIG
  assert told[0] == (0, {"train/loss": 1.0, "valid/mae": 0.5}) and told[3] == "closed"
  assert [entry[0] for entry in told[4:6]] == [1, 2]


def track(name, path):
  """Three epochs, of which the last comes again after a kill; then one more."""
  for first, before, epochs in ((0, 0, (0, 1, 2)), (2, 3, (2, 3))):
    tracker = trackers.TRACKERS[name](trackers.Story(path, CONFIG, first, before))
    for epoch in epochs:
      tracker.log(epoch, {"valid/mae": 1.0 / (epoch + 1)})
    tracker.close()


def test_tensorboard_has_the_epochs(tmp_path):
  from tensorboardX.proto import event_pb2

  tracker = trackers.TRACKERS["tensorboard"](trackers.Story(tmp_path, CONFIG, 0, 0))
  for epoch in range(3):
    tracker.log(epoch, {"valid/mae": 2.0**-epoch})
  tracker.close()
  (file,) = (tmp_path / "tensorboard").glob("events*")
  content, found = file.read_bytes(), []
  while content:  # records: length, its checksum, an event, its checksum
    size = int.from_bytes(content[:8], "little")
    event = event_pb2.Event.FromString(content[12 : 12 + size])
    found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    content = content[16 + size :]
  assert found == [("valid/mae", epoch, 2.0**-epoch) for epoch in range(3)]


def test_mlflow_has_each_epoch_once(tmp_path, monkeypatch):
  mlflow = pytest.importorskip("mlflow")
  monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
  monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
  track("mlflow", tmp_path)
  run = (tmp_path / "mlflow.id").read_text().strip()
  client = mlflow.MlflowClient()
  history = client.get_metric_history(run, "valid/mae")
  assert [(m.step, m.value) for m in history] == [(n, 1.0 / (n + 1)) for n in range(4)]
  found = client.get_run(run)
  assert found.info.status == "FINISHED" and found.data.params["model.sizes"] == "(1, 2)"


def test_wandb_offline_goes_on_with_its_run(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  track("wandb", tmp_path)
  run = (tmp_path / "wandb.id").read_text().strip()
  folders = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run}*"))
  assert folders and all(list(folder.glob("*.wandb")) for folder in folders)


def test_a_tracker_that_is_not_there_is_told_before_any_work(tmp_path, monkeypatch):
  asked = ("--config=quickstart:tiny", f"--workdir={tmp_path / 'run'}")
  for name in ("wandb", "mlflow"):
    monkeypatch.setitem(sys.modules, name, None)
    told = refused("train", *asked, f"--tracker={name}")
    assert f"pip install 'mmjax[{name}]'" in told
  assert "--tracker" in refused("train", *asked, "--tracker=pigeon")
  assert not (tmp_path / "run").exists()


def test_no_tracker_is_imported_unless_it_is_asked_for():
  names = "('tensorboardX', 'wandb', 'mlflow')"
  code = f"import sys, experiments.train; print([m for m in {names} if m in sys.modules])"
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  found = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
  )
  assert found.stdout.strip() == "[]", found
