"""Checkpoints: what is saved comes back, and damage is told from what does not fit."""

import logging
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from mmjax import checkpoint, masking, meta, optim, train, types


def tree(value):
  """Arrays that are stored inside of the index, and one that has a file of its own."""
  best = train.Best(np.float32(value), np.int32(1), {"w": jnp.ones(3)}, {})
  large = jnp.asarray(np.random.default_rng(int(value)).random((64, 64), np.float32))
  return {"large": large, "small": jnp.arange(5), "best": {"valid/mae": best}}


def damages():
  def cut(folder):
    file = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

  def lose(name):
    return lambda folder: [file.unlink() for file in folder.rglob(name)]

  def empty(name):
    return lambda folder: [file.write_bytes(b"") for file in folder.rglob(name)]

  return {
    "cut short": cut,
    "no metadata": lose("_METADATA"),
    "no data": lambda folder: [shutil.rmtree(part) for part in folder.rglob("d")],
    "empty index": empty("manifest.ocdbt"),
    "empty metadata": empty("_METADATA"),
    "no item": lambda folder: shutil.rmtree(folder / "default"),
  }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """The steps 1 and 2."""
  folder = tmp_path_factory.mktemp("saved")
  steps = checkpoint.manager(folder)
  for step in (1, 2):
    checkpoint.save(steps, step, tree(step))
  steps.close()
  return folder


@pytest.fixture
def copied(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "copied")


def test_nothing_saved_is_none(tmp_path):
  assert checkpoint.restore(checkpoint.manager(tmp_path), tree(0)) is None


def test_the_newest_comes_back(saved):
  found = checkpoint.restore(checkpoint.manager(saved), tree(0))
  chex.assert_trees_all_equal(found, tree(2))


def test_a_part_is_read_without_the_rest(saved):
  part = {"best": {"valid/mae": {"score": np.float32(0), "params": {"w": jnp.zeros(3)}}}}
  found = checkpoint.restore(checkpoint.manager(saved), part, partial=True)
  chex.assert_trees_all_equal(
    found, {"best": {"valid/mae": {"score": np.float32(2), "params": {"w": jnp.ones(3)}}}}
  )


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_newest_one_is_told_and_passed_over(copied, caplog, damage):
  damages()[damage](copied / "2")
  steps = checkpoint.manager(copied)
  with caplog.at_level(logging.WARNING, logger="mmjax.checkpoint"):
    found = checkpoint.restore(steps, tree(0))
  chex.assert_trees_all_equal(found, tree(1))
  messages = [r.getMessage() for r in caplog.records if r.name == "mmjax.checkpoint"]
  assert "checkpoint 2" in messages[0] and "is damaged" in messages[0]
  assert messages[1].startswith("going on from checkpoint 1")
  checkpoint.save(steps, 2, tree(3))  # the run comes there again
  chex.assert_trees_all_equal(checkpoint.restore(steps, tree(0)), tree(3))


def test_a_reader_leaves_a_damaged_one_where_it_is(copied):
  damages()["cut short"](copied / "2")
  found = checkpoint.restore(checkpoint.manager(copied), {"large": tree(0)["large"]}, partial=True)
  chex.assert_trees_all_equal(found["large"], tree(1)["large"])
  assert (copied / "2").exists()


def test_all_damaged_is_an_error_that_says_so(copied):
  for step in "12":
    damages()["cut short"](copied / step)
  with pytest.raises(types.UsageError, match=r"all checkpoints in .* are damaged \(\[2, 1\]\)"):
    checkpoint.restore(checkpoint.manager(copied), tree(0))


@pytest.mark.parametrize(
  "other",
  [
    {"something": jnp.ones(3)},
    {**tree(0), "large": jnp.ones((3, 3))},
    {**tree(0), "more": jnp.ones(3)},
    {**tree(0), "best": {"test/mae": tree(0)["best"]["valid/mae"]}},
  ],
)
def test_what_does_not_fit_is_not_called_damaged(saved, other):
  with pytest.raises(types.UsageError, match="checkpoint 2 .* does not fit this model"):
    checkpoint.restore(checkpoint.manager(saved), other)
  assert (saved / "2").exists()


def test_a_run_ends_with_the_same_bits_after_damage(tmp_path):
  data, key = toy.make_batch(32), jax.random.key(5)
  plan = train.Recipe(
    system=toy.make_system(),
    method=meta.METHODS["spl"](masking.span(0.3)),
    optimizers={"main": optim.make(learning_rate=0.03)},
    batch_size=8,
    epochs=2,
  )
  evaluators = {"valid": lambda params, extra: {"mae": float(params["head"]["bias"])}}
  begin = lambda: train.start(plan, data, toy.SPEC, key)  # noqa: E731
  steps = checkpoint.manager(tmp_path)

  def pause(progress):
    checkpoint.save(steps, int(progress.state.step), progress)

  fit = lambda progress, **kwargs: list(  # noqa: E731
    train.fit(plan, data, evaluators, progress, key, seconds=0.0, **kwargs)
  )
  whole = fit(begin(), pause=pause)[-1].progress
  newest = steps.latest_step()
  damages()["cut short"](tmp_path / str(newest))
  progress = checkpoint.restore(steps, begin())
  assert int(progress.state.step) < newest
  chex.assert_trees_all_equal(fit(progress, pause=pause)[-1].progress, whole)
  assert steps.latest_step() == newest
