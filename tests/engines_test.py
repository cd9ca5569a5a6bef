"""Trainings beside each other: on processes, and on a Ray cluster whose nodes die."""

import importlib.util
import subprocess
import sys
import time

import chex
import pytest

from command import ROOT, call, final, refused, start
from experiments import workdir

EPOCHS = 20


def compare(folder, out):
  return (
    f"--config={ROOT / 'tests' / 'toy_config.py'}:tiny",
    "--config.model.name=toy:make_lingering",
    "--config.train.batch_size=8",
    f"--config.train.epochs={EPOCHS}",
    f"--data_dir={folder / 'data'}",
    f"--out={out}",
    "--methods=m3s",
    "--mask_seeds=1",
    "--seeds=2",
  )


def wait_for_epochs(path, count, process):
  end = time.monotonic() + 300
  while len(workdir.history(path)) < count:
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < end
    time.sleep(0.02)


def test_an_engine_that_is_not_there_is_refused(folder, monkeypatch):
  base = compare(folder, folder / "refused")
  if importlib.util.find_spec("ray"):
    told = refused("compare", *base, "--engine=ray", "--schedule=together")
    assert "one program on one machine" in told
  there = importlib.util.find_spec
  gone = lambda name, *args: None if name == "ray" else there(name, *args)  # noqa: E731
  monkeypatch.setattr(importlib.util, "find_spec", gone)
  assert "pip install 'mmjax[cluster]'" in refused("compare", *base, "--engine=ray")
  assert not (folder / "refused").exists()


@pytest.mark.slow
def test_a_training_ends_with_its_study(folder):
  """Killed, so that it can tell nobody."""
  out = folder / "orphans"
  study = start("compare", *compare(folder, out), "--schedule=processes", "--processes=1")
  path = out / "m3s-0.4,0.6" / "seed-0"
  wait_for_epochs(path, 1, study)
  study.kill()
  study.communicate()
  began = time.monotonic()
  workdir.wait(path, 30)
  assert time.monotonic() - began < 20
  assert not workdir.is_done(path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra cluster")
def test_runs_go_on_when_a_node_of_the_cluster_dies(folder):
  """Two nodes, one of which dies: each run finishes once, with an undisturbed run's bits."""
  undisturbed, out = folder / "undisturbed", folder / "disturbed"
  code, output = call(
    "compare", *compare(folder, undisturbed), "--schedule=processes", "--processes=2"
  )
  assert code == 0, output
  script = (
    "import sys, time\n"
    "from ray.cluster_utils import Cluster\n"
    "cluster = Cluster(initialize_head=True, head_node_args={'num_cpus': 0})\n"
    "nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]\n"
    "print(cluster.address, flush=True)\n"
    "for line in sys.stdin:\n"
    "  cluster.remove_node(nodes.pop(), allow_graceful=False)\n"
    "  print('dead', flush=True)\n"
    "cluster.shutdown()\n"
  )
  with subprocess.Popen(
    [sys.executable, "-W", "ignore", "-c", script],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  ) as cluster:
    assert cluster.stdin is not None and cluster.stdout is not None
    address = cluster.stdout.readline().strip()
    study = start("compare", *compare(folder, out), "--engine=ray", f"--ray_address={address}")
    paths = [out / "m3s-0.4,0.6" / f"seed-{seed}" for seed in range(2)]
    for path in paths:
      wait_for_epochs(path, 1, study)
    cluster.stdin.write("\n")
    cluster.stdin.flush()
    assert cluster.stdout.readline() == "dead\n"
    assert not any(workdir.is_done(path) for path in paths)  # both were in the middle
    output, _ = study.communicate(timeout=500)
    cluster.stdin.close()
  assert study.returncode == 0, output
  for seed, path in enumerate(paths):
    assert output.count(f"seed {seed}: Best epoch") == 1
    whole = undisturbed / "m3s-0.4,0.6" / f"seed-{seed}"
    chex.assert_trees_all_equal(final(path), final(whole))
    assert (path / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
