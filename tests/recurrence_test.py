"""The LSTM's own backward pass against the plain scan, and what it saves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import recurrence

B, D, H = 4, 3, 5


def draw(steps, longest=None):
  """Sequences of several lengths, weights of two directions, and what their outputs weigh."""
  random, longest = np.random.default_rng(steps), longest or steps
  x = random.normal(size=(steps, B, D))
  valid = np.arange(steps)[:, None] < np.array([longest, longest // 2, 1, 0])
  weights = [
    tuple(random.normal(size=shape) * 0.5 for shape in ((D, 4 * H), (H, 4 * H), (4 * H,)))
    for _ in range(2)
  ]
  return x, valid, weights, random.normal(size=(steps, B, H)), random.normal(size=(B, H))


def make_loss(case, valid, of_outputs, of_final):
  def weigh(outputs, final):
    return jnp.sum(jnp.sin(outputs) * of_outputs) + jnp.sum(final**2 * of_final)

  def loss(x, weights):
    if case != "both":
      return weigh(*recurrence.lstm(x, valid, *weights[0], reverse=case == "backward"))
    outputs, finals = recurrence.bilstm(x, valid, *weights)
    return weigh(outputs[0], finals[0]) + weigh(jnp.cos(outputs[1]), finals[1])

  return loss


@pytest.mark.parametrize(
  ("case", "steps", "longest"),
  [("forward", 1, 1), ("forward", 13, 13), ("backward", 13, 4), ("both", 13, 13), ("both", 13, 4)],
)
def test_it_equals_the_plain_scan_to_the_second_derivative(case, steps, longest):
  x, valid, weights, *scales = draw(steps, longest)
  loss = make_loss(case, valid, *scales)
  gradient = jax.grad(loss, (0, 1))

  def all_of(x, weights):
    def of_gradient(x, weights):
      return sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(gradient(x, weights)))

    forward_over_reverse = jax.jvp(gradient, (x, weights), (x, weights))[1]
    return (
      loss(x, weights),
      gradient(x, weights),
      jax.grad(of_gradient, (0, 1))(x, weights),
      forward_over_reverse,
    )

  with jax.enable_x64(True):
    found = jax.jit(all_of)(x, weights)
    with recurrence.plain():
      expected = jax.jit(lambda *args: all_of(*args))(x, weights)
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", ["forward", "backward", "both"])
def test_chunks_of_padding_alone_are_not_computed(case):
  x, valid, weights, *scales = draw(13, longest=5)  # in chunks of five
  gradient = jax.jit(jax.grad(make_loss(case, valid, *scales), (0, 1)))
  found = gradient(np.where(np.arange(13)[:, None, None] < 5, x, np.nan), weights)
  jax.tree.map(np.testing.assert_array_equal, found, gradient(x, weights))


def test_a_gradient_keeps_states_and_not_gates():
  x, valid, weights, *scales = draw(400)
  loss = make_loss("forward", valid, *scales)

  def temporaries():
    gradient = jax.jit(lambda x, weights: jax.grad(loss, 1)(x, weights))
    return gradient.lower(x, weights).compile().memory_analysis().temp_size_in_bytes

  ours = temporaries()
  with recurrence.plain():
    plain = temporaries()
  assert ours < plain / 2
