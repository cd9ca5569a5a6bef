"""What makes a network a system; and what is particular to one: tables, memories, phases."""

import functools
import inspect
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models_test
from experiments import build, settings
from mmjax import (
  data,
  evaluate,
  layers,
  losses,
  masking,
  meta,
  models,
  optim,
  registry,
  synthetic,
  systems,
  train,
  types,
)
from mmjax.models import mmim, self_mm


@pytest.fixture(scope="module")
def own():
  """The `make` of the example in the documentation of `systems`."""
  documented = inspect.getdoc(systems) or ""
  example = documented.partition("model of your own is\n")[2].partition("\nand `make(")[0]
  names = dict(globals())
  exec(textwrap.dedent(example), names)
  return names["make"]


def test_the_documented_model_is_a_system(own):
  assert registry.settings_of(own) == {"size": 32, "scale": 1.0}
  system = own(size=3, scale=2.0)
  for classes in (0, 3):
    spec = models_test.make_spec(False, classes)
    batch = models_test.make_batch(spec)
    params, extra = system.init(jax.random.key(0), spec)
    assert params["head"]["kernel"].shape == (3, classes or 1) and extra == {}
    value, aux = system.loss(params, batch, None, extra)
    prediction = system.predict(params, batch, extra)["prediction"]
    error = losses.task(prediction, batch.label).mean()
    np.testing.assert_allclose([value, aux.metrics["error"]], [2 * error, error], rtol=1e-6)
  with pytest.raises(TypeError, match="scal.*did you mean 'scale'"):
    own(scal=1.0)


class Normed(nn.Module):
  num_outputs: int = 1

  @nn.compact
  def __call__(self, batch, train):
    x = layers.Dropout(0.5)(layers.BatchNorm(name="norm")(batch.text.x.mean(1), train))
    return {"prediction": layers.prediction(layers.Dense(self.num_outputs, name="head")(x)), "x": x}


class Scaled(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x * self.param("scale", lambda key: x.mean())


def test_initial_variables_are_those_of_linen_and_depend_on_no_values():
  spec, key = models_test.make_spec(False, 0), jax.random.key(3)
  shapes = jax.eval_shape(lambda: types.example_batch(spec))
  found = systems.initial(Normed(), key, shapes, train=True)
  expected = Normed().lazy_init(key, shapes, train=True)
  assert {"params", "batch_stats"} == found.keys()
  jax.tree.map(np.testing.assert_array_equal, found, dict(expected))
  with pytest.raises(ValueError, match="Scaled depend on values"):
    systems.initial(Scaled(), key, jax.ShapeDtypeStruct((3,), jnp.float32))


def test_collections_are_kept_in_extra_and_move_in_training_alone():
  def loss(out, batch, extra):
    return out["prediction"].mean(), types.Aux({}, {**extra, "steps": extra["steps"] + 1})

  make = functools.partial(systems.supervised, Normed(), loss, head="head")
  system = make(collections=("batch_stats",), extra=lambda spec: {"steps": jnp.int32(0)})
  spec = models_test.make_spec(False, 0)
  params, extra = system.init(jax.random.key(0), spec)
  batch = models_test.make_batch(spec)
  _, aux = system.loss(params, batch, None, extra)
  mean = batch.text.x.mean(1).mean(0)
  np.testing.assert_allclose(aux.extra["batch_stats"]["norm"]["mean"], 0.1 * mean, rtol=1e-5)
  assert aux.extra["steps"] == 1 and extra["steps"] == 0
  x = system.predict(params, batch, extra)["x"]  # by the statistics that are kept, no dropout
  np.testing.assert_allclose(x, batch.text.x.mean(1) / np.sqrt(1 + 1e-5), rtol=1e-5)
  with pytest.raises(ValueError, match="batch_stats"):
    make().init(jax.random.key(0), spec)


def test_epochs_are_counted_where_they_are_read():
  _, extra = systems.count_epochs({}, {"epoch": jnp.int32(0), "other": 1}, 7, None)
  assert extra == {"epoch": 7, "other": 1} and extra["epoch"].dtype == jnp.int32
  assert systems.count_epochs({}, {}, 7, None) == ({}, {})


def test_the_main_loss_is_the_last_phases():
  system = models.MODELS["mmim"](**models_test.SETTINGS["mmim"])
  assert [phase.name for phase in system.phases] == ["mi", "main"]
  assert system.loss is system.phases[1].loss


def test_a_healthy_self_mm_runs_while_nans_are_looked_for():
  system, spec = (
    models.MODELS["self_mm"](**models_test.SETTINGS["self_mm"]),
    models_test.make_spec(False, 0),
  )
  params, extra = system.init(models_test.make_key(0), spec)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(extra))
  aux = system.loss(params, models_test.make_batch(spec), None, extra)[1]
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(aux.extra))
  assert aux.extra["met"].sum() == models_test.ROWS


