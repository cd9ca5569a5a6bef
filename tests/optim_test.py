import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmjax import optim, types

PARAMS = {"bert": {"w": jnp.ones(3)}, "audio": {"w": jnp.ones(2), "b": jnp.ones(())}}


@pytest.fixture(autouse=True)
def promotion():
  """Schedules and optimizers of optax, called without ours around them, promote."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def updates(optimizer, grads, params=PARAMS, count=1):
  state = optimizer.init(params)
  for _ in range(count):
    found, state = optimizer.update(grads, state, params)
  return found


def ones(scale=1.0):
  return jax.tree.map(lambda p: scale * jnp.ones_like(p), PARAMS)


def test_split_and_merge_are_inverse():
  chosen, rest = optim.split(PARAMS, "^audio/")
  assert chosen["bert"]["w"] is None and rest["audio"]["b"] is None
  assert jax.tree.structure(optim.merge(chosen, rest)) == jax.tree.structure(PARAMS)
  with pytest.raises(ValueError, match="vision"):
    optim.split(PARAMS, "vision")


def test_the_first_matching_group_decides():
  groups = (("^bert/", dict(learning_rate=0.1)), ("w$", dict(learning_rate=0.2)))
  for number, of_audio in ((0, -0.5), (1, -0.5), (2, -0.2)):
    optimizer = optim.make(name="sgd", learning_rate=0.5, groups=groups[:number])
    found = updates(optimizer, ones())
    np.testing.assert_allclose(found["bert"]["w"], -0.1 if number else -0.5, rtol=1e-6)
    np.testing.assert_allclose(found["audio"]["w"], of_audio, rtol=1e-6)
    np.testing.assert_allclose(found["audio"]["b"], -0.5, rtol=1e-6)


def test_clipping_comes_before_the_groups():
  by_value = optim.make(name="sgd", learning_rate=1.0, clip_value=0.5)
  np.testing.assert_allclose(updates(by_value, ones(3.0))["bert"]["w"], -0.5)
  by_norm = optim.make(name="sgd", learning_rate=1.0, clip_norm=1.0)
  np.testing.assert_allclose(optax.tree.norm(updates(by_norm, ones(3.0))), 1.0, rtol=1e-6)


def test_accumulation_sums_as_pytorch_does():
  optimizer = optim.make(name="sgd", learning_rate=1.0, accumulate=3)
  state = optimizer.init(PARAMS)
  found = []
  for _ in range(3):
    update, state = optimizer.update(ones(), state, PARAMS)
    found.append(float(update["audio"]["b"]))
  np.testing.assert_allclose(found, [0, 0, -3])


def test_accumulated_sums_are_clipped_after_every_addition():
  optimizer = optim.make(name="sgd", learning_rate=1.0, accumulate=3, clip_value=1.0)
  state = optimizer.init(PARAMS)
  for _ in range(2):
    for gradient in (0.5, 1.5, -0.25):
      update, state = optimizer.update(ones(gradient), state, PARAMS)
    np.testing.assert_allclose(update["audio"]["b"], -0.75)  # -(min(0.5 + 1.5, 1) - 0.25)


def test_weight_decay_of_adam_enters_the_gradient():
  """With one Adam step lr * sign(g + wd * p): the decay flips the sign here."""
  plain = updates(optim.make(learning_rate=0.1), ones(-1.0))
  decayed = updates(optim.make(learning_rate=0.1, weight_decay=2.0), ones(-1.0))
  np.testing.assert_allclose(plain["audio"]["b"], 0.1, rtol=1e-4)
  np.testing.assert_allclose(decayed["audio"]["b"], -0.1, rtol=1e-4)


@pytest.mark.parametrize(
  "name, at, expected",
  [
    ("cosine", 0, 1.0),
    ("cosine", 100, 0.0),
    ("warmup_cosine", 0, 0.0),
    ("warmup_cosine", 10, 1.0),
    ("warmup_cosine", 100, 0.0),
    ("warmup_linear", 55, 0.5),
    ("hold_linear", 50, 1.0),
    ("hold_linear", 75, 0.5),
    ("step", 49, 1.0),
    ("step", 50, 0.1),
  ],
)
def test_schedules(name, at, expected):
  rate = optim.schedule({"name": name, "peak": 1.0}, 100)
  np.testing.assert_allclose(rate(at), expected, atol=1e-6)


@pytest.mark.parametrize(
  "settings, total, expected",
  [
    (dict(name="warmup_linear", warmup=1.0), 4, [0, 0.25, 0.5, 0.75, 1, 0]),
    (dict(name="warmup_linear"), 2, [1, 0.5, 0]),
    (dict(name="warmup_linear", warmup=0.3), 5, [0, 1, 0.75, 0.5, 0.25, 0]),
    (dict(name="hold_linear"), 5, [1, 1, 1, 2 / 3, 1 / 3, 0]),
    (dict(name="step"), 5, [1, 1, 0.1, 0.1, 0.01]),
    (dict(name="hold_linear", hold=1.0), 2, [1, 1, 1, 0]),
    (dict(name="step"), 1, [1, 0.1, 0.01]),
    (dict(name="epoch_warmup_cosine", epochs=4, warmup=0.25), 2, [0, 1, 1, 0.75, 0.25, 0.25]),
    (dict(name="epoch_warmup_cosine"), 2, [0, 0, 0.97552826]),
  ],
)
def test_schedules_of_a_few_steps_and_at_their_ends(settings, total, expected):
  rate = optim.schedule({**settings, "peak": 1.0}, total)
  found = [rate(jnp.int32(n)) for n in range(len(expected))]
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_by_default_it_is_adam_at_a_thousandth():
  chex.assert_trees_all_equal(
    *(updates(o, ones(1e-7), count=3) for o in (optim.make(), optax.adam(1e-3)))
  )
  for settings in (dict(total_steps=3), dict(accumulate=1), dict(groups=())):
    chex.assert_trees_all_equal(
      *(updates(optim.make(name="sgd", **s), ones()) for s in (settings, {}))
    )


def test_a_schedule_lasts_as_many_updates_as_there_are():
  """Of one step by default; of six steps that are accumulated by threes: two."""
  rate = dict(name="hold_linear", peak=1.0)
  for count, settings in ((2, {}), (9, dict(total_steps=6, accumulate=3))):
    optimizer = optim.make(name="sgd", learning_rate=rate, **settings)
    np.testing.assert_allclose(updates(optimizer, ones(), count=count)["audio"]["w"], 0)
  assert rate == dict(name="hold_linear", peak=1.0)  # what is given stays as it is
  assert type(optim.schedule(1, 10)) is float


def test_nothing_of_ours_needs_promotion():
  with jax.numpy_dtype_promotion("strict"):
    optimizer = optim.make(
      learning_rate=dict(name="epoch_warmup_cosine", peak=0.1),
      weight_decay=0.1,
      clip_value=1.0,
      clip_norm=1.0,
      accumulate=2,
      plateau={},
      groups=(("^bert", dict(name="sgd", momentum=0.9)),),
    )
    updates(optimizer, ones(), count=2)


def test_an_optimizer_without_extra_arguments_is_given_them():
  plain = optax.GradientTransformation(lambda params: (), lambda grads, state, params: (grads, ()))
  found, _ = optim.permissive(plain).update(ones(), (), PARAMS, value=1.0)
  chex.assert_trees_all_equal(found, ones())


@pytest.mark.parametrize("total", [15, 100])
@pytest.mark.parametrize("warmup, end", [(0.1, 0.0), (0.3, 0.2)])
def test_a_cosine_respects_its_warmup(total, warmup, end):
  rate = optim.schedule({"name": "cosine", "peak": 2.0, "warmup": warmup, "end": end}, total)
  rise = int(warmup * total)
  at = np.arange(total + 1)
  turn = np.pi * (at - rise) / (total - rise)
  expected = 2 * np.where(at < rise, at / rise, end + (1 - end) * (1 + np.cos(turn)) / 2)
  np.testing.assert_allclose([rate(n) for n in at], expected, atol=1e-6)


def test_a_rate_that_moves_once_an_epoch():
  """By hand, ten epochs of four steps: a rise over 2, one more at the peak, then the cosine."""
  settings = {"name": "epoch_warmup_cosine", "peak": 1.0, "epochs": 10, "warmup": 0.2}
  rate = optim.schedule(settings, 40)
  epochs = np.arange(10)
  cosine = 0.5 * (1 + np.cos(np.pi * (epochs - 2 - 1) / 8))
  expected = np.repeat(np.where(epochs <= 2, epochs / 2, cosine), 4)
  np.testing.assert_allclose([rate(jnp.int32(n)) for n in range(40)], expected, atol=1e-6)


def test_schedules_and_optimizers_of_optax_by_their_names():
  rate = optim.schedule(
    {
      "name": "polynomial_schedule",
      "init_value": 1.0,
      "end_value": 0.0,
      "power": 2,
      "transition_steps": 10,
    },
    99,
  )
  np.testing.assert_allclose(rate(5), 0.25)
  for name, settings in {
    "adam": dict(b1=0.5, b2=0.6, eps=1e-3),
    "adamw": dict(b2=0.9, weight_decay=0.3),
    "sgd": dict(momentum=0.9, nesterov=True),
    "lion": dict(weight_decay=0.1),
    "rmsprop": dict(decay=0.5),
  }.items():
    ours = optim.make(name=name, learning_rate=0.1, **settings)
    theirs = getattr(optax, name)(0.1, **settings)
    chex.assert_trees_all_equal(*(updates(o, ones(0.3), count=3) for o in (ours, theirs)))


def test_polyak_reads_the_value_through_the_whole_chain():
  optimizer = optim.make(name="polyak_sgd", max_learning_rate=10.0, clip_value=9.0, accumulate=2)
  state = optimizer.init(PARAMS)
  for _ in range(2):
    found, state = optimizer.update(ones(0.5), state, PARAMS, value=3.0)
  # sums of two gradients of 0.5: the rate is 3 / |1|², of six entries
  np.testing.assert_allclose(found["audio"]["b"], -0.5, rtol=1e-5)


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(name="adamm"), "unknown optimizer 'adamm' .did you mean 'adam"),
    (
      dict(bb1=0.9),
      "optimizer 'adam' has no setting 'bb1' .did you mean 'b1'.*; there are learning_rate, .*eps",
    ),
    (dict(name="sgd", b1=0.9), "optimizer 'sgd' has no setting 'b1'.*momentum"),
    (dict(groups=(("bert", dict(rate_typo=1)),)), "rate_typo"),
    (dict(learning_rate={"name": "cosine", "peak": 1.0, "peek": 1}), "'peek'.*'peak'.*warmup, end"),
    (dict(learning_rate={"name": "step", "peak": 1.0, "warmup": 0.1}), "no setting 'warmup'"),
    (dict(learning_rate={"name": "cosine"}), "needs the setting 'peak'"),
    (dict(learning_rate={"name": "cosin", "peak": 1.0}), "did you mean 'cosine'"),
    (dict(learning_rate={"peak": 1.0}), "has no name"),
    (dict(plateau=dict(patiense=1)), "'patiense'.*'patience'"),
  ],
)
def test_unknown_settings_are_named(settings, message):
  with pytest.raises(types.UsageError, match=message):
    optim.make(**settings)


def test_a_group_of_another_optimizer_takes_its_own_settings():
  groups = (("^bert/", dict(name="sgd")), ("^audio/w", dict(b1=0.2)))
  optimizer = optim.make(learning_rate=0.1, b1=0.5, weight_decay=2.0, groups=groups)
  found = updates(optimizer, ones(-1.0))
  np.testing.assert_allclose(found["bert"]["w"], -0.1 * (-1 + 2), rtol=1e-6)
  np.testing.assert_allclose(found["audio"]["b"], -0.1, rtol=1e-4)


@pytest.mark.parametrize("scale", [0.1, 3.0, 0.0])
def test_clipping_a_norm_is_optax_bit_for_bit(scale):
  for limit in (0.5, 1.0):
    clip = [jax.jit(c(limit).update) for c in (optim.clip_by_norm, optax.clip_by_global_norm)]
    for dtype in (jnp.float32, jnp.bfloat16):
      grads = jax.tree.map(lambda g: g.astype(dtype), ones(scale))  # noqa: B023
      found, expected = (c(grads, optax.EmptyState())[0] for c in clip)
      chex.assert_trees_all_equal(found, expected)
      chex.assert_trees_all_equal_dtypes(found, grads)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name, rate", [("sgd", 0.25), ("adam", 1e-6)])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_differentiable_optimizer_is_finite_at_a_zero_gradient(dtype, name, rate, grouped):
  """The derivative of clipping is the identity's there, and so the step's is sgd's."""
  clip = dict(clip_norm=1.0)
  clip = dict(groups=(("", clip),)) if grouped else clip
  optimizer = optim.make(name=name, learning_rate=rate, differentiable=True, **clip)
  params = {"w": jnp.zeros(2, dtype)}

  def moved(grads):
    return optimizer.update({"w": grads}, optimizer.init(params), params)[0]["w"].sum()

  value, found = jax.value_and_grad(moved)(jnp.zeros(2, dtype))
  assert value == 0 and np.isfinite(np.float32(found)).all()
  if name == "sgd":
    np.testing.assert_array_equal(np.float32(found), -0.25)


