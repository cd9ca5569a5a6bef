"""One batch on many devices, and in several processes."""

import json
import os
import socket
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

import parallel_worker
from command import ROOT
from mmjax import parallel


@pytest.fixture(scope="module")
def alone():
  return parallel_worker.run(None)


def start(*args, devices=1):
  environment = {
    **os.environ,
    "JAX_NUM_CPU_DEVICES": str(devices),
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
  }
  command = [sys.executable, str(ROOT / "tests" / "parallel_worker.py"), *map(str, args)]
  return subprocess.Popen(
    command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


def finish(out, *processes):
  for process in processes:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
  return [json.loads((out / f"{n}.json").read_text()) for n in range(len(processes))]


def two_processes(out, *args):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  return finish(out, *(start(out, f"localhost:{port},2,{n}", *args) for n in range(2)))


def assert_same(found, alone):
  expected = jax.tree.map(np.asarray, alone[-1].progress.state.params)
  chex.assert_trees_all_close(
    jax.tree.map(np.float32, found["params"], is_leaf=lambda x: isinstance(x, list)),
    expected,
    rtol=1e-5,
    atol=1e-6,
  )
  for ours, theirs in zip(found["train"], alone, strict=True):
    np.testing.assert_allclose(ours["loss"], theirs.train["loss"], rtol=1e-5)


def test_eight_devices_learn_what_one_does(alone, tmp_path):
  (found,) = finish(tmp_path, start(tmp_path, devices=8))
  assert found["devices"] == 8 and found["sums_over_devices"]
  assert_same(found, alone)
  np.testing.assert_allclose(found["grid"], parallel_worker.predictions(), rtol=1e-6)
  both = found["lstm"], parallel_worker.lstm(None)
  lstms = [jax.tree.leaves(lstm["gradients"]) for lstm in both]
  for ours, theirs in zip(*lstms, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
  assert not found["lstm"]["waits"] and not found["moves_rows"]


@pytest.mark.slow
def test_two_processes_learn_what_one_does(alone, tmp_path):
  for found in two_processes(tmp_path):
    assert found["devices"] == 2
    assert_same(found, alone)


@pytest.mark.slow
def test_two_processes_read_a_part_of_the_files_each(tmp_path, convert):
  convert(tmp_path, "small", (32, 4, 4))
  found = two_processes(tmp_path, tmp_path)
  for n, result in enumerate(found):
    # 3 epochs x 2 draws: the whole part each time
    rows, counts = np.unique(result["seen"], return_counts=True)
    np.testing.assert_array_equal(rows, np.arange(16 * n, 16 * (n + 1)))
    assert (counts == 6).all()
    assert result["params"] == found[0]["params"]
    assert result["train"][-1]["loss"] < result["train"][0]["loss"]


def test_a_batch_that_cannot_be_shared_evenly_is_refused(monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda: list(range(3)))
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  with pytest.raises(ValueError, match="batch_size is 8.*divisible by the 3 devices"):
    parallel.make_mesh(8)


@pytest.mark.parametrize(
  "rows, devices, expected",
  [
    (32, 2, 1),
    (127, 2, 1),
    (128, 2, 2),
    (128, 8, 2),
    (192, 8, 3),
    (129, 2, 1),
    (640, 8, 8),
    (1, 1, 1),
  ],
)
def test_cores_share_a_batch_where_each_gets_enough_of_it(rows, devices, expected, monkeypatch):
  assert parallel.worthwhile(rows, devices) == expected
  monkeypatch.setattr(jax, "devices", lambda: list(range(devices)))
  mesh = parallel.make_mesh(rows)
  assert (mesh.size if mesh else 1) == expected
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert parallel.worthwhile(rows, devices) == devices


def test_xla_knows_what_a_gpus_programs_are_compiled_with(monkeypatch):
  assert parallel.jit(jax.numpy.sin, None)(0.0) == 0
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert parallel.jit(jax.numpy.cos, None)(0.0) == 1
  monkeypatch.setattr(parallel, "GPU_OPTIONS", {"xla_no_such_option": "x"})
  with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
    parallel.jit(jax.numpy.tan, None)(0.0)
