"""Training splits that stay on disk."""

import functools

import chex
import jax
import numpy as np
import optax
import pytest

import toy
from data_prep import convert
from mmjax import data, masking, meta, optim, stream, synthetic, train

KEY = jax.random.key(3)
ROWS = 26


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("stream")
  arrays = synthetic.make_arrays(seed=2, num_train=ROWS, num_valid=4, num_test=4)
  synthetic.write_pickle(folder / "a.pkl", arrays)
  convert.convert(folder / "a.pkl", "small", folder)
  return folder


@pytest.fixture(scope="module")
def streamed(folder):
  return stream.open_dataset(folder, "small", standardize=True, buffer=6)


@pytest.fixture(scope="module")
def in_memory(folder):
  return data.load(folder, "small", standardize=True)


def indices(source, key=KEY, draws=1, **kwargs):
  batches = source.batches(key, batch_size=4, draws=draws, **kwargs)
  return np.array([[drawn.index for drawn in step] for step in batches])  # [steps, draws, B]


def test_a_streamed_dataset_describes_itself_as_one_in_memory(streamed, in_memory):
  assert streamed.spec == in_memory.spec and streamed.ids == in_memory.ids
  chex.assert_trees_all_close(streamed.valid, in_memory.valid, rtol=1e-5, atol=1e-6)


def test_rows_are_those_of_the_dataset(streamed, in_memory):
  for drawn in streamed.train.batches(KEY, batch_size=4, draws=2):
    for batch in drawn:
      expected = data.take(in_memory.train, batch.index)
      chex.assert_trees_all_close(batch, expected, rtol=1e-5, atol=1e-6)
      chex.assert_trees_all_equal_dtypes(batch, expected)


def test_an_epoch_passes_each_row_once_for_every_draw(streamed):
  found = indices(streamed.train, draws=2)
  assert found.shape == (ROWS // 4, 2, 4)
  for n in range(2):
    assert len(np.unique(found[:, n])) == found[:, n].size
  assert not np.array_equal(found[:, 0], found[:, 1])


def test_the_order_is_a_function_of_the_key_and_can_be_entered_anywhere(streamed):
  found = indices(streamed.train)
  np.testing.assert_array_equal(indices(streamed.train), found)
  np.testing.assert_array_equal(indices(streamed.train, skip=2), found[2:])
  assert not np.array_equal(indices(streamed.train, jax.random.key(4)), found)
  assert not np.array_equal(np.diff(found.ravel()) % ROWS, np.ones(found.size - 1))  # shuffled


def test_each_of_several_processes_reads_rows_of_its_own(streamed, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  parts = []
  for n in range(2):
    monkeypatch.setattr(jax, "process_index", lambda n=n: n)
    parts.append(indices(streamed.train))
  assert parts[0].shape == (ROWS // 4, 1, 2)  # half of each batch
  assert parts[0].max() < ROWS // 2 <= parts[1].min()


class Killed(Exception):
  pass


@pytest.mark.usefixtures("quick_compilation")
def test_training_learns_and_goes_on_bit_for_bit_where_it_stopped(streamed):
  mask = masking.span((0.0, 0.5))
  recipe = train.Recipe(
    system=toy.make_system()._replace(init=toy.init_for(streamed.spec)),
    method=lambda key: functools.partial(meta.m3s, mask=mask, inner_optimizer=optax.sgd(0.01)),
    optimizers={"main": optim.make(learning_rate=0.03)},
    batch_size=4,
    draws=2,
    epochs=3,
  )

  def validate(params, extra):
    error = toy.predict(params, streamed.valid, extra)["prediction"] - streamed.valid.label
    return {"mae": float(np.abs(error).mean())}

  def run(progress=None, **kwargs):
    progress = progress or train.start(recipe, streamed.train, streamed.spec, KEY)
    return list(train.fit(recipe, streamed.train, validate, progress, KEY, **kwargs))

  whole = run()
  assert whole[-1].train["loss"] < 0.8 * whole[0].train["loss"]
  caught = []

  def pause(progress):
    if int(progress.state.step) == 8:  # in the second epoch
      caught.append(jax.tree.map(np.asarray, progress))
      raise Killed

  with pytest.raises(Killed):
    run(seconds=0.0, pause=pause)
  assert int(caught[0].done) == 8 - ROWS // 4
  chex.assert_trees_all_equal(run(caught[0])[-1].progress, whole[-1].progress)


def test_only_tfrecords_stream(tmp_path, folder):
  convert.convert(folder / "a.pkl", "other", tmp_path, file_format="array_record")
  with pytest.raises(data.DataError, match="--file_format=tfrecord"):
    stream.open_dataset(tmp_path, "other")
