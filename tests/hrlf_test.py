"""HRLF: its losses against hand-worked numbers, its gradients, and that it learns."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from experiments import build, settings
from experiments.configs import hrlf as config_lib
from mmjax import (
  data,
  distill,
  evaluate,
  masking,
  meta,
  optim,
  synthetic,
  systems,
  train,
  types,
)
from mmjax.models import hrlf

TINY = dict(size=4, heads=2, depth=1, teacher_epochs=1)
WEIGHTS = dict(task_weight=2.0, frf_weight=3.0, hmi_weight=5.0, hal_weight=7.0, kl_weight=11.0)


# --- the losses


def test_factorization_by_hand():
  """One sample, d = 2 and d / 2 = 1: every error is 5 times a number, a 3-4-5 triangle."""
  z = np.array([[1.0, 2.0], [0.0, -1.0], [4.0, 0.5]], np.float32)
  sizes = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.float32)
  q = np.array([[0.0], [1.0], [2.0]], np.float32)
  # [sentiment, modality]: a translation is compared with the vector of its modality
  translated = z[None] + sizes[..., None] * np.array([3.0, 4.0], np.float32)
  found = q[None] - 0.5 * sizes[..., None]
  out = {"z": z, "q": q, "translated": translated, "requantified": found}
  out = {name: jnp.asarray(x)[None] for name, x in out.items()}
  parts = hrlf.factorization(out)
  np.testing.assert_allclose(parts["self"], 5 * (1 + 5 + 9) / 3, rtol=1e-6)
  np.testing.assert_allclose(parts["cross"], 5 * (2 + 3 + 4 + 6 + 7 + 8) / 6, rtol=1e-6)
  np.testing.assert_allclose(parts["recon"], 0.5 * 45 / 9, rtol=1e-6)
  twice = {name: jnp.concatenate([x, x]) for name, x in out.items()}
  twice["translated"] = twice["translated"].at[1].set(out["z"][0, None])
  half = hrlf.factorization(twice)  # a mean over the batch, whose second sample is without error
  np.testing.assert_allclose(half["self"], parts["self"] / 2, rtol=1e-4)


def test_factorization_stops_at_its_targets_only_if_told():
  def total(z, q, detach):
    out = {
      "z": z,
      "q": q,
      "translated": jnp.zeros((1, 3, 3, 2)),
      "requantified": jnp.ones((1, 3, 3, 1)),
    }
    return sum(hrlf.factorization(out, detach).values())

  z, q = jnp.ones((1, 3, 2)), jnp.zeros((1, 3, 1))
  for detach in (False, True):
    for g in jax.grad(total, (0, 1))(z, q, detach):
      assert bool((np.asarray(g) == 0).all()) is detach
  assert hrlf.make.__signature__.parameters["detach_targets"].default is True
  assert np.isfinite(jax.grad(hrlf.distance)(z[0, 0], z[0, 0])).all()


def test_the_bound_of_a_constant_and_of_the_best_statistics():
  np.testing.assert_allclose(
    distill.jensen_shannon(jnp.zeros(3), jnp.zeros(6)), -2 * np.log(2), rtol=1e-6
  )
  # a joint distribution of two bits in sixteenths, as samples of it and of its marginals' product
  joint = np.array([[6, 2], [3, 5]]) / 16
  product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
  best = np.log(joint / product)

  def samples(p):
    return jnp.asarray(np.repeat(best.ravel(), np.rint(256 * p).astype(int).ravel()))

  mixed = (joint + product) / 2
  jsd = (
    0.5 * (joint * np.log(joint / mixed)).sum() + 0.5 * (product * np.log(product / mixed)).sum()
  )
  found = distill.jensen_shannon(samples(joint), samples(product))
  np.testing.assert_allclose(found, 2 * jsd - 2 * np.log(2), rtol=1e-5)
  for other in (best + 0.3, best * 0.7, best.T):  # and nothing is above it
    worse = [
      jnp.asarray(np.repeat(other.ravel(), np.rint(256 * p).astype(int).ravel()))
      for p in (joint, product)
    ]
    assert distill.jensen_shannon(*worse) < found - 1e-4


def test_information_pairs_samples_within_each_representation():
  x = jnp.array([[[1.0], [2.0], [3.0]], [[-1.0], [0.5], [4.0]]])  # [K, B, 1]
  y = x[..., ::-1, :] - 1.0
  product = lambda x, y: (x * y)[..., 0]  # noqa: E731
  softplus = lambda w: np.log1p(np.exp(w))  # noqa: E731
  xs, ys = np.asarray(x, np.float64)[..., 0], np.asarray(y, np.float64)[..., 0]
  joint = np.mean([-softplus(-xs[k, i] * ys[k, i]) for k in range(2) for i in range(3)])
  apart = {
    "all": [(k, i, j) for k in range(2) for i in range(3) for j in range(3) if i != j],
    "shift": [(k, i, i - 1) for k in range(2) for i in range(3)],
  }
  for negatives, pairs in apart.items():
    expected = joint - np.mean([softplus(xs[k, i] * ys[k, j]) for k, i, j in pairs])
    found = distill.information(product, x, y, negatives)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
  statistics = distill.Statistics(4)
  params = statistics.init(jax.random.key(0), x, y)["params"]
  zeros = jax.tree.map(jnp.zeros_like, params)
  nothing = distill.information(distill.bind(statistics, zeros), x, y)
  np.testing.assert_allclose(nothing, -2 * np.log(2), rtol=1e-6)


def test_the_game_of_a_known_discriminator():
  """D is 3/4 for the teacher's sample, 1/5 for the student's."""
  teacher, student = jnp.log(jnp.array([3.0])), jnp.log(jnp.array([0.25]))
  np.testing.assert_allclose(
    hrlf.judgement(teacher, student), np.log(4 / 5) + np.log(3 / 4), rtol=1e-6
  )
  value = {"saturating": np.log(4 / 5), "nonsaturating": -np.log(1 / 5)}
  slope = {"saturating": -1 / 5, "nonsaturating": -4 / 5}  # of the logit: fooled, and not yet
  for kind in hrlf.CHOICES["adversary_kind"]:
    disguise = functools.partial(hrlf.disguise, kind=kind)
    np.testing.assert_allclose(disguise(student), value[kind], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(disguise)(student), [slope[kind]], rtol=1e-6)


def test_divergence_by_hand():
  teacher, student = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.25, 0.5]])
  expected = 0.5 * np.log(2) + 0.25 * np.log(0.5)
  found = distill.divergence(jnp.log(jnp.asarray(teacher)) + 3.0, jnp.log(jnp.asarray(student)))
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  values = distill.divergence(jnp.array([1.0, 0.0]), jnp.array([0.0, -3.0]))
  np.testing.assert_allclose(values, (0.5 + 4.5) / 2)


@pytest.mark.parametrize(
  ("merge", "shapes"),
  [
    ("stack", [(2, 5, 6), (2, 5, 4), (1, 5, 2)]),
    ("concat", [(1, 5, 12), (1, 5, 8), (1, 5, 2)]),
    ("mean", [(1, 5, 6), (1, 5, 4), (1, 5, 2)]),
  ],
)
def test_scales_pair_what_is_equally_wide(merge, shapes):
  out = {f"scale_{n}": jnp.full((5, d), float(n)) for n, d in enumerate((6, 4, 2, 4, 6), 1)}
  found = hrlf.scales(out, merge)
  assert [x.shape for x in found] == shapes
  np.testing.assert_allclose([x.mean() for x in found], 3.0, rtol=1e-6)
  assert float(found[0].min()) == (3.0 if merge == "mean" else 1.0)


# --- the network


def test_positions_are_those_of_the_transformer():
  table = distill.positions(5, 6)
  np.testing.assert_allclose(table[3, 2], np.sin(3 / 10000 ** (2 / 6)), rtol=1e-5)
  np.testing.assert_allclose(table[3, 5], np.cos(3 / 10000 ** (4 / 6)), rtol=1e-5)


def test_a_missing_modality_is_a_constant_and_the_last_valid_step_stands_for_one():
  model = systems.functional(hrlf.Hrlf(size=4, heads=2, depth=1), head="head")
  params, _ = model.init(jax.random.key(0), toy.SPEC)
  batch = toy.make_batch(6)
  length = batch.audio.x.shape[1]
  full = batch.audio._replace(valid=np.ones((6, length), bool))
  batch = batch._replace(audio=full)
  apply = jax.jit(lambda batch: model.apply(params, batch, {})[0])
  whole, hidden = apply(batch), apply(masking.drop(("audio",))(jax.random.key(0), batch))
  z, missing = np.asarray(whole["z"]), np.asarray(hidden["z"])
  assert np.ptp(missing[:, 1], axis=0).max() < 1e-6 < np.ptp(z[:, 1], axis=0).min()
  np.testing.assert_array_equal(z[:, [0, 2]], missing[:, [0, 2]])
  # C_m = [Q_m; U_m], one after the other
  q, u, h = (np.asarray(whole[name]) for name in ("q", "u", "scale_1"))
  np.testing.assert_array_equal(h[:, 4:8], np.concatenate([q[:, 1], u[:, 1]], -1))
  # the last valid step alone is told apart by its position, the padding is read by nobody
  padded = full._replace(x=np.pad(full.x, ((0, 0), (0, 2), (0, 0)), constant_values=9.0))
  padded = padded._replace(
    valid=np.pad(full.valid, ((0, 0), (0, 2))), seen=np.pad(full.seen, ((0, 0), (0, 2), (0, 0)))
  )
  longer = apply(batch._replace(audio=padded))
  np.testing.assert_allclose(longer["z"][:, 1], z[:, 1], atol=1e-6)


def test_unknown_choices_are_refused():
  for name in hrlf.CHOICES:
    with pytest.raises(ValueError, match=name):
      hrlf.make(**{name: "nonsense"})
  with pytest.raises(ValueError, match="heads"):
    hrlf.make(size=6, heads=4)
  config = settings.load("hrlf", "mosi")
  settings.assign_all(config, {"optimizer.learning_rate": 0.5})
  assert config.model.discriminator_rate == 0.5  # the configs' follows the student's
  settings.assign_all(config, {"optimizer.learning_rate": {"name": "cosine", "peak": 1e-3}})
  with pytest.raises(types.UsageError, match="discriminator_rate"):
    build.make_system(config)


def test_choices_other_than_the_defaults_make_systems():
  defaults = hrlf.make.__signature__.parameters
  others = [
    {name: choices[n] for name, choices in hrlf.CHOICES.items() if len(choices) > n} for n in (1, 2)
  ]
  others[0]["student_start"] = "fresh"
  assert all(defaults[name].default != choice for name, choice in others[0].items())
  for settings_ in others:
    system = hrlf.make(**TINY, **settings_)
    params, extra = jax.eval_shape(lambda s=system: s.init(jax.random.key(0), toy.SPEC))
    value, aux = jax.eval_shape(system.loss, params, toy.make_batch(4), None, extra)
    assert value.shape == ()
    assert jax.tree.structure(aux.extra) == jax.tree.structure(extra)


# --- the gradients


@functools.cache
def case():
  """A system, parameters, a masked batch, and the gradients of its phases."""
  system = hrlf.make(**TINY, **WEIGHTS)
  params, extra = system.init(jax.random.key(0), toy.SPEC)
  batch = masking.msm()(jax.random.key(1), jax.tree.map(jnp.asarray, toy.make_batch(8)))
  gradients = [jax.jit(jax.value_and_grad(p.loss, has_aux=True)) for p in system.phases]
  return system, params, extra, batch, gradients


def moved(tree):
  """The parts of a gradient that are not zero."""
  return {name for name, part in tree.items() if any(np.any(g) for g in jax.tree.leaves(part))}


def test_each_phase_moves_its_own_networks():
  system, params, extra, batch, gradients = case()
  own = ({"teacher"}, {"student", "statistics"})
  for phase, gradient, names in zip(system.phases, gradients, own, strict=True):
    grads = gradient(params, batch, None, extra)[1]
    assert moved(grads) == names
    trained, _ = optim.split(params, phase.trains)
    assert {n for n, part in trained.items() if jax.tree.leaves(part)} == names
    touched = [np.any(g) for n in names for g in jax.tree.leaves(grads[n])]
    assert np.mean(touched) > 0.9


def test_the_total_is_the_weighted_sum_of_its_parts():
  _, params, extra, batch, gradients = case()
  value, aux = gradients[1](params, batch, None, extra)[0]
  m = aux.metrics
  frf = m["self"] + m["cross"] + m["recon"]
  total = 2 * m["task"] + 3 * frf - 5 * m["hmi"] + 7 * m["hal"] + 11 * m["kl"]
  np.testing.assert_allclose(value, total, rtol=1e-5)
  value, aux = gradients[0](params, batch, None, extra)[0]
  m = aux.metrics
  np.testing.assert_allclose(
    value, 2 * m["task"] + 3 * (m["self"] + m["cross"] + m["recon"]), rtol=1e-5
  )
  assert aux.extra is not None and set(aux.extra) == {"discriminator", "adam"}
  jax.tree.map(np.testing.assert_array_equal, aux.extra, extra)  # the teacher has no adversary


def test_the_statistics_climb():
  """A small step down the loss's gradient raises the bound."""
  _, params, extra, batch, gradients = case()
  (_, before), grads = gradients[1](params, batch, None, extra)
  step = jax.tree.map(lambda p, g: p - 1e-3 * g, params["statistics"], grads["statistics"])
  (_, after), _ = gradients[1]({**params, "statistics": step}, batch, None, extra)
  assert after.metrics["hmi"] > before.metrics["hmi"] + 1e-6


