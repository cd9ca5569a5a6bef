"""Missing-data transforms: parity with recorded masks, distributions, and their promises."""

import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.parity.goldens import masks as golden
from mmjax import masking, registry, types

DATA = pathlib.Path(__file__).parent / "data"
MOSTLY = 1e-4  # p-value below which a distribution counts as wrong
FEATURES = {"audio": 3, "vision": 4}
MASKS = {
  "span": masking.span((0.2, 0.8)),
  "bernoulli": masking.bernoulli((0.0, 1.0), complete_share=0.5),
  "drop": masking.drop(("text", "vision")),
  "random_drop": masking.random_drop(),
  "gcnet": masking.gcnet((0.1, 0.6)),
  "mixture": masking.mixture([masking.span(0.3), masking.drop(("audio",))]),
  "compose": masking.compose([masking.span(0.3), masking.bernoulli(0.2)]),
  "msm": masking.msm(),
  "frames": masking.frames((0.2, 0.8)),
  "blocks": masking.blocks((0.2, 0.8)),
  "imder": masking.imder((0.1, 0.7)),
}


DRAWN = {
  "bernoulli": [1023, 1023, 1023, 176, 1023, 1023, 1018, 1023],
  "compose": [127, 571, 575, 967, 911, 993, 31, 760],
  "blocks": [771, 975, 1016, 897, 639, 799, 1009, 7],
  "drop": [1023, 1023, 1023, 1023, 1023, 1023, 1023, 1023],
  "frames": [314, 982, 497, 361, 381, 648, 948, 534],
  "gcnet": [0, 1023, 0, 1023, 1023, 1023, 0, 1023],
  "imder": [0, 1023, 1023, 1023, 1023, 1023, 0, 1023],
  "mixture": [0, 575, 575, 967, 911, 995, 0, 0],
  "msm": [0, 1019, 239, 7, 0, 0, 0, 767],
  "random_drop": [1023, 1023, 0, 0, 0, 1023, 1023, 1023],
  "span": [899, 1016, 1008, 31, 995, 896, 903, 960],
}


