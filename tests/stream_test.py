"""Training splits that stay on disk."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from mmjax import data, masking, meta, optim, records, sources, stream, train, types

KEY = jax.random.key(3)
ROWS = 26


@pytest.fixture(scope="module")
def folder(convert, tmp_path_factory):
  """The same rows in both formats."""
  folder = tmp_path_factory.mktemp("stream")
  convert(folder, "small", (ROWS, 4, 4), seed=2)
  convert(folder, "records", (ROWS, 4, 4), seed=2, file_format="array_record")
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


@pytest.mark.parametrize(
  "options", [{}, dict(text="tokens", task="classification"), dict(task="binary")]
)
def test_options_mean_what_they_mean_in_memory(folder, options):
  ours, theirs = (load(folder, "small", **options) for load in (stream.open_dataset, data.load))
  assert (ours.spec, ours.ids, ours.name) == (theirs.spec, theirs.ids, theirs.name)
  chex.assert_trees_all_equal(ours[1:3], theirs[1:3])
  chex.assert_trees_all_equal(ours.train.example, data.take(theirs.train, slice(1)))
  chex.assert_trees_all_equal(ours.train.read(), theirs.train)
  assert ours.train.buffer == 1024 and ours.train.rows == ROWS


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


def test_array_records_come_in_the_order_of_memory(folder, in_memory, monkeypatch):
  found = stream.open_dataset(folder, "records", standardize=True)
  assert found.spec == in_memory.spec and found.ids == in_memory.ids
  order = np.asarray(sources.orders(KEY, ROWS, 2))[:, :24].reshape(2, 6, 4).swapaxes(0, 1)
  for drawn, rows in zip(found.train.batches(KEY, 4, 2, skip=1), order[1:], strict=True):
    for batch, index in zip(drawn, rows, strict=True):
      np.testing.assert_array_equal(batch.index, index)
      expected = data.take(in_memory.train, index)
      chex.assert_trees_all_close(batch, expected, rtol=1e-5, atol=1e-6)
      chex.assert_trees_all_equal_dtypes(batch, expected)
  # each of several processes reads its part of each batch
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  np.testing.assert_array_equal(indices(found.train, draws=2), order[..., 2:])


def test_other_formats_are_refused_before_anything_is_read(folder, monkeypatch):
  monkeypatch.setattr(records, "FORMATS", {"array_record": None})
  monkeypatch.setattr(data, "read_arrays", None)
  with pytest.raises(data.DataError, match="small is stored as tfrecord.*array_record"):
    stream.open_dataset(folder, "small")


def test_files_are_read_across_their_borders(streamed, tmp_path, folder):
  """Several files of different lengths, as TensorFlow Datasets cuts large ones."""
  tfds = data.import_tfds()
  rows = data.read_columns(streamed.train.builder, "train")
  builder = tfds.dataset_builders.AdhocBuilder(
    name="cut",
    version="1.0.0",
    features=streamed.train.builder.info.features,
    split_datasets={"train": ((n, {k: v[n] for k, v in rows.items()}) for n in range(ROWS))},
    data_dir=str(tmp_path),
    disable_shuffling=True,
  )
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(num_shards=3), file_format="tfrecord"
  )
  assert len(builder.info.splits["train"].shard_lengths) == 3
  cut = streamed.train._replace(builder=builder)
  batches = [s.batches(KEY, batch_size=4, draws=1) for s in (cut, streamed.train)]
  for (ours,), (theirs,) in zip(*batches, strict=True):
    chex.assert_trees_all_equal(ours, theirs)


def test_the_whole_split_can_be_read(streamed, in_memory):
  found = streamed.train.read()
  chex.assert_trees_all_close(found, in_memory.train, rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_equal_dtypes(found, in_memory.train)


class Killed(Exception):
  pass


@pytest.fixture(scope="module")
def recipe(streamed):
  return train.Recipe(
    system=toy.make_system()._replace(init=toy.init_for(streamed.spec)),
    method=meta.METHODS["m3s"](
      masking.span((0.0, 0.5)), optimizer=dict(name="sgd", learning_rate=0.01)
    ),
    optimizers={"main": optim.make(learning_rate=0.03)},
    batch_size=4,
    epochs=3,
  )


def test_training_learns_and_goes_on_bit_for_bit_where_it_stopped(streamed, recipe, monkeypatch):
  def validate(params, extra):
    error = toy.predict(params, streamed.valid, extra)["prediction"] - streamed.valid.label
    return {"mae": float(np.abs(error).mean())}

  def run(progress=None, **kwargs):
    progress = progress or train.start(recipe, streamed.train, streamed.spec, KEY)
    evaluators = {"valid": validate}
    return list(train.fit(recipe, streamed.train, evaluators, progress, KEY, **kwargs))

  whole = run()
  assert whole[-1].train["loss"] < 0.8 * whole[0].train["loss"]
  assert int(whole[-1].progress.state.step) == 3 * (ROWS // 4)
  caught = []

  def pause(progress):
    if int(progress.state.step) == 8:  # in the second epoch
      caught.append(jax.tree.map(np.asarray, progress))
      raise Killed

  passes, batches = [], stream.Stream.batches

  def counted(self, *args, **kwargs):
    passes.append(args[3])
    return batches(self, *args, **kwargs)

  monkeypatch.setattr(stream.Stream, "batches", counted)
  with pytest.raises(Killed):
    run(seconds=0.0, pause=pause)
  assert passes == [0] * 2  # each epoch is entered once, wherever it pauses
  assert int(caught[0].done) == 8 - ROWS // 4
  chex.assert_trees_all_equal(run(caught[0])[-1].progress, whole[-1].progress)


def test_streams_of_several_runs_side_by_side(streamed, recipe):
  """Each run reads in the order of its own key."""
  keys, plan = [KEY, jax.random.key(9)], recipe._replace(epochs=1)
  evaluators = {"valid": lambda params, extra: {"mae": 1.0}}
  start = lambda key: train.start(plan, streamed.train, streamed.spec, key)  # noqa: E731
  arguments = ([evaluators] * 2, [start(key) for key in keys], keys)
  (together,) = train.fit(plan, streamed.train, *arguments)
  for report, key in zip(together, keys, strict=True):
    begin = start(key)
    (alone,) = train.fit(plan, streamed.train, evaluators, begin, key)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(begin.state))  # used again
    chex.assert_trees_all_close(
      report.progress.state.params, alone.progress.state.params, rtol=1e-4, atol=1e-6
    )


def test_a_step_that_is_not_finite_stops_a_stream(streamed, recipe):
  def loss(params, batch, key, extra):
    value, aux = toy.loss(params, batch, key, extra)
    return jnp.where(extra["calls"] == 3, jnp.nan, value), aux

  system = recipe.system._replace(phases=(types.Phase("main", loss),))
  plan = recipe._replace(system=system)
  progress = train.start(plan, streamed.train, streamed.spec, KEY)
  evaluators = {"valid": lambda params, extra: {"mae": 1.0}}
  with pytest.raises(train.NonFiniteLoss, match="step 3"):
    list(train.fit(plan, streamed.train, evaluators, progress, KEY))