def test_the_discriminators_step_first_and_the_student_plays_against_what_they_became():
  """The game alone: D's step is Adam's up Eq. 9, the student's gradient that of fixed D."""
  rate, batch = 0.01, case()[3]
  off = dict.fromkeys(("task_weight", "frf_weight", "hmi_weight", "kl_weight"), 0.0)
  system = hrlf.make(**TINY, **off, discriminator_rate=rate)
  params, extra = case()[1:3]
  model = systems.functional(hrlf.Hrlf(size=4, heads=2, depth=1), head="head")

  def logits(discriminator, student):
    whole = model.predict(params["teacher"], masking.complete(batch), {})
    ours = model.predict(student, batch, {})
    pairs = zip(hrlf.scales(whole, "stack"), hrlf.scales(ours, "stack"), strict=True)
    judges = [distill.bind(hrlf.Discriminator(), discriminator[f"scale_{n}"]) for n in range(3)]
    return [(d(x), d(y)) for d, (x, y) in zip(judges, pairs, strict=True)]

  def eq9(discriminator):
    p = [(jax.nn.sigmoid(t), jax.nn.sigmoid(s)) for t, s in logits(discriminator, student)]
    return jnp.stack([jnp.log(1 - s).mean() + jnp.log(t).mean() for t, s in p]).sum()

  def fool(student, discriminator):
    p = [jax.nn.sigmoid(s) for _, s in logits(discriminator, student)]
    return jnp.stack([jnp.log(1 - s).mean() for s in p]).sum()

  student, old = params["student"], extra["discriminator"]

  @jax.jit
  def both(params, extra):
    (value, aux), found = jax.value_and_grad(system.loss, has_aux=True)(params, batch, None, extra)
    expected = jax.value_and_grad(fool)(params["student"], aux.extra["discriminator"])
    return aux.extra["discriminator"], (value, found), expected, jax.value_and_grad(eq9)(old)

  new, (value, found), (expected, gradient), (before, up) = both(params, extra)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for g, h in zip(jax.tree.leaves(found["student"]), jax.tree.leaves(gradient), strict=True):
    np.testing.assert_allclose(g, h, rtol=1e-3, atol=1e-6)
  assert moved(found) == {"student"}
  jax.tree.map(
    lambda n, o, g: (
      np.testing.assert_allclose(n - o, rate * np.sign(g), atol=1e-3 * rate)
      if np.abs(g).min() > 1e-4
      else None
    ),
    *jax.device_get((new, old, up)),
  )
  after = jax.jit(eq9)(new)
  assert after > before


