import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmjax import optim

PARAMS = {"bert": {"w": jnp.ones(3)}, "audio": {"w": jnp.ones(2), "b": jnp.ones(())}}


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
  optimizer = optim.make(name="sgd", learning_rate=0.5, groups=groups)
  found = updates(optimizer, ones())
  np.testing.assert_allclose(found["bert"]["w"], -0.1, rtol=1e-6)
  np.testing.assert_allclose(found["audio"]["w"], -0.2, rtol=1e-6)
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


def test_unknown_settings_are_named():
  with pytest.raises(ValueError, match="adagrad"):
    optim.make(name="adagrad")
  with pytest.raises(ValueError, match="rate_typo"):
    optim.make(groups=(("bert", dict(rate_typo=1)),))
  with pytest.raises(ValueError, match="peek"):
    optim.schedule({"name": "cosine", "peak": 1.0, "peek": 1}, 10)


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