def make_batch(rows=6, length=12, tokens=True, seed=0, index=None) -> types.Batch:
  """A batch with valid lengths from 3 on; token ids count from 1000."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(3, length + 1, (3, rows))
  lengths[:, 0] = length

  def modality(i, x):
    valid = np.arange(length) < lengths[i][:, None]
    x = np.where(valid.reshape(valid.shape + (1,) * (x.ndim - 2)), x, 0)
    return types.modality(x, valid)

  ids = 1000 + rng.integers(0, 500, (rows, length)).astype(np.int32)
  dense = rng.normal(size=(rows, length, 5)).astype(np.float32)
  text = modality(0, ids if tokens else dense)
  audio, vision = (
    modality(i, rng.normal(size=(rows, length, dim)).astype(np.float32))
    for i, dim in enumerate(FEATURES.values(), 1)
  )
  batch = types.Batch(
    text,
    audio,
    vision,
    label=np.zeros(rows, np.float32),
    index=np.arange(rows, dtype=np.int32) if index is None else index,
    info={},
  )
  return jax.tree.map(jnp.asarray, batch)


def many(rows=4000, length=20, tokens=False) -> types.Batch:
  """Full-length samples, for distributions."""
  batch = make_batch(rows, length, tokens)
  return batch._replace(
    **{
      n: getattr(batch, n)._replace(valid=jnp.ones((rows, length), bool)) for n in types.MODALITIES
    }
  )


def missing_rate(seen):
  return 1 - np.asarray(seen).reshape(seen.shape[0], -1).mean(1)


def draw(mask, batch, seed=0):
  """Applies a mask, op by op: with a few shapes only, that is faster than compiling each mask."""
  return mask(jax.random.key(seed), batch)


def draw_once(mask, batch, seed=0):
  """The same as one program, for shapes or precisions that no other test has."""
  return jax.jit(mask)(jax.random.key(seed), batch)


def seen_of(batch):
  return {name: np.asarray(getattr(batch, name).seen) for name in types.MODALITIES}


# --- parity


@pytest.fixture(scope="module")
def recorded():
  return dict(np.load(DATA / "masks.npz"))


def test_parity_of_every_recorded_mask(recorded):
  tags = {key.split("/")[0] for key in recorded if key.endswith("/uniform")}
  groups = set()
  for group, name, ours, theirs in golden.compare(recorded):
    groups.add(group)
    np.testing.assert_array_equal(ours, theirs, err_msg=f"{group} {name}")
  per_step = {f"{tag}/{name}" for tag in tags for name in types.MODALITIES}
  assert len(tags) == 10 and groups == per_step | {"m3s span", "m3s every span"}


def test_comparison_of_masks_notices_a_wrong_value(recorded):
  for key in ("m3s/k", "m3s_apply/y", "lnln_train/text/output", "mmsa_r0.3/audio/missing_mask"):
    wrong = {**recorded, key: recorded[key] + 1}
    assert any(not np.array_equal(ours, theirs) for *_, ours, theirs in golden.compare(wrong))


def test_mask_fns_equal_the_recorded_rule_under_their_own_draws(recorded):
  """At rates 0 and 1 the draws do not matter: the whole chain gives the recorded output."""
  ids, valid = recorded["seq_input/text_ids"], recorded["seq_input/text_attention_mask"] > 0
  rows, length = ids.shape
  batch = make_batch(rows, length)
  text = types.modality(jnp.int32(ids), valid, fill=golden.UNK)
  batch = batch._replace(text=text)
  for rate in json.loads(str(recorded["config"]))["scalar_rates"]:
    if rate in (0.0, 1.0):
      for mask in (masking.bernoulli(rate), masking.span(rate)):
        out = masking.observed(draw(mask, batch).text)
        np.testing.assert_array_equal(out, recorded[f"mmsa_r{rate}/text/output"])


# --- the span's length


def test_span_length_in_float32_is_exact_for_tenths_and_at_most_one_short_for_hundredths():
  hundredth, length = np.arange(101)[:, None], np.arange(1, 513)[None]
  _, k = masking.span_bounds(0.0, np.float32(hundredth / 100), length)
  short = length * hundredth // 100 - np.asarray(k)
  assert short.min() == 0 and short.max() == 1 and short.sum() == 26
  assert not short[::10].any()
  assert short[53, 100 - 1] and not short[29, 100 - 1]


@pytest.mark.parametrize(("x64", "k"), [(False, 29), (True, 28)])
def test_span_length_at_the_edge_follows_the_precision(x64, k):
  with jax.enable_x64(x64):
    batch = many(1, 100)
    seen = draw_once(masking.span(0.29), batch).audio.seen
    assert (~seen).sum() == k  # 100 * 0.29 is 28.999… in float64, 29 in float32


def test_the_rules_take_any_leading_axes():
  lengths, step = np.array([[5, 1, 7], [3, 7, 2]]), np.arange(7)
  valid = step < lengths[..., None]
  u = np.float32(np.random.default_rng(0).uniform(size=valid.shape))
  for at in (..., (0, 0)):
    ends = masking.ends(valid[at])
    last = lengths[at][..., None] - 1
    np.testing.assert_array_equal(ends, (step == 0) | (step == last))
    seen = masking.step_mask(u[at], np.float32(0.4), valid[at])
    np.testing.assert_array_equal(seen, ~valid[at] | (u[at] > 0.4))
    seen = masking.span_mask(lengths[at] - 1, np.full_like(lengths[at], 2), 7)
    np.testing.assert_array_equal(seen, (step < last) | (step > last + 1))


def test_span_start_stays_inside_when_u_rounds_to_one():
  start, k = masking.span_bounds(np.float32(1.0), np.float32(0.5), 10)
  assert (start, k) == (5, 5)


# --- distributions


def test_span_is_one_run_of_floor_length_inside_the_valid_steps():
  batch = make_batch(tokens=False, seed=1)
  for name, seen in seen_of(draw(masking.span(0.4), batch, 1)).items():
    valid = np.asarray(getattr(batch, name).valid)
    for row, ok in zip(seen[..., 0], valid, strict=True):
      gone = np.flatnonzero(~row)
      assert len(gone) == ok.sum() * 4 // 10
      assert not (~row & ~ok).any()
      assert len(gone) < 2 or (np.diff(gone) == 1).all()


def test_span_start_is_uniform_and_modalities_are_independent():
  from scipy import stats

  batch = many()
  seen = seen_of(draw(masking.span(0.3), batch, 2))
  starts = {name: np.argmin(s[..., 0], axis=1) for name, s in seen.items()}
  for start in starts.values():
    counts = np.bincount(start, minlength=15)
    assert len(counts) == 15 and stats.chisquare(counts).pvalue > MOSTLY
  for one, other in (("text", "audio"), ("audio", "vision"), ("text", "vision")):
    assert abs(np.corrcoef(starts[one], starts[other])[0, 1]) < 0.08


def test_rate_interval_is_drawn_uniformly_per_sample_and_modality():
  from scipy import stats

  batch = many(2000, 500)
  rates = {
    name: missing_rate(seen)
    for name, seen in seen_of(draw_once(masking.span((0.4, 0.6)), batch, 3)).items()
  }
  for rate in rates.values():
    assert rate.min() >= 0.398 and rate.max() <= 0.6
    assert stats.kstest(rate + 0.001, stats.uniform(0.4, 0.2).cdf).pvalue > MOSTLY
  assert abs(np.corrcoef(rates["text"], rates["audio"])[0, 1]) < 0.1


def test_bernoulli_rate_and_complete_share():
  batch = many()
  masked = draw(masking.bernoulli(0.3, complete_share=0.5), batch, 4)
  for seen in seen_of(masked).values():
    rate = missing_rate(seen)
    assert abs((rate == 0).mean() - 0.5) < 0.05
    assert abs(rate[rate > 0].mean() - 0.3) < 0.01
  a, v = (missing_rate(s) == 0 for s in (masked.audio.seen, masked.vision.seen))
  assert abs((a & v).mean() - 0.25) < 0.05  # per modality, not per sample


def test_bernoulli_steps_are_independent():
  seen = np.asarray(draw(masking.bernoulli(0.5), many(), 5).audio.seen)[..., 0]
  correlation = np.corrcoef(seen.T) - np.eye(seen.shape[1])
  assert np.abs(correlation).max() < 0.08


@pytest.mark.parametrize("make", [masking.span, masking.bernoulli])
def test_rate_zero_keeps_all_and_one_takes_all(make):
  batch = make_batch(tokens=False)
  for name, seen in seen_of(draw(make(0.0), batch)).items():
    assert seen.all(), name
  for name, seen in seen_of(draw(make(1.0), batch)).items():
    np.testing.assert_array_equal(seen[..., 0], ~np.asarray(getattr(batch, name).valid))


@pytest.mark.parametrize("u", [np.float32(0), np.nextafter(np.float32(1), np.float32(0))])
def test_rates_and_shares_hold_at_both_ends_of_a_draw(u, monkeypatch):
  monkeypatch.setattr(jax.random, "uniform", lambda key, shape=(): jnp.full(shape, u))
  batch = make_batch(tokens=False)
  for mask, everything in (
    (masking.bernoulli(0.0), False),
    (masking.bernoulli(1.0), True),
    (masking.bernoulli(1.0, complete_share=1.0), False),
    (masking.span(1.0), True),
  ):
    gone = ~draw(mask, batch).audio.seen[..., 0]
    np.testing.assert_array_equal(gone, batch.audio.valid & everything)


def test_feature_axis_hides_the_same_channels_at_every_step():
  batch = make_batch(tokens=False)
  masked = draw(masking.span(0.5, axis="feature"), batch)
  assert masked.vision.seen.shape == (6, 12, 4)  # and-ed into [B, L, 1]
  np.testing.assert_array_equal(masked.vision.seen.sum(-1), 2)
  np.testing.assert_array_equal(masked.vision.seen, masked.vision.seen[:, :1].repeat(12, 1))
  lone = batch._replace(audio=batch.audio._replace(seen=jnp.ones((6, 1, 1), bool)))
  assert draw(masking.span(0.5, axis="feature"), lone).audio.seen.shape == (6, 1, 3)


# --- tokens, drops, composition


@pytest.mark.parametrize("mask", [masking.span(1.0), masking.bernoulli(1.0), masking.drop("text")])
def test_tokens_become_unk_but_for_both_ends_and_padding(mask):
  batch = make_batch()
  masked = draw(mask, batch)
  out, valid = np.asarray(masking.observed(masked.text)), np.asarray(batch.text.valid)
  for row, ids, ok in zip(out, np.asarray(batch.text.x), valid, strict=True):
    last = ok.sum() - 1
    assert row[0] == ids[0] and row[last] == ids[last]
    assert (row[1:last] == 100).all() and (row[last + 1 :] == 0).all()
  np.testing.assert_array_equal(masked.text.valid, batch.text.valid)


def test_drop_takes_the_named_modalities_only():
  batch = make_batch(tokens=False)
  masked = masking.erase(draw(masking.drop(("text", "vision")), batch))
  assert not masked.text.x.any() and not masked.vision.x.any()
  np.testing.assert_array_equal(masked.audio.x, batch.audio.x)


def drawn_subsets(mask):
  batch, rows = many(), 4000
  gone = [1 - missing_rate(s) == 0 for s in seen_of(draw(mask, batch, 6)).values()]
  return np.bincount(np.stack(gone, 1) @ [1, 2, 4], minlength=8) / rows


def test_gcnets_masks_keep_one_modality_and_the_others_by_the_rate():
  keep = 1 - 1.5 * 0.4  # of each modality beside the one that stays
  one, two = 2 / 3 * keep * (1 - keep), (1 - keep) ** 2 / 3
  chance = [keep**2, one, one, two, one, two, two, 0]
  found = drawn_subsets(masking.gcnet(0.4))
  np.testing.assert_allclose(found, chance, atol=0.025)
  shares = [np.array([bin(s).count("1") for s in range(8)]) @ x / 3 for x in (chance, found)]
  np.testing.assert_allclose(shares, 0.4, atol=0.015)
  assert drawn_subsets(masking.gcnet(0.0))[0] == 1
  assert drawn_subsets(masking.gcnet(0.7))[[3, 5, 6]] == pytest.approx(1 / 3, abs=0.025)
  # whole modalities, as the conditions of missing sets ask for
  assert drawn_subsets(masking.gcnet({"text": 1.0}))[1] == 1
  assert drawn_subsets(masking.gcnet({"text": 1.0, "vision": 1.0}))[5] == 1


def test_gcnets_masks_of_an_interval_share_a_samples_rate():
  """At rates 0 and 2/3 nothing or two modalities go; between, samples lose 0, 1 or 2."""
  found = drawn_subsets(masking.gcnet((0.0, 0.6)))
  # E[(1 - 3/2 r)²] for r uniform below 0.6: with rates of their own it would be 0.3025
  assert found[0] == pytest.approx((1 - 0.1**3) / (3 * 0.9), abs=0.025) and found[7] == 0


@pytest.mark.parametrize("rate", [0.71, (0.8, 0.9), {"text": 0.8, "audio": 0.8, "vision": 1.0}])
def test_gcnets_masks_refuse_rates_that_take_everything(rate):
  with pytest.raises(types.UsageError, match="no more than 2/3"):
    masking.gcnet(rate)


def test_random_drop_draws_its_subsets_equally_or_by_rate():
  np.testing.assert_allclose(drawn_subsets(masking.random_drop()), [0, *[1 / 6] * 6, 0], atol=0.02)
  p = 0.3
  chance = np.array([p ** bin(s).count("1") * (1 - p) ** (3 - bin(s).count("1")) for s in range(8)])
  np.testing.assert_allclose(
    drawn_subsets(masking.random_drop(p, subsets=masking.SUBSETS)), chance, atol=0.02
  )
  chance[7] = 0  # never all three
  np.testing.assert_allclose(
    drawn_subsets(masking.random_drop(p, subsets=masking.SUBSETS[:7])),
    chance / chance.sum(),
    atol=0.02,
  )


def test_random_drop_at_the_ends_of_the_rate():
  none = drawn_subsets(masking.random_drop(0.0, subsets=masking.SUBSETS[:7]))
  np.testing.assert_array_equal(none, [1, 0, 0, 0, 0, 0, 0, 0])
  most = drawn_subsets(masking.random_drop(1.0, subsets=masking.SUBSETS[:7]))
  assert most[[3, 5, 6]].sum() == 1 and (most[[3, 5, 6]] > 0).all()


def test_random_drop_takes_rates_of_its_modalities_and_intervals():
  """Each modality on its own: P(text gone) = 0.2, audio always, vision E[r] = 0.5."""
  rates = {"text": 0.2, "audio": 1.0, "vision": (0.0, 1.0)}
  found = drawn_subsets(masking.random_drop(rates, subsets=masking.SUBSETS))
  expected = [0, 0, 0.8 * 0.5, 0.2 * 0.5, 0, 0, 0.8 * 0.5, 0.2 * 0.5]
  np.testing.assert_allclose(found, expected, atol=0.025)


def test_msm_leaves_each_set_equally_often_and_drops_steps_of_what_it_leaves():
  """The number of 20 steps that p ~ U(0, 1) drops is uniform on 0 … 20."""
  batch, length = many(), 20
  seen = np.stack([s[..., 0] for s in seen_of(draw(masking.msm(), batch, 8)).values()], 1)
  lost = length - seen.sum(-1)  # [4000, 3]
  whole = lost == length
  # a modality that is left may lose all of its steps, too: one case in 21
  chance = np.zeros(8)
  for gone in range(7):
    for more in (more for more in range(8) if more & gone == gone):
      added, kept = (more & ~gone).bit_count(), 3 - more.bit_count()
      chance[more] += (1 / 21) ** added * (20 / 21) ** kept / 7
  np.testing.assert_allclose(np.bincount(whole @ [1, 2, 4], minlength=8) / 4000, chance, atol=0.02)
  assert (np.bincount(lost[~whole], minlength=20) / (~whole).sum() < 0.08).all()
  np.testing.assert_allclose(lost[~whole].mean(), 9.5, atol=0.2)
  both = ~whole[:, 0] & ~whole[:, 1]  # p is drawn for each modality
  assert abs(np.corrcoef(lost[both, 0], lost[both, 1])[0, 1]) < 0.08
  fixed = draw(masking.msm(0.3, subsets=[("audio",)]), batch, 9)
  rates = [missing_rate(s).mean() for s in seen_of(fixed).values()]
  np.testing.assert_allclose(rates, [0.3, 1.0, 0.3], atol=0.01)
  assert not masking.takes_rate(masking.msm)


def test_frames_drops_exactly_the_ratio_and_every_set_of_steps_alike():
  batch = make_batch(tokens=False)
  for rate in (0.0, 0.35, 1.0):
    for name, seen in seen_of(draw(masking.frames(rate), batch)).items():
      valid = np.asarray(getattr(batch, name).valid)
      lost = (valid & ~seen[..., 0]).sum(1)
      np.testing.assert_array_equal(lost, np.floor(valid.sum(1) * np.float32(rate)))
  # two of four steps: six sets, each one in six
  drawn = seen_of(draw(masking.frames(0.5), many(3000, 4)))
  sets, counts = np.unique(drawn["audio"][..., 0], axis=0, return_counts=True)
  assert sets.sum(1).tolist() == [2] * 6
  np.testing.assert_allclose(counts / 3000, 1 / 6, atol=0.03)
  assert (drawn["audio"] != drawn["text"]).any()


def test_blocks_take_the_same_steps_of_all_modalities():
  seen = seen_of(draw(masking.blocks((0.2, 0.8)), many(300)))
  np.testing.assert_array_equal(seen["text"], seen["audio"])
  np.testing.assert_array_equal(seen["text"], seen["vision"])
  steps = seen["text"][..., 0]
  lost = (~steps).sum(1)
  assert lost.min() >= 4 and lost.max() < 16 and len(np.unique(lost)) > 5
  edges = np.abs(np.diff(np.pad(steps, ((0, 0), (1, 1)), constant_values=True).astype(int))).sum(1)
  assert (edges == 2).all()  # one block
  assert len(np.unique(steps.argmin(1))) > 10
  own = seen_of(draw(masking.blocks({"audio": 0.5}), many(8)))  # rates may differ
  assert own["text"].all() and own["vision"].all() and missing_rate(own["audio"]).max() == 0.5


def test_available_leaves_what_it_names():
  seen = seen_of(draw(masking.available(("text", "vision")), many(3, 4)))
  assert seen["text"].all() and seen["vision"].all() and not seen["audio"].any()
  with pytest.raises(types.UsageError, match="'l'"):
    masking.available("l")


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4, 0.55, 0.7])
def test_imder_deals_out_numbers_of_modalities_as_published_to_any_order_of_samples(rate):
  batch = many(length=3)
  seen = np.stack([s[:, 0, 0] for s in seen_of(draw(masking.imder(rate), batch, 5)).values()], 1)
  left = seen.sum(1)
  one, two = (
    np.interp(rate, np.arange(8) / 10, t)
    for t in ([0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1], [0, 0.1, 0.2, 0.3, 0.2, 0.1, 0, 0])
  )
  np.testing.assert_allclose(
    np.bincount(left, minlength=4) / 4000, [0, one, two, 1 - one - two], atol=0.025
  )
  np.testing.assert_allclose((~seen).mean(0), (2 * one + two) / 3, atol=0.025)  # all alike
  # the first samples lose no more than the last ones
  np.testing.assert_allclose(left[:2000].mean(), left[2000:].mean(), atol=0.07)
  if rate == 0.7:
    np.testing.assert_array_equal(left, 1)


def test_imder_refuses_rates_that_it_has_not():
  for wrong, told in ((0.8, "at most 0.7"), ({"text": 0.3}, "one rate for all")):
    with pytest.raises(types.UsageError, match=told):
      masking.imder(wrong)


def test_a_mixture_draws_one_mask_for_each_sample_by_its_shares():
  batch = many(length=8)
  masks = [{"name": "drop", "missing": [name]} for name in types.MODALITIES]
  mask = masking.mixture([*masks, masking.span(0.5)], shares=[3, 0, 1, 4])
  seen = np.stack([missing_rate(s) for s in seen_of(draw(mask, batch, 7)).values()], 1)
  kinds, counts = np.unique(seen, axis=0, return_counts=True)
  np.testing.assert_array_equal(kinds, [[0, 0, 1], [0.5, 0.5, 0.5], [1, 0, 0]])
  np.testing.assert_allclose(counts / 4000, [1 / 8, 4 / 8, 3 / 8], atol=0.03)
  equal = np.stack([missing_rate(s) for s in seen_of(draw(masking.mixture(masks), batch)).values()])
  np.testing.assert_allclose(equal.mean(1), 1 / 3, atol=0.03)


def test_the_members_of_a_mixture_have_keys_of_their_own():
  """And each is the mask that it is alone, of its own samples."""
  batch, key = make_batch(40), jax.random.key(0)
  one = masking.span(0.5)
  mixed = seen_of(masking.mixture([one, one, masking.span(0.5, axis="time")])(key, batch))["audio"]
  alone = [seen_of(one(jax.random.fold_in(key, i), batch))["audio"] for i in range(3)]
  assert all((mixed == a).all((1, 2)).any() and not (mixed == a).all() for a in alone)
  assert np.any([(mixed == a).all((1, 2)) for a in alone], 0).all()


def test_a_mixture_joins_step_and_feature_masks():
  batch = make_batch(tokens=False)
  masks = [masking.span(0.5, axis="feature"), masking.drop(("vision",))]
  seen = draw(masking.mixture(masks, shares=(1, 0)), batch).vision.seen
  np.testing.assert_array_equal(seen.sum(-1), 2)
  gone = draw(masking.mixture(masks, shares=(0, 1)), batch).vision.seen
  np.testing.assert_array_equal(gone, np.repeat(~np.asarray(batch.vision.valid)[..., None], 4, -1))


def test_the_rate_of_a_mixture_is_that_of_its_members_without_one():
  batch = make_batch(tokens=False)
  masks = [{"name": "span"}, {"name": "bernoulli", "rate": 0.0}, {"name": "drop", "missing": []}]
  together = {"name": "compose", "masks": masks, "rate": 1.0}
  for name, seen in seen_of(draw(masking.make(**together), batch)).items():
    np.testing.assert_array_equal(seen[..., 0], ~np.asarray(getattr(batch, name).valid))
  nested = masking.mixture([together | {"rate": 0.0}, {**together, "rate": 0.0}])
  assert all(seen.all() for seen in seen_of(draw(nested, batch)).values())
  traced = jax.jit(lambda r: masking.compose(masks, rate=r)(jax.random.key(0), batch))(0.5)
  chex.assert_trees_all_equal(traced, masking.compose(masks, 0.5)(jax.random.key(0), batch))


def test_compose_takes_the_union_of_what_its_masks_take():
  batch = make_batch(tokens=False)
  key = jax.random.key(0)
  one, other = masking.span(0.3), masking.span(0.4, axis="feature")
  both = masking.compose([one, other])(key, batch)
  for name in types.MODALITIES:
    expected = (
      getattr(one(jax.random.fold_in(key, 0), batch), name).seen
      & getattr(other(jax.random.fold_in(key, 1), batch), name).seen
    )
    np.testing.assert_array_equal(getattr(both, name).seen, expected)


def test_masks_rewrite_seen_only_and_never_give_back():
  batch = make_batch()
  before = draw(masking.bernoulli(0.5), batch, 9)
  for mask in MASKS.values():
    after = draw(mask, before)
    for name in types.MODALITIES:
      seen = getattr(after, name).seen
      assert not (seen & ~getattr(before, name).seen).any()
      after = after._replace(
        **{name: getattr(after, name)._replace(seen=getattr(before, name).seen)}
      )
    chex.assert_trees_all_equal(after, before)


def test_complete_shows_everything_and_complement_what_is_hidden():
  masked = draw(masking.span(0.5), make_batch(tokens=False))
  assert all(seen.all() for seen in seen_of(masking.complete(masked)).values())
  for name, seen in seen_of(masking.complement(masked)).items():
    np.testing.assert_array_equal(seen, ~np.asarray(getattr(masked, name).seen))
    assert seen.any() and not seen.all()


# --- independence of the batch, compilation


@pytest.mark.parametrize("name", MASKS)
def test_a_samples_mask_depends_on_neither_batch_size_nor_order(name):
  batch, key = make_batch(), jax.random.key(0)
  mask = MASKS[name]
  whole = mask(key, batch)
  order = np.array([4, 0, 5, 2])
  chex.assert_trees_all_equal(
    mask(key, jax.tree.map(lambda a: a[order], batch)),
    jax.tree.map(lambda a: a[order], whole),
  )
  if name != "drop":
    moved = mask(key, batch._replace(index=batch.index + 6))
    other = draw(MASKS[name], batch, seed=1)
    for changed in (moved, other):
      same = [
        np.array_equal(a, b)
        for a, b in zip(seen_of(changed).values(), seen_of(whole).values(), strict=True)
      ]
      assert not all(same)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
@pytest.mark.parametrize("name", MASKS)
def test_a_samples_mask_depends_on_the_sample_alone_under_keys_of_rbg(name, impl):
  """Usual on TPUs: vmapped draws of rbg hang on all the keys; ORIG's fixed masks would change."""
  batch, key, mask = make_batch(), jax.random.key(3, impl=impl), MASKS[name]
  rows = np.array([5, 2])
  whole, legacy = mask(key, batch), mask(jax.random.PRNGKey(3, impl=impl), batch)
  part = mask(key, jax.tree.map(lambda a: a[rows], batch))
  chex.assert_trees_all_equal(part, jax.tree.map(lambda a: a[rows], whole))
  chex.assert_trees_all_equal(legacy, whole)
  if name != "drop":
    chex.assert_trees_all_equal_shapes(whole, mask(jax.random.key(4, impl=impl), batch))
    others = [seen_of(mask(jax.random.key(seed, impl=impl), batch)) for seed in (4, 5)]
    assert any((other[m] != seen_of(whole)[m]).any() for other in others for m in other)


