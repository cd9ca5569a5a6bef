"""Hard masks: of several masks that are drawn, the one with the largest loss is trained on."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mmjax import types

BY = ("row", "batch")


def check(hard_masks: int, hard_by: str) -> None:
  """Raises a UsageError on settings that `hardest` does not have."""
  if hard_masks < 1:
    raise types.UsageError(f"hard_masks is {hard_masks}, expected at least 1.")
  if hard_by not in BY:
    raise types.UsageError(f"hard_by is {hard_by!r}, expected one of {BY}.")


def hardest(
  loss: types.LossFn, mask: types.MaskFn, hard_masks: int, hard_by: str = "row"
) -> Callable[[types.Params, types.Batch, types.PRNGKey, types.Extra], types.Batch]:
  """A mask that looks at the loss: of M drawn, it takes the hardest.

  The losses that are compared have no dropout (their key is None) and no derivative.

  Args:
    loss: the model's loss.
    mask: draws the missing data.
    hard_masks: M ≥ 1; 1 is the mask itself, draw for draw.
    hard_by: "row": each sample takes its own hardest mask, by the loss of a batch that is this
      sample alone. A loss that is a mean over samples is compared exactly so. Of one that also
      compares samples with each other (MISA's similarity, MMIM's contrast) those terms say
      nothing of a batch of one, and the rest decides. "batch": M masks of the whole batch, of
      which the one with the largest loss stays, the right one for every loss.

  Returns:
    `(params, batch, key, extra) -> batch` with less seen.

  Raises:
    UsageError: on other settings; when it is applied with hard_by="row", on whole conversations,
      whose samples have no loss of their own.
  """
  check(hard_masks, hard_by)

  def choose(params, batch, key, extra):
    if hard_masks == 1:
      return mask(key, batch)
    if hard_by == "row" and types.places(batch).shape[1] > 1:
      raise types.UsageError(
        "an utterance of a conversation has no loss of its own: hard_by='batch' compares masks of"
        " the whole batch."
      )
    params, extra = jax.lax.stop_gradient((params, extra))
    drawn = jax.vmap(lambda key: _seen(mask(key, batch)))(jax.random.split(key, hard_masks))

    def value(batch, seen):
      return loss(params, _with(batch, seen), None, extra)[0]

    def row_value(batch, seen):
      return value(*jax.tree.map(lambda a: a[None], (batch, seen)))

    one = jax.vmap(row_value) if hard_by == "row" else value
    values = jax.vmap(one, (None, 0))(batch, drawn)  # [M, B] or [M]
    worst = jnp.argmax(values, axis=0)
    if hard_by == "row":
      return _with(batch, jax.tree.map(lambda a: jax.vmap(_at, (1, 0))(a, worst), drawn))
    return _with(batch, jax.tree.map(lambda a: _at(a, worst), drawn))

  return choose


def _at(a, place):
  return a[place]


def _seen(batch: types.Batch) -> dict[str, types.Array]:
  return {name: getattr(batch, name).seen for name in types.MODALITIES}


def _with(batch: types.Batch, seen: dict[str, types.Array]) -> types.Batch:
  new = {name: getattr(batch, name)._replace(seen=seen[name]) for name in types.MODALITIES}
  return batch._replace(**new)
