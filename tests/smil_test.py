"""SMIL beside its parity: who is complete, the centres, what the steps read and move."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from mmjax import masking, meta, models, optim, sources, types
from mmjax.models import smil

SETTINGS = dict(sizes=(2, 3, 2), hidden_size=3, encoder="mean", complete_share=0.5, inner_rate=0.1)
KEY = jax.random.key(0)
BATCH = jax.tree.map(jnp.asarray, toy.make_batch(8))
SPEC = toy.SPEC._replace(num_train=8)
# half of the samples are complete, the others lack text, audio, both, vision
AVAILABLE = jnp.array([[1, 1, 1]] * 4 + [[0, 1, 1], [1, 0, 1], [0, 0, 1], [1, 1, 0]]) > 0


@functools.cache
def learnt(**changes):
  """A system, its initial parameters, and a jitted step without randomness."""
  system = models.MODELS["smil"](**{**SETTINGS, **changes})
  params, extra = system.init(KEY, SPEC)
  random = np.random.default_rng(0)
  priors = jax.tree.map(
    lambda p: jnp.asarray(random.normal(size=p.shape), p.dtype), extra["priors"]
  )
  extra = {**extra, "priors": priors, "available": AVAILABLE}
  learner = getattr(system.loss, "__self__")  # noqa: B009

  @jax.jit
  def step(params, batch, extra):
    def loss(params):
      found = learner.step(params, batch, extra, smil.Draws())
      return found.total, found

    return jax.value_and_grad(loss, has_aux=True)(params)

  return system, params, extra, step


def moved(one, other):
  """The paths of the parameters that differ."""
  changed = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), one, other)
  return {optim.path_of(p) for p, c in jax.tree_util.tree_leaves_with_path(changed) if c}


def test_a_share_of_the_samples_is_complete_and_each_other_one_keeps_something():
  subsets = smil.Learner(smil.Smil(missing=("audio", "vision")), *[None] * 8).subsets  # pyright: ignore
  np.testing.assert_array_equal(subsets, np.array([[0, 1, 0], [0, 0, 1], [0, 1, 1]]) > 0)
  table = np.asarray(smil.draw_available(KEY, 200, 0.1, subsets))
  assert table.all(1).sum() == 20 and table[:, 0].all()
  lost = ~table[~table.all(1)]
  assert {tuple(row) for row in lost} == {tuple(row) for row in subsets}
  assert smil.draw_available(KEY, 5, 0.01, subsets).all(1).sum() == 1
  assert len(smil.Learner(smil.Smil(), *[None] * 8).subsets) == 6  # pyright: ignore


def test_clusters():
  random = np.random.default_rng(0)
  means = np.array([[0.0, 9.0], [9.0, 0.0], [-9.0, -9.0]])
  vectors = (means[np.arange(600) % 3] + random.normal(size=(600, 2))).astype(np.float32)
  found = smil.cluster(vectors, 3)
  expected = [vectors[n::3].mean(0) for n in (2, 0, 1)]  # by the first coordinate
  np.testing.assert_allclose(found[np.argsort(found[:, 0])], expected, atol=1e-4)
  np.testing.assert_array_equal(smil.cluster(vectors, 3), found)
  np.testing.assert_array_equal(smil.cluster(np.ones((4, 2), np.float32), 3), np.ones((3, 2)))


def test_centres_come_from_complete_samples_as_the_second_phase_begins():
  system, params, extra, _ = learnt(centres=1, pretrain_epochs=2, refresh_epochs=3)
  on_epoch, train = system.phases[1].on_epoch, sources.Resident(BATCH)
  assert on_epoch is not None
  out = system.predict(params, BATCH, extra)
  for epoch in range(7):
    found = on_epoch(params, extra, epoch, train)[1]["priors"]["fusion"]
    for name in types.MODALITIES:
      mean = out[f"vector_{name}"][:4].mean(0, keepdims=True)
      kept = extra["priors"]["fusion"][name]
      np.testing.assert_allclose(found[name], mean if epoch in (2, 5) else kept, atol=1e-6)


def test_samples_that_lack_something_in_the_data_are_not_complete():
  system, params, extra, _ = learnt()
  on_epoch = system.phases[0].on_epoch
  assert on_epoch is not None
  gone = jnp.arange(8)[:, None] < 3
  batch = BATCH._replace(vision=masking.see(BATCH.vision, ~gone[..., None]))
  _, found = on_epoch(params, extra, 0, sources.Resident(batch))
  assert list(found["available"].all(1)) == [False] * 3 + [True] + [False] * 4
  nothing = masking.drop("vision")(KEY, BATCH)
  with pytest.raises(types.UsageError, match="complete_share"):
    on_epoch(params, extra, 0, sources.Resident(nothing))


def test_training_never_reads_what_its_samples_have_lost():
  _, params, extra, step = learnt()

  def poison(name, rows):
    m = getattr(BATCH, name)
    x = m.x.at[jnp.array(rows)].add(100.0)
    return BATCH._replace(**{name: m._replace(x=x)})

  (value, _), grads = step(params, BATCH, extra)
  for name, lost in (("text", [4, 6]), ("audio", [5, 6]), ("vision", [7])):
    (same, _), its = step(params, poison(name, lost), extra)
    assert same == value
    assert not moved(grads, its)
    assert step(params, poison(name, [0]), extra)[0][0] != value


def test_inner_steps_move_theta_by_a_rate_that_decays():
  _, params, extra, step = learnt()
  (_, found), grads = step(params, BATCH, extra)
  everything = {optim.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
  psi = {path for path in everything if "weights_" in path or "regularizer_" in path}
  assert moved(found.adapted, params) == everything - psi
  assert moved(grads, jax.tree.map(jnp.zeros_like, grads)) == everything
  late = step(params, BATCH, {**extra, "iteration": jnp.int32(1999)})[0][1].adapted

  def lengths(adapted):
    return [
      np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (adapted, params)), strict=True)
    ]

  np.testing.assert_allclose(lengths(late), np.multiply(lengths(found.adapted), 0.1), atol=1e-6)
  head = learnt(inner="head")[3](params, BATCH, extra)[0][1].adapted
  assert moved(head, params) == {
    f"fusion/{n}/{p}" for n in ("fc1", "fc2") for p in ("kernel", "bias")
  }


@pytest.mark.parametrize(
  "settings", [dict(inner_steps=2), dict(variant="paper", inner="head", encoder="lstm")]
)
def test_gradients_through_the_inner_steps_are_exact(settings, monkeypatch):
  """Forward over reverse gives what reverse over reverse does, by θ and by ψ."""
  settings = {**settings, "centres": 2}
  _, params, extra, step = learnt(**settings)
  found = step(params, BATCH, extra)[1]
  adapt = meta.adapt
  monkeypatch.setattr(meta, "adapt", lambda *a, **kw: adapt(*a, **{**kw, "mode": "reverse"}))
  expected = learnt.__wrapped__(**settings)[3](params, BATCH, extra)[1]
  chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)
  held = learnt(**settings, order="first")[3](params, BATCH, extra)[1]
  assert len(moved(found, held)) > 1


def test_the_outer_loss_is_that_of_complete_samples_with_something_hidden():
  _, params, extra, step = learnt(inner_rate=0.0)
  (total, found), _ = step(params, BATCH, extra)
  parts, noised, clean = found.parts, found.passes["noised"], found.passes["clean"]
  error = (noised["prediction"] - BATCH.label) ** 2
  np.testing.assert_allclose(parts["task"], error[:4].mean(), rtol=1e-6)
  inner = (found.passes["train"]["prediction"] - BATCH.label) ** 2
  np.testing.assert_allclose(parts["inner"], inner[4:].mean(), rtol=1e-6)
  joint = ((noised["joint"] - clean["joint"])[:4] ** 2).mean()
  hidden = ((noised["feature"] - clean["feature"])[:4] ** 2).mean()
  expected = parts["inner"] + parts["task"] + 0.01 * (joint + hidden)
  np.testing.assert_allclose(total, expected, rtol=1e-6)
  # by their index the complete samples lose text, audio, vision, text and audio
  for row, lost in enumerate((["text"], ["audio"], ["vision"], ["text", "audio"])):
    vectors = [
      noised[f"{'restored' if name in lost else 'vector'}_{name}"][row] for name in types.MODALITIES
    ]
    raised = np.concatenate(vectors) < noised["joint"][row]  # softplus was added
    assert raised.all()
    whole = [clean[f"vector_{name}"][row] for name in types.MODALITIES]
    np.testing.assert_allclose(clean["joint"][row], np.concatenate(whole), rtol=1e-6)


def test_the_papers_variant():
  _, params, extra, step = learnt(variant="paper", centres=2, kl_weight=0.5)
  (total, found), grads = step(params, BATCH, extra)
  noised, parts = found.passes["noised"], found.parts
  np.testing.assert_allclose(total, parts["task"] + 0.5 * parts["kl"], rtol=1e-6)
  np.testing.assert_allclose(  # the weights' mean is 1: the sum of the centres
    noised["restored_text"][0], extra["priors"]["fusion"]["text"].sum(0), rtol=1e-6
  )
  assert np.isfinite(jax.tree.leaves(jax.tree.map(jnp.sum, grads))).all()
  mean, std = jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 2.0]])
  np.testing.assert_allclose(smil._gaussian_kl(mean, std), [0.5 + 1.5 - np.log(2)], rtol=1e-6)


def test_predictions_of_several_draws_hang_on_no_other_sample():
  system, params, extra, _ = learnt(variant="paper", centres=2)
  batch = masking.drop(("text", "vision"))(KEY, BATCH)
  predict = jax.jit(system.predict)
  whole = predict(params, batch, extra)["prediction"]
  half = predict(params, jax.tree.map(lambda a: a[4:], batch), extra)["prediction"]
  np.testing.assert_allclose(whole[4:], half, rtol=1e-5)
  means = models.MODELS["smil"](**{**SETTINGS, "centres": 2}, variant="paper", samples=0)
  assert np.abs(whole - means.predict(params, batch, extra)["prediction"]).max() > 1e-3
  averaged = smil._average(jnp.log(jnp.array([[[0.5, 0.5]], [[0.9, 0.1]]])))
  np.testing.assert_allclose(jax.nn.softmax(averaged), [[0.7, 0.3]], rtol=1e-5)


def test_nothing_at_all_is_predicted_from_the_centres():
  system, params, extra, _ = learnt()
  out = system.predict(params, masking.drop(types.MODALITIES)(KEY, BATCH), extra)
  assert np.isfinite(out["prediction"]).all() and np.ptp(out["prediction"]) == 0
  prior = extra["priors"]["fusion"]["audio"]
  assert prior.shape == (10, 3)
  assert (out["restored_audio"] <= prior.max(0)[None]).all()  # a convex combination
  assert (out["restored_audio"] >= prior.min(0)[None]).all()


@pytest.mark.parametrize(
  "wrong",
  [
    dict(encoder="gru"),
    dict(variant="book"),
    dict(combine="divide"),
    dict(inner="tail"),
    dict(modalities=("text",)),
    dict(missing=("vision", "text")),
    dict(sizes=(2, 2)),
    dict(complete_share=0.0),
  ],
)
def test_settings_that_do_not_exist(wrong):
  with pytest.raises(ValueError, match=next(iter(wrong))):
    models.MODELS["smil"](**wrong)
