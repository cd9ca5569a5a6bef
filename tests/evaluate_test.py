import functools

import jax
import numpy as np
import pytest

import toy
from mmjax import data, evaluate, masking, types

SPLIT = toy.make_batch(10, seed=3)
PARAMS, EXTRA = toy.init(jax.random.key(0), toy.SPEC)
CONDITIONS = evaluate.parse_rates("0,0.5") + [evaluate.missing_condition("la")]


def predictions(split=SPLIT, conditions=CONDITIONS, seeds=(0, 1), **kwargs):
  grid = evaluate.make_grid(toy.make_system(), split, conditions, seeds, **kwargs)
  return grid(PARAMS, EXTRA)


@pytest.fixture(scope="module")
def expected():
  return predictions()


def test_complete_data_give_the_plain_predictions(expected):
  plain = toy.predict(PARAMS, SPLIT, EXTRA)["prediction"]
  np.testing.assert_allclose(expected[0], np.stack([plain, plain]), rtol=1e-5)
  assert expected.shape == (3, 2, 10)


def test_masks_depend_on_condition_seed_and_sample_alone(expected):
  assert (expected[1, 0] != expected[1, 1]).any()
  np.testing.assert_array_equal(expected[2, 0], expected[2, 1])  # nothing random is left
  np.testing.assert_allclose(predictions(batch_size=3), expected, rtol=1e-5)
  reversed_ = predictions(conditions=CONDITIONS[::-1], seeds=(1, 0))
  np.testing.assert_allclose(reversed_[::-1, ::-1], expected, rtol=1e-5)
  order = np.random.default_rng(0).permutation(10)
  shuffled = predictions(split=jax.tree.map(lambda a: a[order], SPLIT))
  np.testing.assert_allclose(shuffled, expected[:, :, order], rtol=1e-5)


def test_what_is_missing_cannot_change_a_prediction(expected):

  def poison(m, value):
    return m._replace(x=np.where(m.valid[..., None], np.float32(value), m.x))

  poisoned = SPLIT._replace(text=poison(SPLIT.text, np.nan), audio=poison(SPLIT.audio, 1e9))
  found = predictions(split=poisoned)
  np.testing.assert_array_equal(found[2], expected[2])
  assert np.isnan(found[0]).all()


def test_a_grid_is_traced_once():
  traces = []

  def mask(rate):
    traces.append(isinstance(rate, jax.core.Tracer))  # not when a condition is made
    return masking.bernoulli(rate)

  conditions = evaluate.parse_rates("0.1,0.4", mask=mask)
  conditions.append(evaluate.missing_condition("a", mask=mask))
  grid = evaluate.make_grid(toy.make_system(), SPLIT, conditions, [0, 1], batch_size=4)
  doubled = {**PARAMS, "head": jax.tree.map(lambda p: 2 * p, PARAMS["head"])}
  first = grid(PARAMS, EXTRA)
  np.testing.assert_allclose(grid(doubled, EXTRA), 2 * first, rtol=1e-5)
  assert sum(traces) == 1


def test_batches_are_even_and_hold_rows_of_like_lengths():
  """10 rows in batches of at most 6 are two batches of 5, the shorter rows and the longer."""
  batches = []

  def predict(params, batch, extra):
    jax.debug.callback(lambda rows: batches.append(rows.tolist()), batch.index)
    return toy.predict(params, batch, extra)

  system = types.System(toy.init, predict, ())
  evaluate.make_grid(system, SPLIT, CONDITIONS[:1], [0], batch_size=6)(PARAMS, EXTRA)
  jax.effects_barrier()
  lengths = sum(m.valid.sum(1) for m in SPLIT[:3])
  order = np.argsort(lengths, kind="stable").tolist()
  assert sorted(batches) == sorted([order[:5], order[5:]])


def test_rows_carry_condition_seed_and_metrics(expected):
  rows = evaluate.robustness(toy.make_system(), PARAMS, EXTRA, SPLIT, toy.SPEC, CONDITIONS, [0, 1])
  assert [(r["condition"], r["mask_seed"]) for r in rows[:3]] == [("0", 0), ("0", 1), ("0.5", 0)]
  mae = np.abs(expected - SPLIT.label).mean(-1).ravel()
  np.testing.assert_allclose([r["mae"] for r in rows], mae, rtol=1e-5)
  validate = evaluate.make_validator(toy.make_system(), SPLIT, toy.SPEC, CONDITIONS[1], seed=1)
  np.testing.assert_allclose(validate(PARAMS, EXTRA)["mae"], mae[3], rtol=1e-5)