def test_the_student_reads_what_is_observed_and_the_teacher_everything():
  _, params, extra, batch, gradients = case()
  for n in types.MODALITIES:
    m = getattr(batch, n)
    batch = batch._replace(**{n: m._replace(x=jnp.where(m.seen, m.x, m.x + 1.0))})
  clean = case()[3]
  (value, one), (other_value, other) = (
    gradients[1](params, b, None, extra)[0] for b in (clean, batch)
  )
  for name in ("task", "self", "cross", "recon"):  # of the student alone
    np.testing.assert_array_equal(one.metrics[name], other.metrics[name])
  assert all(one.metrics[name] != other.metrics[name] for name in ("hmi", "hal", "kl"))
  assert value != other_value
  # the teacher does not notice the mask
  seen, whole = (
    gradients[0](params, b, None, extra)[0][0] for b in (clean, masking.complete(clean))
  )
  assert seen == whole


def test_every_part_can_be_left_out():
  batch, key = toy.make_batch(4), jax.random.key(0)
  game = {"hal", "told_apart"}
  every = {"task", "self", "cross", "recon", "hmi", "kl", *game}
  gone = {"frf": {"self", "cross", "recon"}, "hmi": {"hmi"}, "hal": game, "kl": {"kl"}}
  assert config_lib.ABLATIONS.keys() == {"components", *gone}
  for ablation in config_lib.ABLATIONS["components"].values():
    config = settings.load("hrlf", "mosi")
    settings.assign_all(config, ablation)
    system = build.make_system(config)
    params, extra = jax.eval_shape(lambda s=system: s.init(key, toy.SPEC))
    (name,) = (entry.removeprefix("model.").removesuffix("_weight") for entry in ablation)
    metrics = jax.eval_shape(system.loss, params, batch, key, extra)[1].metrics
    assert set(metrics) == every - gone.pop(name)
  assert not gone
  for frf, names in ((True, every - {"hmi", "kl", *game}), (False, {"task"})):
    loss = hrlf.make(teacher_frf=frf).phases[0].loss
    assert set(jax.eval_shape(loss, params, batch, key, {})[1].metrics) == names


