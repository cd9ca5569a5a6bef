"""Conversations: how ids tell them, how they are trained and tested with; and GCNet's network."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from command import call, refused
from mmjax import (
  conversations,
  data,
  evaluate,
  masking,
  meta,
  optim,
  sources,
  synthetic,
  train,
  types,
)
from mmjax.models import gcnet

KEY = jax.random.key(3)
LENGTHS = (3, 1, 2)  # of the conversations that `make_split` has


def make_split(lengths=LENGTHS, seed=0, width=2) -> types.Batch:
  """Utterances of some conversations, shuffled, in the columns of `conversations.group`."""
  random = np.random.default_rng(seed)
  rows = sum(lengths)

  def modality(length):
    valid = np.arange(length) < random.integers(1, length + 1, (rows, 1))
    x = random.normal(size=(rows, length, width)) * valid[..., None]
    return types.modality(x.astype(np.float32), valid)

  at = [(number, turn) for number, count in enumerate(lengths) for turn in range(count)]
  numbers, turns = np.array(at, np.int32)[random.permutation(rows)].T
  info = {"conversation": numbers, "turn": turns, "speaker": turns % 2}
  label = random.normal(size=rows).astype(np.float32)
  return types.Batch(
    modality(4), modality(5), modality(3), label, np.arange(rows, dtype=np.int32), info
  )


SPLIT = make_split()
TABLE = conversations.table(SPLIT)
TAKE = jax.jit(conversations.take)
SPEC = types.Spec(*(types.ModalitySpec(n, 2) for n in (4, 5, 3)), num_train=6)


# --- what ids tell


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("03bSnISJMiM$_$11", ("03bSnISJMiM", 11, "")),
    ("-3g5yACwYnA$_$82.75$_$100.5", ("-3g5yACwYnA", 82.75, "")),
    ("video_0001$_$0012", ("video_0001", 12, "")),
    ("_dI--eQ6qVU_7", ("_dI--eQ6qVU", 7, "")),
    ("03bSnISJMiM[2]", ("03bSnISJMiM", 2, "")),
    ("aqgy3_0001/00005", ("aqgy3_0001", 5, "")),
    ("dia12_utt3", ("dia12", 3, "")),
    ("Ses01F_impro01_M003", ("Ses01F_impro01", 3, "M")),
    ("Ses01F_script01_1_F010", ("Ses01F_script01_1", 10, "F")),
    ("train_5", None),  # given to what has no ids
    ("17", None),
    ("a$_$b", None),
  ],
)
def test_ids_tell_video_clip_and_speaker(name, expected):
  assert conversations.parse(name) == expected


@pytest.fixture(scope="module")
def dataset():
  arrays = synthetic.make_arrays(seed=0, num_train=7, num_valid=3, num_test=3)
  return data.from_arrays(arrays, name="synthetic")


def named(dataset, train, *others):
  valid, test = others or (["w_1", "w_2", "x_1"], ["y_1", "y_2", "z_1"])
  return dataset._replace(ids={"train": train, "valid": valid, "test": test})


def test_utterances_are_grouped_by_video_in_the_order_of_clips(dataset):
  ids = ["b_10", "a_2", "b_9", "a_11", "c_0", "b_1", "a_1"]
  grouped = conversations.group(named(dataset, ids))
  assert conversations.table(grouped.train).tolist() == [[5, 2, 0], [6, 1, 3], [4, -1, -1]]
  assert grouped.train.info["speaker"].tolist() == [0] * 7
  without = {k: v for k, v in grouped.train.info.items() if k not in conversations.COLUMNS}
  chex.assert_trees_all_equal(grouped.train._replace(info=without), dataset.train)


def test_speakers_are_numbered_over_the_dataset(dataset):
  ids = [
    f"Ses01F_impro01_{who}" for who in ("F000", "M000", "F001", "M001", "F002", "M002", "M003")
  ]
  info = conversations.group(named(dataset, ids)).train.info
  assert info["speaker"].tolist() == [0, 1, 0, 1, 0, 1, 1]
  assert info["turn"].tolist() == [0, 1, 2, 3, 4, 5, 6]  # the same clip: by row


@pytest.mark.parametrize(
  ("ids", "count"),
  [
    ([["a_1", "a_2", "b_1", "b_2", "c_1", "?", "!"]], 2),
    ([[f"one_{n}" for n in part] for part in (range(7), range(7, 10), range(10, 13))], 13),
  ],
)
def test_ids_without_a_video_are_conversations_of_their_own(dataset, ids, count):
  with pytest.warns(UserWarning, match=f"{count} of 13 ids hold no video"):
    grouped = conversations.group(named(dataset, *ids))
  alone = conversations.table(grouped.train)[-2:]
  assert (alone >= 0).sum(1).tolist() == [1, 1]


# --- batches, sources, grids


def test_a_batch_has_whole_conversations_and_blank_padding():
  batch = TAKE(SPLIT, TABLE[[2, 0]])
  rows = np.concatenate([TABLE[2], TABLE[0]])
  real = rows >= 0
  assert real.tolist() == [True, True, False, True, True, True]
  np.testing.assert_array_equal(types.places(batch), np.tile(np.eye(3), (2, 1)) * real[:, None])
  np.testing.assert_array_equal(batch.index, np.where(real, rows, 6))
  for name in types.MODALITIES:
    ours, theirs = getattr(batch, name), getattr(SPLIT, name)
    np.testing.assert_array_equal(ours.x[real], theirs.x[rows[real]])
    np.testing.assert_array_equal(ours.valid[real], theirs.valid[rows[real]])
    assert not ours.x[~real].any() and not ours.valid[~real].any()
  assert batch.info.keys() == {"speaker", "place"}
  np.testing.assert_array_equal(types.places(SPLIT), np.ones((6, 1)))


def init(key, spec):
  del spec
  return {"w": jax.random.normal(key, (2,)), "b": jnp.zeros(())}, {}


def predict(params, batch, extra):
  """Reads an utterance, and the mean of its conversation; "seen" counts observed steps."""
  del extra
  place = types.places(batch)
  rows, length = place.shape
  modalities = [getattr(batch, name) for name in types.MODALITIES]
  own = sum(masking.observed(m).sum(1) for m in modalities) @ params["w"]
  count = jnp.maximum(place.any(-1).reshape(-1, length).sum(1), 1)
  mean = own.reshape(-1, length).sum(1) / count.astype(own.dtype)
  seen = jnp.stack([m.seen.reshape(rows, -1).sum(1) for m in modalities], 1)
  return {"prediction": own + jnp.repeat(mean, length) + params["b"], "seen": seen}


def loss(params, batch, key, extra):
  del key
  real = types.places(batch).any(-1)
  error = jnp.where(real, predict(params, batch, extra)["prediction"] - batch.label, 0)
  count = real.sum().astype(error.dtype)
  value = (error**2).sum() / count
  return value, types.Aux({"mse": value, "real": count}, extra)


SYSTEM = types.System(init, predict, (types.Phase("main", loss),), conversations=True)


def test_predictions_stand_where_their_utterances_do():
  params, conditions = init(KEY, SPEC)[0], evaluate.parse_rates("0,0.5")
  grid = evaluate.make_grid(SYSTEM, SPLIT, conditions, [0, 1])
  found = grid(params, {})
  x = sum((getattr(SPLIT, name).x).sum(1) for name in types.MODALITIES) @ params["w"]
  means = np.array([x[TABLE[n][TABLE[n] >= 0]].mean() for n in range(3)])
  expected = x + means[SPLIT.info["conversation"]]
  np.testing.assert_allclose(found[0], [expected, expected], rtol=1e-5)
  for size in (1, 6):  # one conversation at a time, and two
    again = evaluate.make_grid(SYSTEM, SPLIT, conditions, [0, 1], batch_size=size)(params, {})
    np.testing.assert_allclose(again, found, rtol=1e-5)


def test_utterances_are_tested_under_the_very_masks_of_every_other_system():
  plain = SPLIT._replace(info={})
  for factory in (masking.span, masking.family("gcnet")):
    conditions = evaluate.parse_rates("0.3,0.6", mask=factory)
    ours, theirs = (
      evaluate.make_grid(SYSTEM, split, conditions, [0, 1], output="seen")(
        {"w": jnp.ones(2), "b": 0.0}, {}
      )
      for split in (SPLIT, plain)
    )
    np.testing.assert_array_equal(ours, theirs)
    assert len(np.unique(ours)) > 1


def recipe(method, batch_size=2, **kwargs):
  optimizers = {"main": optim.make(name="sgd", learning_rate=0.05)}
  made = meta.METHODS[method](masking.bernoulli(0.3), **kwargs)
  return train.Recipe(SYSTEM, made, optimizers, batch_size, epochs=2)


def fit(plan, keys=KEY, **kwargs):
  validate = evaluate.make_validator(SYSTEM, SPLIT, SPEC, evaluate.rate_condition(0.3))
  one = not isinstance(keys, list)
  start = lambda key: train.start(plan, SPLIT, SPEC, key)  # noqa: E731
  progress = start(keys) if one else [start(key) for key in keys]
  evaluators = {"valid": validate} if one else [{"valid": validate}] * len(keys)
  return list(train.fit(plan, SPLIT, evaluators, progress, keys, **kwargs))


@pytest.mark.parametrize("method", ["orig", "spl", "m3s"])
def test_an_epoch_passes_each_conversation_once(method):
  assert sources.as_source(SPLIT).rows == 3
  together = fit(recipe(method, batch_size=1), seconds=1e3)
  assert int(together[-1].progress.state.step) == 2 * 3
  # every batch is one conversation: the mean over an epoch is that of all utterances
  assert together[0].train["real"] == pytest.approx(2)
  apart = fit(recipe(method, batch_size=1), seconds=0.0)
  chex.assert_trees_all_equal(apart[-1].progress, together[-1].progress)


def test_conversations_train_side_by_side():
  keys = [KEY, jax.random.key(8)]
  for reports, alone in zip(fit(recipe("m3s"), keys), fit(recipe("m3s"), keys[1]), strict=True):
    assert reports[1] is not None
    np.testing.assert_allclose(reports[1].train["loss"], alone.train["loss"], rtol=1e-4)


def test_support_and_query_sets_are_made_of_whole_conversations():
  batch = conversations.take(
    make_split((2, 1, 2, 2)), conversations.table(make_split((2, 1, 2, 2)))
  )
  for settings, sizes in (
    (dict(), (4, 4)),
    (dict(support_rows=1), (2, 6)),
    (dict(tasks=2), (4, 4)),
  ):
    support, query = meta.split_support_query(batch, **settings)
    assert (support.index.shape[0], query.index.shape[0]) == sizes
    for part in (support, query):
      place = np.asarray(types.places(part)).reshape(-1, 2, 2)
      assert all((one == np.eye(2) * one.any(-1)[:, None]).all() for one in place)
  with pytest.raises(types.UsageError, match="rows=4"):
    meta.split_support_query(batch, support_rows=4)


# --- the network


@pytest.fixture(scope="module")
def network():
  system = gcnet.make(hidden_size=2, speakers=2, time_attention=True)
  return system.init(jax.random.key(0, impl="unsafe_rbg"), SPEC)[0]


def test_neighbours_are_heard_within_the_windows_and_none_beyond_the_conversation():
  real = np.array([[True] * 4, [True, True, False, False]])
  edge = np.asarray(gcnet.edges(real, (1, 2)))  # receivers before senders
  assert edge[0].astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1]]
  assert edge[1].sum() == 4 and not edge[1, 2:].any() and not edge[1, :, 2:].any()
  assert np.asarray(gcnet.edges(real, (-1, -1)))[0].all()
  relation, count = gcnet.speaker_relations(np.array([[0, 1]]), 2)
  assert np.asarray(relation).tolist() == [[[0, 1], [2, 3]]] and count == 4


@pytest.fixture(scope="module")
def predicted(network):
  """`predicted(split, table, pack)`: the predictions of conversations."""

  def of(network, split, table, pack):
    system = gcnet.make(hidden_size=2, speakers=2, time_attention=True, pack=pack)
    return system.predict(network, conversations.take(split, table), {})["prediction"]

  program = jax.jit(of, static_argnums=3)
  return lambda split, table, pack=False: np.asarray(program(network, split, table, pack))


def test_only_an_unpacked_recurrence_reads_how_long_others_are(predicted):
  for pack in (True, False):
    beside = predicted(SPLIT, TABLE, pack)[6:8]
    assert np.allclose(beside, predicted(SPLIT, TABLE[2:, :2], pack), atol=1e-6) is pack


def test_an_utterance_hears_of_its_own_conversation_alone(predicted):
  before, rows = predicted(SPLIT, TABLE), TABLE.ravel()
  for row in (0, 3):
    x = SPLIT.audio.x.copy()
    x[row, 0] += 1
    changed = predicted(SPLIT._replace(audio=SPLIT.audio._replace(x=x)), TABLE) != before
    number = SPLIT.info["conversation"]
    np.testing.assert_array_equal(changed[rows >= 0], (number == number[row])[rows[rows >= 0]])


def test_a_vector_is_the_mean_of_what_is_observed():
  x = jnp.arange(8.0).reshape(1, 4, 2)
  valid = jnp.array([[True, True, True, False]])
  seen = jnp.array([[[True], [False], [True], [True]]])
  m = types.modality(x, valid, seen)
  batch = types.Batch(m, m, m, jnp.zeros(1), jnp.zeros(1, jnp.int32), {})
  found = gcnet.Utterances(gcnet.Gcnet().bert.config).apply({}, batch)
  np.testing.assert_allclose(found["text"], [[2.0, 3.0]])
  np.testing.assert_allclose(gcnet.missing_share(m), [[1 / 3]])
  channels = types.modality(x, valid, jnp.array([[[True, False]]]))
  np.testing.assert_allclose(gcnet.missing_share(channels), [[0.0, 1.0]])
  nothing = types.modality(x, jnp.zeros((1, 4), bool), seen)
  assert not np.asarray(gcnet.missing_share(nothing)).any()


def test_the_published_reconstruction_counts_other_rows_than_the_one_that_was_meant():
  """Conversations of 2 and 1: by turns, the code gives the places 0 0, 1 0, 0 1, 1 1 the weights
  of 0 0, 0 1, 1 0, 1 1."""
  place = np.zeros((4, 2), bool)
  place[[0, 1, 2], [0, 1, 0]] = True
  batch = types.Batch(
    *[types.modality(jnp.zeros((4, 1, 1)))] * 3,
    jnp.zeros(4),
    jnp.arange(4),
    {"place": jnp.asarray(place)},
  )
  out = {
    "prediction": jnp.array([1.0, 2.0, 3.0, 9.0]),
    "reconstruction": jnp.array([[1.0], [2.0], [4.0], [8.0]]),
    "target": jnp.zeros((4, 1)),
    "missing": jnp.array([[1.0], [0.0], [0.5], [1.0]]),
  }
  meant = gcnet.loss_parts(out, batch, aligned=True)
  assert float(meant["task"]) == pytest.approx((1 + 4 + 9) / 3)
  assert float(meant["recon"]) == pytest.approx((1 + 0 + 8) / 3)
  longer = jnp.asarray(np.eye(2, dtype=bool)[[0, 1, 0, 1]] & np.array([1, 0, 1, 1], bool)[:, None])
  batch = batch._replace(info={"place": longer})  # conversations of 1 (its first place) and 2
  published = gcnet.loss_parts(out, batch, aligned=False)
  # by turns: errors 1, 8, 0, 64 under weights 1, 0, 1, 1
  assert float(published["recon"]) == pytest.approx((1 + 0 + 64) / 3)
  assert float(gcnet.loss_parts(out, batch, aligned=True)["recon"]) == pytest.approx(
    (1 + 8 + 64) / 3
  )


@pytest.mark.parametrize("settings", [dict(windows=(-2, 1)), dict(speakers=0), dict(hidden_size=1)])
def test_settings_that_cannot_be_are_refused(settings):
  with pytest.raises(ValueError, match=next(iter(settings))):
    gcnet.make(**settings)


# --- the binaries


def test_a_user_trains_and_tests_it(folder, tiny):
  flags = (f"--data_dir={tiny}", "--config.model.hidden_size=2")
  more = ("--method=spl", "--config.train.epochs=2", "--config.train.batch_size=2")
  code, output = call(
    "train", "--config=gcnet:tiny", *flags, *more, f"--workdir={folder / 'gcnet'}"
  )
  assert code == 0, output
  code, output = call("evaluate", f"--workdir={folder / 'gcnet'}", "--rates=0.5", "--mask_seeds=1")
  assert code == 0 and "0.5" in output, output
  line = refused(
    "train",
    "--config=gcnet:tiny",
    *flags,
    "--config.data.stream=True",
    f"--workdir={folder / 'no'}",
  )
  assert "conversations cannot be streamed" in line and not (folder / "no").exists()