def test_threefry_keys_keep_their_bits_and_all_words_of_others_count():
  key = jax.random.key(3)
  for same in (key, jax.random.PRNGKey(3)):
    assert masking.threefry(same) == key
  words = np.uint32([1, 2, 3, 4])
  variants = [words] + [words + np.uint32(np.arange(4) == i) for i in range(4)]
  found = {tuple(jax.random.key_data(masking.threefry(jnp.asarray(w))).tolist()) for w in variants}
  assert len(found) == 5


def test_draws_stay_what_they_are():
  """Recorded once: whoever changes a draw changes every number that was published with it."""
  batch, key = many(8, 10), jax.random.key(12)
  found = {}
  for name, mask in MASKS.items():
    seen = np.asarray(mask(key, batch).audio.seen)[..., 0]
    found[name] = (seen @ 2 ** np.arange(10)).tolist()  # a sample's steps as the bits of a number
  assert found == DRAWN


@pytest.mark.parametrize("name", MASKS)
def test_masks_under_jit_and_vmap(name):
  batch, keys = make_batch(), jax.random.split(jax.random.key(0), 2)
  together = jax.jit(jax.vmap(MASKS[name], (0, None)))(keys, batch)
  for i, key in enumerate(keys):
    chex.assert_trees_all_equal(
      jax.tree.map(lambda a, i=i: a[i], together), MASKS[name](key, batch)
    )