def test_a_run_with_msm_is_tested_at_the_rates_of_another_mask():
  config = settings.load("hrlf", "mosi")
  with pytest.raises(types.UsageError, match="takes no rate"):
    build.test_mask(config)
  settings.switch(config, "mask", "bernoulli")
  masked = build.test_mask(config)(1.0)(jax.random.key(0), toy.make_batch(2))
  assert not any((m.seen & m.valid[..., None]).any() for m in masked[:3])


def test_the_student_starts_as_it_is_told():
  params = {"teacher": {"a": jnp.ones(2)}, "student": {"a": jnp.zeros(2)}}
  source: Any = None
  for start, value in (("fresh", 0.0), ("teacher", 1.0)):
    begin = hrlf.make(**TINY, student_start=start).phases[1].on_epoch
    assert begin is not None
    for epoch, expected in ((0, 0.0), (1, value), (2, 0.0)):
      student = begin(params, {}, epoch, source)[0]["student"]
      assert student["a"].tolist() == [expected, expected]


# --- it learns


@pytest.fixture(scope="module")
def dataset():
  arrays = synthetic.make_arrays(num_train=300, num_valid=64, num_test=2)
  return data.from_arrays(arrays, name="synthetic")


def run():
  """Trains in M³S, with all settings at their defaults but for sizes and epochs.

  Returns the reports, and the validation error of the teacher and of a constant.
  """
  arrays = synthetic.make_arrays(num_train=300, num_valid=100, num_test=2)
  dataset = data.from_arrays(arrays, name="synthetic")
  system = hrlf.make(size=8, heads=2, depth=1, teacher_epochs=10)
  recipe = train.Recipe(
    system,
    meta.METHODS["m3s"](masking.msm(), optimizer=dict(name="sgd", learning_rate=1e-3)),
    {phase.name: optim.make(learning_rate=3e-3) for phase in system.phases},
    batch_size=16,
    epochs=16,
  )
  condition = evaluate.Condition("missing", "msm", masking.msm, {})
  validate = evaluate.make_validator(system, dataset.valid, dataset.spec, condition)
  key = jax.random.key(0)
  progress = train.start(recipe, dataset.train, dataset.spec, key)
  reports = list(train.fit(recipe, dataset.train, {"valid": validate}, progress, key))
  params = reports[-1].progress.state.params
  teacher = validate({**params, "student": params["teacher"]}, {})["mae"]
  constant = np.abs(dataset.valid.label - np.median(dataset.train.label)).mean()
  return reports, teacher, constant


@pytest.mark.slow
def test_it_learns():
  """With the paper's weights, the student beats a constant and its teacher on damaged data."""
  reports, teacher, constant = run()
  student = [r.train for r in reports if "student/loss" in r.train]
  assert len(student) == 6
  assert student[-1]["student/hmi"] > student[0]["student/hmi"]
  assert reports[-1].progress.best["valid/mae"].score < min(0.85 * constant, teacher)