def test_half_precision_is_updated_in_float32():
  """Float16 Adam at a zero gradient is no 0 / 0; its updates are float32's, rounded."""
  half = {"w": jnp.float16([0.0, 0.5, -2.0])}
  wide = jax.tree.map(lambda a: a.astype(jnp.float32), half)
  optimizer = optim.make(learning_rate=0.1, weight_decay=0.1)
  found, expected = (updates(optimizer, tree, tree, count=3)["w"] for tree in (half, wide))
  assert found.dtype == jnp.float16 and found[0] == 0
  np.testing.assert_array_equal(found, expected.astype(jnp.float16))


def test_double_precision_stays_what_it_is():
  with jax.enable_x64(True):
    params = {"w": jnp.float64([0.1, -2.0])}
    grads = {"w": jnp.float64([0.3, 1e-3])}
    ours, theirs = (updates(o, grads, params) for o in (optim.make(), optax.adam(1e-3)))
  assert ours["w"].dtype == jnp.float64
  chex.assert_trees_all_equal(ours, theirs)


def test_a_groups_norm_is_clipped_on_its_own():
  groups = (("^bert/", dict(clip_norm=1.0)), ("^audio/", dict(clip_norm=2.0)))
  found = updates(optim.make(name="sgd", learning_rate=1.0, groups=groups), ones(3.0))
  np.testing.assert_allclose(optax.tree.norm(found["bert"]), 1.0, rtol=1e-6)
  np.testing.assert_allclose(optax.tree.norm(found["audio"]), 2.0, rtol=1e-6)


