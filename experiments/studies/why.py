"""Why meta-sampling helps or does not: how an inner step moves what is trained, along a training.

With θ* = θ - α g_s the first-order meta-gradient is the query's gradient at θ*. To first order in
α, over independent support and query sets of one distribution, its expectation is that of SPL-TRN's
gradient minus α E[H] E[g], the gradient of α/2 |E[g]|²: what M³S adds in expectation is a step down
from L - α/2 |∇L|², of the size of α. (Nichol et al. 2018, arXiv 1803.02999, §5, for K steps.)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmjax import data, meta, optim, types

from .. import build, settings

# In the order of the tables: what each is of `measure`.
NAMES = (
  "cosine support, query",
  "distance",
  "relative distance",
  "cosine at θ*, at θ",
  "relative change",
  "bias",
  "noise",
)


def make_measure(
  run: build.Run, like: settings.Config, *, draws: int = 16, seed: int = 0
) -> Callable[[types.Params, types.Extra], dict[str, float]]:
  """An evaluator that looks at gradients on the training split.

  Args:
    run: the run that trains, by whatever method.
    like: the config of an M³S run, whose inner loop is looked at (its rates, K and masks).
    draws: pairs of support and query sets of B rows each, the same after every epoch.
    seed: of the rows, their masks and dropout.

  Returns:
    `(params, extra) -> `: means over the draws of
      "cosine support, query": of the two sets' gradients at θ;
      "distance": |θ* - θ|, and "relative distance", by |θ|;
      "cosine at θ*, at θ": of the query's gradient at θ* and at θ, where SPL-TRN takes it, under
      the same mask; and "relative change", |g(θ*) - g(θ)| / |g(θ)|;
    and of the means over the draws, beside that of g(θ):
      "bias": |mean of g(θ*) - g(θ)|, what M³S adds to SPL-TRN in expectation;
      "noise": the standard deviation of g(θ), from draw to draw.
  """
  phase, batch_size = run.recipe.system.phases[-1], run.recipe.batch_size
  mask, given = build.make_mask(run.config), settings.plain(like.method)
  inner = optim.make(**given.get("optimizer", dict(name="sgd", learning_rate=1e-3)))
  train = run.dataset.train
  rows = min(batch_size, len(train.index) // 2)

  @jax.jit
  def measure(params, extra, train):
    trained, constant = optim.split(params, phase.trains)

    def loss(params, batch, key, extra):
      return phase.loss(optim.merge(params, constant), batch, key, extra)

    def one(key):
      order = jax.random.permutation(jax.random.fold_in(key, 0), train.index.shape[0])
      support, query = data.take(train, order[:rows]), data.take(train, order[rows : 2 * rows])
      keys = meta.meta_keys(jax.random.fold_in(key, 1), given.get("inner_steps", 1), False)
      adapted, _ = meta.adapt(
        loss,
        mask,
        trained,
        support,
        keys,
        extra,
        optimizer=inner,
        order="first",
        inner_trains=given.get("inner_trains", ""),
      )
      query = mask(keys.query_mask, query)
      gradient = lambda p, batch, key: jax.grad(loss, has_aux=True)(p, batch, key, extra)[0]  # noqa: E731
      of_support = gradient(trained, mask(keys.support_mask[0], support), keys.support_loss[0])
      before = gradient(trained, query, keys.query_loss)
      after = gradient(adapted, query, keys.query_loss)
      moved = optax.tree.norm(optax.tree.sub(adapted, trained))
      change = optax.tree.sub(after, before)
      found = (
        _cosine(of_support, before),
        moved,
        moved / optax.tree.norm(trained),
        _cosine(after, before),
        optax.tree.norm(change) / optax.tree.norm(before),
      )
      return jnp.stack(found), (before, change, optax.tree.norm(before, squared=True))

    each = jax.random.split(jax.random.key(seed), draws)
    found, (before, change, square) = jax.lax.map(one, each)
    mean = lambda tree: jax.tree.map(lambda a: a.mean(0), tree)  # noqa: E731
    size = optax.tree.norm(mean(before))
    variance = jnp.maximum(square.mean() - size**2, 0.0) * draws / max(draws - 1, 1)
    sizes = jnp.stack([optax.tree.norm(mean(change)), jnp.sqrt(variance)]) / size
    return jnp.concatenate([found.mean(0), sizes])

  def evaluate(params: Any, extra: Any) -> dict[str, float]:
    return dict(zip(NAMES, map(float, measure(params, extra, train)), strict=True))

  evaluate.names = NAMES  # pyright: ignore[reportFunctionMemberAccess]
  return evaluate


def _cosine(a, b):
  return optax.tree.vdot(a, b) / (optax.tree.norm(a) * optax.tree.norm(b))