@pytest.mark.slow
def test_bfloat16_trains_to_the_same_error():
  """Of three seeds each: their means differ by less than they scatter, and nothing is a half."""
  arrays = synthetic.make_arrays(seed=0, num_train=96, num_valid=48, num_test=8)
  dataset = data.from_arrays(arrays, name="synthetic")
  system = models.MODELS["self_mm"](**models_test.SETTINGS["self_mm"])
  keys, found = [jax.random.key(seed) for seed in range(3)], {}
  for precision in systems.PRECISIONS:
    plan = train.Recipe(
      system=systems.in_precision(system, precision),
      method=meta.METHODS["m3s"](masking.span(0.3), optimizer=dict(name="sgd", learning_rate=0.01)),
      optimizers={"main": optim.make(learning_rate=0.01)},
      batch_size=16,
      epochs=10,
    )
    condition = evaluate.rate_condition(0.3)
    validate = evaluate.make_validator(plan.system, dataset.valid, dataset.spec, condition)
    starts = [train.start(plan, dataset.train, dataset.spec, key) for key in keys]
    first, *_, last = train.fit(plan, dataset.train, [{"valid": validate}] * 3, starts, keys)
    floats = [a for a in jax.tree.leaves(last[0].progress.state) if "float" in str(a.dtype)]
    assert {a.dtype for a in floats} == {jnp.dtype("float32")}
    errors = [[r.evaluated["valid"]["mae"] for r in reports] for reports in (first, last)]
    assert np.mean(errors[1]) < 0.9 * np.mean(errors[0])
    found[precision] = errors[1]
  exact, halves = found.values()
  assert exact != halves
  assert abs(np.mean(exact) - np.mean(halves)) < np.std(exact)


def test_an_unknown_precision_is_refused():
  config = settings.load("misa:mosi")
  settings.assign(config, "train.precision", "bfloat61")
  with pytest.raises(types.UsageError, match="did you mean 'bfloat16'"):
    build.make_system(config)


def test_moments_add_up_to_those_of_the_union():
  random = np.random.default_rng(0)
  x = random.normal(size=(9, 3)).astype(np.float32)
  chosen = np.array([1, 1, 0, 1, 1, 1, 0, 1, 1], bool)
  parts = [mmim.moments(x[:4], chosen[:4]), mmim.moments(x[4:], chosen[4:])]
  empty = mmim.moments(x[:2], np.zeros(2, bool))
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts, empty)
  total = mmim.total_moments(stacked)
  assert total.count == 7
  np.testing.assert_allclose(total.mean, x[chosen].mean(0), rtol=1e-5)
  covariance = np.cov(x[chosen].T, bias=True)
  np.testing.assert_allclose(total.scatter / 7, covariance, rtol=1e-4, atol=1e-6)
  value, exists = mmim.log_determinant(total)
  np.testing.assert_allclose(value, np.linalg.slogdet(covariance)[1], rtol=1e-4)
  assert exists


def test_an_entropy_that_does_not_exist_is_left_out():
  """Samples that are all alike have no covariance: neither -inf nor NaN may come out."""

  def entropy(scale):
    x = scale * jnp.ones((6, 2))
    return mmim.log_determinant(mmim.moments(x, jnp.ones(6)))[0]

  value, gradient = jax.value_and_grad(entropy)(0.5)
  assert np.isfinite(value) and np.isfinite(gradient)
  assert not mmim.log_determinant(mmim.moments(jnp.ones((6, 2)), jnp.ones(6)))[1]