@pytest.mark.parametrize("make", [masking.span, masking.bernoulli])
def test_a_grid_of_rates_compiles_once_and_equals_concrete_rates(make):
  batch, key = make_batch(), jax.random.key(0)
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def apply(rate):
    return make(rate)(key, batch)

  for rate in np.linspace(0, 1, 4, dtype=np.float32):
    chex.assert_trees_all_equal(apply(jnp.float32(rate)), make(float(rate))(key, batch))

  grid = jnp.float32([[[0.2, 0.2], [0, 0], [1, 1]], [[0, 1], [0.4, 0.6], [0.5, 0.5]]])
  cells = jax.jit(lambda rates: jax.lax.map(lambda r: make(r)(key, batch), rates))(grid)
  for i, rates in enumerate(np.asarray(grid)):
    cell = jax.tree.map(lambda a, i=i: a[i], cells)
    chex.assert_trees_all_equal(cell, make(rates)(key, batch))


# --- rates


def test_all_forms_of_a_rate_agree():
  batch, key = make_batch(), jax.random.key(0)
  forms = [
    [
      0.3,
      np.float32(0.3),
      (0.3, 0.3),
      [0.3, 0.3, 0.3],
      np.full(3, 0.3),
      np.full((3, 2), 0.3),
      dict.fromkeys(types.MODALITIES, 0.3),
      dict.fromkeys(types.MODALITIES, (0.3, 0.3)),
    ],
    [
      (0.1, 0.9),
      jnp.array([0.1, 0.9]),
      ((0.1, 0.9),) * 3,
      dict.fromkeys(types.MODALITIES, (0.1, 0.9)),
    ],
    [{"audio": (0.2, 0.5), "vision": 1.0}, ((0, 0), (0.2, 0.5), (1, 1))],
  ]
  for same in forms:
    for rate in same[1:]:
      chex.assert_trees_all_equal(masking.span(rate)(key, batch), masking.span(same[0])(key, batch))