def peek(params, batch, extra):
  """A system that reads the clean values, as none should."""
  del params, extra
  return {"prediction": sum(m.x.sum((1, 2)) for m in batch[:3]), "feature": batch.audio.x}


PEEK = types.System(toy.init, peek, ())


@functools.partial(jax.jit, static_argnums=0)
def apply(mask, settings, key, split):
  return mask(**settings)(key, split)


def masked_by_hand(mask, settings, seed, split=SPLIT):
  """The masks of a cell by their definition: the key folds the seed and all settings in."""
  key = jax.random.key(seed, impl="threefry2x32")
  for leaf in jax.tree.leaves(settings):
    for number in np.asarray(leaf, np.float32).ravel():
      key = jax.random.fold_in(key, int(round(1000 * float(number))))
  return jax.tree.map(np.asarray, apply(mask, settings, key, split))


def test_every_cell_reads_what_its_own_mask_leaves_and_nothing_else():
  """Of several families in any order; neither clean values nor another cell's masks get in."""
  share = {"share": {"b": np.float64(0.7), "n": np.int64(2)}, "rate": np.float32([[0.5, 0.5]] * 3)}

  def own(rate, share):
    assert np.issubdtype(share["n"].dtype, np.integer)
    return masking.bernoulli(rate, complete_share=share["b"])

  conditions = [
    *evaluate.parse_rates("0.3,0.4-0.9"),
    evaluate.Condition("own", "0.7", own, share),
    evaluate.missing_condition("v"),
    evaluate.Condition("mmin", "all", masking.random_drop, {}),
    evaluate.missing_condition("lav"),
  ]
  seeds = [3, 0]
  grid = evaluate.make_grid(PEEK, SPLIT, conditions, seeds, batch_size=3)
  found = grid(PARAMS, EXTRA)
  assert found.shape == (6, 2, 10)
  for c, condition in enumerate(conditions):
    for s, seed in enumerate(seeds):
      masked = masked_by_hand(condition.mask, condition.settings, seed)
      left = sum((m.x * np.asarray(m.seen)).sum((1, 2)) for m in masked[:3])
      np.testing.assert_allclose(found[c, s], left, rtol=1e-5, atol=1e-5, err_msg=condition.name)
  assert not found[5].any() and found[3].any()
  feature = evaluate.make_grid(PEEK, SPLIT, conditions[:1], [0], output="feature")(PARAMS, EXTRA)
  audio = masked_by_hand(masking.span, conditions[0].settings, 0).audio
  np.testing.assert_array_equal(feature[0, 0], audio.x * np.asarray(audio.seen))


def test_token_ids_that_are_missing_become_unk():
  ids = np.arange(1001, 1007, dtype=np.int32)[None].repeat(2, 0)
  valid = np.arange(6) < np.array([[6], [4]])
  split = data.take(SPLIT, np.arange(2))._replace(
    text=types.modality(np.where(valid, ids, 0), valid)
  )
  read = types.System(toy.init, lambda params, batch, extra: {"prediction": batch.text.x}, ())
  found = evaluate.make_grid(read, split, [evaluate.missing_condition("l")], [0])(PARAMS, EXTRA)
  np.testing.assert_array_equal(
    found[0, 0], [[1001, 100, 100, 100, 100, 1006], [1001, 100, 100, 1004, 0, 0]]
  )


def test_an_evaluation_does_not_depend_on_the_kind_of_keys(expected):
  with jax.default_prng_impl("rbg"):
    np.testing.assert_allclose(predictions(), expected, rtol=1e-6)
    np.testing.assert_allclose(predictions(batch_size=3), expected, rtol=1e-5)


def test_a_validator_has_its_own_condition_and_seed():
  spec = toy.SPEC
  for seed in (0, 5):
    (condition,) = evaluate.parse_rates("0.5", mask=masking.bernoulli)
    masked = masked_by_hand(masking.bernoulli, condition.settings, seed)
    left = sum((m.x * np.asarray(m.seen)).sum((1, 2)) for m in masked[:3])
    validate = evaluate.make_validator(PEEK, SPLIT, spec, condition, seed=seed, batch_size=4)
    mae = np.abs(left - SPLIT.label).mean()
    np.testing.assert_allclose(validate(PARAMS, EXTRA)["mae"], mae, rtol=1e-5)


def test_nothing_to_evaluate_is_refused():
  for conditions, seeds in (([], [0]), (CONDITIONS, [])):
    with pytest.raises(types.UsageError, match="at least one"):
      evaluate.make_grid(PEEK, SPLIT, conditions, seeds)