def test_mmims_memory_fills_and_starts_afresh_each_epoch():
  system = models.MODELS["mmim"](**models_test.SETTINGS["mmim"], memory_size=2)
  spec = models_test.make_spec(False, 0)
  params, extra = system.init(models_test.make_key(0), spec)
  loss = jax.jit(lambda batch, extra: system.loss(params, batch, None, extra)[1])
  seen = []
  for step in range(5):
    if step % 4 == 0:
      _, extra = system.phases[-1].on_epoch(params, extra, step // 4, None)
    aux = loss(models_test.make_batch(spec, seed=step), extra)
    extra = aux.extra
    seen.append((int(extra["batches"]), float(aux.metrics["H"])))
    counts = np.asarray(extra["memory"]["tv"].count).sum(1)
    assert (counts > 0).tolist() == [True, step in (1, 2, 3)]
  assert [batches for batches, _ in seen] == [1, 2, 3, 4, 1]
  assert [entropy != 0 for _, entropy in seen[:3]] == [False] * 3  # while it fills


def tables(labels, features, met):
  label = {task: jnp.asarray(labels, jnp.float32) for task in self_mm.TASKS}
  feature = {task: jnp.asarray(features) for task in self_mm.TASKS}
  return {"label": label, "feature": feature, "met": jnp.array(met)}


def test_labels_are_generated_from_the_second_epoch_on():
  """By hand: centres at (1, 0) and (-1, 0); text lies at the positive one, fusion between."""
  features = np.float32([[1, 0], [-1, 0], [0, 0]])
  before = tables([2.0, -2.0, 1.0], features, met=[True, True, False])
  features = {task: jnp.zeros((1, 2)) for task in self_mm.TASKS}  # equally far: δ = 0
  features["text"] = jnp.float32([[0.5, 0.0]])  # 0.5 from the positive, 1.5 from the negative
  run = functools.partial(self_mm.update_tables, index=jnp.array([1]), bound=3.0)
  first = run(before, features, epoch=jnp.int32(0))
  np.testing.assert_array_equal(first["label"]["text"], before["label"]["text"])
  np.testing.assert_array_equal(first["feature"]["text"][1], features["text"][0])
  second = run(before, features, epoch=jnp.int32(1))
  # δ_text = (1.5 - 0.5) / 0.5 = 2, δ_fusion = 0: α is huge, so the new label is cut at -3
  np.testing.assert_allclose(second["label"]["text"][1], 1 / 3 * -2 + 2 / 3 * -3, rtol=1e-5)
  # audio is as far as fusion: δ = 0 twice, the shifted half alone is left
  np.testing.assert_allclose(second["label"]["audio"][1], 1 / 3 * -2 + 2 / 3 * -1, rtol=1e-5)
  np.testing.assert_array_equal(second["label"]["fusion"], before["label"]["fusion"])


@pytest.mark.parametrize("exclude_zero", [True, False])
def test_centers_leave_out_what_was_not_met(exclude_zero):
  label, met = jnp.float32([1.0, 0.0, -1.0, 0.0, 2.0]), jnp.arange(5) != 3
  feature = jnp.float32([[2.0], [4.0], [8.0], [99.0], [6.0]])
  positive, negative = self_mm.centers(label, feature, met, exclude_zero)
  np.testing.assert_allclose([positive[0], negative[0]], [4.0, 8.0])
  nothing = self_mm.centers(label, feature, jnp.zeros(5, bool), exclude_zero)
  np.testing.assert_array_equal(nothing, np.zeros((2, 1)))


def test_the_complement_is_what_the_student_does_not_see():
  batch = models_test.make_batch(models_test.make_spec(False, 0))
  masked = masking.span(0.5)(jax.random.key(0), batch)
  for name in types.MODALITIES:
    shown, hidden, whole = (
      masking.observed(getattr(b, name))
      for b in (masked, masking.complement(masked), masking.complete(masked))
    )
    np.testing.assert_allclose(shown + hidden, whole)
    np.testing.assert_array_equal(whole, getattr(batch, name).x)
    assert (np.asarray(hidden) != 0).any()


def test_mmins_student_begins_as_its_teacher_and_is_what_gets_selected():
  settings = {**models_test.SETTINGS["mmin"], "teacher_epochs": 2}
  system = models.MODELS["mmin"](**settings)
  spec = models_test.make_spec(False, 0)._replace(num_train=5)
  data = models_test.make_batch(spec)._replace(index=jnp.arange(5))
  rates = {"teacher": 0.01, "student": 0.0}
  plan = train.Recipe(
    system=system,
    method=meta.METHODS["spl"](masking.span(0.5)),
    optimizers={p: optim.make(learning_rate=rate) for p, rate in rates.items()},
    batch_size=5,
    epochs=4,
    patience=2,
  )
  key, scores = jax.random.key(0), iter([0.1, 0.2, 0.5, 0.4])  # the first two do not count
  start = train.start(plan, data, spec, key)
  validate = lambda params, extra: {"mae": next(scores)}  # noqa: E731
  validate.names = ("mae",)  # else it is asked once before the first step
  reports = train.fit(plan, data, {"valid": validate}, start, key)
  found = [(report.improved, jax.device_get(report.progress.state.params)) for report in reports]
  assert [len(improved) for improved, _ in found] == [0, 0, 1, 1]
  student, teacher = found[-1][1]["student"]["encoders"], found[-1][1]["teacher"]["encoders"]
  jax.tree.map(np.testing.assert_array_equal, student, teacher)
  fresh = found[0][1]["student"]["encoders"]["audio"]["rnn"]["w_ih"]
  assert (fresh != teacher["audio"]["rnn"]["w_ih"]).any()