def test_traced_parts_of_a_rate():
  batch, key = make_batch(), jax.random.key(0)
  expected = masking.span({"audio": (0.2, 0.5)})(key, batch)
  chex.assert_trees_all_equal(
    jax.jit(lambda r: masking.span({"audio": (0.2, r)})(key, batch))(0.5), expected
  )


@pytest.mark.parametrize(
  ("rate", "message"),
  [
    (1.2, "within"),
    (-0.1, "within"),
    (float("nan"), "within"),
    ((0.6, 0.4), "low <= high"),
    ((0.1, 0.2, 0.3, 0.4), "shape"),
    (((0.1, 0.2), 0.3, 0.4), "differ in shape"),
    ({"text": (0.1, 0.2, 0.3)}, "number or"),
    ({"video": 0.5}, "video"),
    ({"audio": 3}, "within"),
  ],
)
def test_wrong_rates_are_refused(rate, message):
  for make in (masking.span, masking.bernoulli):
    with pytest.raises(ValueError, match=message):
      make(rate)


def test_other_wrong_arguments_are_refused():
  with pytest.raises(ValueError, match="axis"):
    masking.span(0.5, axis="channels")
  with pytest.raises(ValueError, match="token ids"):
    draw(masking.span(0.5, axis="feature"), make_batch(), 0)
  with pytest.raises(ValueError, match="complete_share"):
    masking.bernoulli(0.5, complete_share=1.5)
  with pytest.raises(ValueError, match="video"):
    masking.drop("video")
  with pytest.raises(ValueError, match="text"):
    masking.random_drop(subsets=("text", "audio"))  # names where sets of names are expected
  with pytest.raises(ValueError, match="subset"):
    masking.random_drop(subsets=())