def test_a_plateau_reduces_the_rate():
  """By hand: patience 1, so the second epoch without a better score halves, and so on."""
  optimizer = optim.make(
    name="sgd", learning_rate=1.0, plateau=dict(factor=0.5, patience=1), accumulate=2
  )
  state, rates = optimizer.init(PARAMS), []
  for score in (-2.0, -1.0, -1.0, -1.00005, -0.99995, -0.5, -0.6, -0.7):
    state = optim.observe(state, score)
    for _ in range(2):
      update, state = optimizer.update(ones(), state, PARAMS)
    rates.append(-float(update["audio"]["b"]) / 2)
  # an improvement by less than the threshold is none
  np.testing.assert_allclose(rates, [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25])

  # by default a score gets 20 epochs to improve by a ten-thousandth, and the rate is halved
  state, scales = optim.reduce_on_plateau().init(PARAMS), []
  for score in (1.0, *[1.00009] * 21, 1.00011):
    state = optim.observe(state, score)
    scales.append(float(state.scale))
  assert scales == [1.0] * 21 + [0.5] * 2 and float(state.best) == np.float32(1.00011)
  # at 0 no improvement is one; a state is arrays alone, and updates keep their precision
  plateau = optim.reduce_on_plateau(patience=1)
  state = plateau.init(PARAMS)
  assert [a.dtype.kind for a in state] == [*"ffifif"]
  for _ in range(3):
    state = optim.observe(state, 0.0)
  found, _ = plateau.update({"w": jnp.bfloat16(3.0)}, state)
  assert found["w"].dtype == jnp.bfloat16 and float(found["w"]) == 1.5