def test_conditions_are_parsed():
  assert [c.name for c in evaluate.parse_rates("0:0.9:0.1")] == [f"{n / 10:g}" for n in range(10)]
  assert [c.name for c in evaluate.parse_rates("0:0.3:0.1, .5,1e-3,0.6-1")] == [
    "0",
    "0.1",
    "0.2",
    "0.3",
    "0.5",
    "0.001",
    "0.6-1",
  ]
  assert evaluate.parse_rates("") == []
  (interval,) = evaluate.parse_rates("0.4-0.6", mask=masking.bernoulli)
  assert (interval.kind, interval.name, interval.mask) == ("rate", "0.4-0.6", masking.bernoulli)
  np.testing.assert_allclose(interval.settings["rate"], [[0.4, 0.6]] * 3)
  for letters, name, rates in (("va", "av", [0, 1, 1]), ("al", "la", [1, 1, 0])):
    condition = evaluate.missing_condition(letters)
    assert (condition.kind, condition.name) == ("missing", name)
    np.testing.assert_array_equal(condition.settings["rate"], np.transpose([rates, rates]))


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("abc", r"'abc' is none; rates are 0,0.3, intervals 0.4-0.6, or first:last:step"),
    ("0.1,,0.2", "'' is none"),
    ("-0.1", "'-0.1' is none"),
    ("nan", "'nan' is none"),
    ("0.1-0.2-0.3", "is none"),
    ("0:1", "is none"),
    ("0.6-0.4", "rising order"),
    ("1.5", "within"),
    ("0:1:0", "step"),
    ("0.9:0:0.1", "step"),
    ("0:1.5:0.5", "within"),
    ("0.3,0:0.5:0.1", "0.3 is there more than once"),
  ],
)
def test_wrong_rates_are_told_with_the_format(text, message):
  with pytest.raises(types.UsageError, match=message):
    evaluate.parse_rates(text)


@pytest.mark.parametrize("letters", ["", "t", "ll", "lal", "LA"])
def test_wrong_missing_sets_are_told(letters):
  with pytest.raises(types.UsageError, match="letters"):
    evaluate.missing_condition(letters)


def test_conditions_of_rates_need_a_mask_with_a_rate():
  with pytest.raises(types.UsageError, match="rate"):
    evaluate.parse_rates("0.3", mask=masking.drop)


def test_what_a_grid_hides_is_counted_exactly():
  seeds = (0, 1, 2)
  rows = evaluate.count_missing(SPLIT, CONDITIONS, seeds, batch_size=4)
  table = {(row["condition"], row["modality"]): row for row in rows}
  assert len(rows) == len(table) == 3 * 4
  steps = {name: int(getattr(SPLIT, name).valid.sum()) for name in types.MODALITIES}
  for name in types.MODALITIES:
    none, half, gone = (table[c, name] for c in ("0", "0.5", "la"))
    assert {row["of steps"] for row in (none, half, gone)} == {3 * steps[name]}
    assert none["missing steps"] == none["missing modalities"] == none["touched samples"] == 0
    # a span covers floor(T / 2) of each sample's T steps
    lost = (np.asarray(getattr(SPLIT, name).valid).sum(1) // 2).sum()
    assert half["missing steps"] == 3 * lost and half["missing modalities"] == 0
    assert half["touched samples"] == half["of samples"] == 30
    all_of_it = name != "vision"
    assert gone["missing modalities"] == 30 * all_of_it
    assert gone["missing steps"] == 3 * steps[name] * all_of_it
  whole = table["la", "all"]
  assert (whole["missing modalities"], whole["of modalities"]) == (60, 90)
  assert whole["missing steps"] == 3 * (steps["text"] + steps["audio"])
  assert (whole["touched samples"], whole["of samples"]) == (30, 30)


def test_counts_of_channels_and_of_token_ids():
  """Channels are counted at each step; [CLS] and [SEP] are never missing, yet a text can be."""
  channels = evaluate.rate_condition(0.5, mask=masking.family("span", axis="feature"))
  row = evaluate.count_missing(SPLIT, [channels], [0])[1]
  steps = int(SPLIT.audio.valid.sum())
  assert (row["missing steps"], row["of steps"]) == (steps, 2 * steps)  # one of two channels
  ids = SPLIT.text._replace(
    x=np.ones(SPLIT.text.valid.shape, np.int32), seen=SPLIT.text.valid | True
  )
  tokens = SPLIT._replace(text=ids._replace(fill=np.full(10, 100, np.int32)))
  row = evaluate.count_missing(tokens, [evaluate.missing_condition("l")], [0])[0]
  inner = np.maximum(SPLIT.text.valid.sum(1) - 2, 0)
  assert row["missing steps"] == inner.sum() and row["missing modalities"] == (inner > 0).sum()