def test_a_mask_of_a_config_is_the_factory_with_its_settings():
  batch = make_batch(tokens=False)
  assert set(masking.MASKS) >= {"span", "bernoulli", "random_drop", "drop", "mixture", "compose"}
  for settings, mask in (
    (
      {"name": "span", "rate": [0.2, 0.8], "axis": "feature"},
      masking.span((0.2, 0.8), axis="feature"),
    ),
    ({"name": "bernoulli", "rate": {"audio": 0.5}}, masking.bernoulli({"audio": 0.5})),
    (
      {"name": "random_drop", "subsets": [["text"], []]},
      masking.random_drop(subsets=[["text"], []]),
    ),
    ({"name": "mmjax.masking:span", "rate": 0.3}, masking.span(0.3)),
  ):
    made = masking.make(**json.loads(json.dumps(settings)))
    chex.assert_trees_all_equal(draw(made, batch), draw(mask, batch))
  family = masking.family("bernoulli", complete_share=1.0)
  assert masking.takes_rate(family) and not masking.takes_rate(masking.drop)
  assert all(seen.all() for seen in seen_of(draw(family(rate=1.0), batch)).values())


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"name": "spam", "rate": 0.3}, "'span'"),
    ({"name": "span", "rate": 0.3, "axes": "time"}, "'axis'"),
    ({"name": "span"}, "needs the setting 'rate'"),
    ({"name": "drop"}, "needs the setting 'missing'"),
    ({"name": "span", "rate": "abc"}, "numbers"),
    ({"name": "span", "rate": ["0.1", 0.2]}, "numbers"),
    ({"name": "mixture", "masks": []}, "at least one"),
    ({"name": "mixture", "masks": {"name": "span"}}, "list"),
    ({"name": "mixture", "masks": [{"rate": 0.5}]}, "no 'name'"),
    ({"name": "mixture", "masks": [{"name": "span"}]}, "needs the setting 'rate'"),
    ({"name": "compose", "masks": [{"name": "span", "rate": 0.1}], "rate": 0.5}, "none of its"),
    ({"name": "mixture", "masks": [{"name": "drop", "missing": []}], "shares": [1, 2]}, "shares"),
    ({"name": "mixture", "masks": [{"name": "drop", "missing": []}], "shares": [0]}, "shares"),
    ({"name": "mixture", "masks": [{"name": "drop", "missing": []}], "shares": [-1]}, "shares"),
  ],
)
def test_wrong_settings_of_a_mask_are_told(settings, message):
  with pytest.raises(types.UsageError, match=message):
    masking.make(**settings)


def test_masks_in_words():
  found = masking.describe("bernoulli", rate=(0.0, 1.0), complete_share=0.5)
  assert found.endswith("(LNLN, and TFR-Net in MMSA); rate 0-1, complete_share 0.5")
  masks = [{"name": "drop", "missing": ["text", "audio"]}, {"name": "span", "rate": {"text": 0.1}}]
  found = masking.describe("mixture", masks=masks, shares=[1, 2, 3])
  assert "missing text + audio)" in found and "rate text 0.1)" in found and "1 + 2 + 3" in found
  assert all(masking.describe(name) for name in masking.MASKS)


def test_every_swept_mask_says_what_its_rate_is_a_rate_of():
  """Authors mean other things by a missing rate: a symbol, and in words of what."""
  for name, factory in masking.MASKS.items():
    if "rate" in (registry.settings_of(factory) or {}) and name not in ("mixture", "compose"):
      symbol, _, words = masking.quantity(name).partition(", ")
      assert symbol in ("r", "p", "MR") and len(words) > 20, name
  assert masking.quantity("bernoulli") == "p, probability of each step to go missing"
  assert masking.quantity("drop") == "missing rate"


# --- no leakage


@pytest.mark.parametrize("poison", [np.nan, 1e9])
def test_erase_leaves_nothing_of_the_unseen(poison):
  batch = make_batch()
  mask = masking.compose([masking.span(0.4), masking.bernoulli((0.0, 0.5))])
  masked = draw(mask, batch)

  def poisoned(m):
    bad = jnp.full_like(m.x, 7 if m.x.ndim == 2 else poison)
    return m._replace(x=jnp.where(m.seen, m.x, bad))

  spoilt = masked._replace(**{n: poisoned(getattr(masked, n)) for n in types.MODALITIES})
  clean, erased = masking.erase(masked), masking.erase(spoilt)
  chex.assert_trees_all_equal(clean, erased)
  for name in types.MODALITIES:
    m = getattr(erased, name)
    np.testing.assert_array_equal(m.x, masking.observed(m))
    np.testing.assert_array_equal(m.seen, getattr(masked, name).seen)
    assert not jnp.array_equal(m.x, getattr(batch, name).x)


def test_observed_passes_no_gradient_through_the_unseen():
  m = draw(masking.span(0.5), make_batch(tokens=False), 0).audio
  grad = jax.grad(lambda x: (masking.observed(m._replace(x=x)) ** 2).sum())(m.x)
  np.testing.assert_array_equal(grad, jnp.where(m.seen, 2 * m.x, 0))


def test_a_modality_is_present_while_anything_of_it_is_seen():
  x, valid = np.ones((4, 4, 2), np.float32), np.arange(4) < np.array([[4], [4], [2], [0]])
  seen = np.zeros((4, 4, 1), bool)
  seen[0, 3], seen[2, 2] = True, True  # the last is padding
  m = types.modality(x, valid, seen)
  np.testing.assert_array_equal(masking.present(m), [True, False, False, False])
  np.testing.assert_array_equal(masking.present(types.modality(x, valid)), [True] * 3 + [False])
  ids = types.modality(np.ones((2, 4), np.int32), valid[:2])
  batch = types.Batch(ids, ids, ids, np.zeros(2), np.arange(2), {})
  key = jax.random.key(0)
  assert not masking.present(masking.drop("text")(key, batch).text).any()  # [CLS], [SEP] stay
  assert masking.present(masking.drop("text")(key, batch).audio).all()
