"""The types that every part of mmjax speaks: batches, masks, losses, phases, systems.

This module imports nothing of ours. Shapes use B for samples, L for steps (frames or
tokens) of one modality and D for its feature channels.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

Array = jax.Array
PRNGKey = jax.Array
Params = Any  # a pytree of arrays, nested dicts as flax makes them
Extra = Mapping[str, Any]  # training arrays that are not parameters: tables, memories, statistics

MODALITIES = ("text", "audio", "vision")  # the one order in which modalities are enumerated


class Modality(NamedTuple):
  """One modality of a batch. `x` is always clean; what a model may read is `observed(m)`.

  Attributes:
    x: [B, L, D] float features, or [B, L] int32 token ids.
    valid: [B, L] bool, True on the real steps, False on padding (real steps come first).
    seen: bool, True where the entry is observed; broadcasts against `x`: [B, L, 1] when
      whole steps go missing, [B, 1, D] when channels do, [B, L] for token ids.
    fill: [B] what replaces an unseen entry: 0 for features, the [UNK] id for tokens.
  """

  x: Array
  valid: Array
  seen: Array
  fill: Array


class Batch(NamedTuple):
  """Samples with their labels. Every leaf has the leading axis B.

  Attributes:
    text, audio, vision: the modalities.
    label: [B] float sentiment (regression) or int32 class.
    index: [B] int32, the sample's row in its split: keys its masks and its table entries.
    weight: [B] float, 1 for a sample, 0 for a row that only fills up the last batch.
    info: further arrays [B, ...], such as "label_text" (SIMS) or "segment_ids".
  """

  text: Modality
  audio: Modality
  vision: Modality
  label: Array
  index: Array
  weight: Array
  info: dict[str, Array]


class ModalitySpec(NamedTuple):
  """Shape of one modality: `length` steps of `dim` channels (`tokens`: ids, `dim` unused)."""

  length: int
  dim: int
  tokens: bool = False


class Spec(NamedTuple):
  """What a system must know of the data to build its parameters and tables.

  Attributes:
    text, audio, vision: shape of each modality.
    num_train: number of training samples (tables have one row for each).
    num_classes: 0 for regression, else the number of classes.
    label_range: smallest and largest label of the dataset's scale, as (-3.0, 3.0).
  """

  text: ModalitySpec
  audio: ModalitySpec
  vision: ModalitySpec
  num_train: int
  num_classes: int = 0
  label_range: tuple[float, float] = (-3.0, 3.0)


def example_batch(spec: Spec, rows: int = 2) -> Batch:
  """A batch of zeros with the shapes of a spec: enough to initialise parameters.

  Args:
    spec: the shapes.
    rows: B.

  Returns:
    The batch, everything valid and seen.
  """

  def modality(m):
    shape = (rows, m.length)
    x = jnp.zeros(shape, jnp.int32) if m.tokens else jnp.zeros((*shape, m.dim))
    seen = jnp.ones(shape if m.tokens else (*shape, 1), bool)
    return Modality(x, jnp.ones(shape, bool), seen, jnp.zeros(rows, x.dtype))

  label = jnp.zeros(rows, jnp.int32 if spec.num_classes else jnp.float32)
  modalities = (modality(getattr(spec, name)) for name in MODALITIES)
  return Batch(*modalities, label, jnp.arange(rows), jnp.ones(rows), {})


class Aux(NamedTuple):
  """What a loss returns beside its value: scalars to log, and the successor of `extra`."""

  metrics: dict[str, Array]
  extra: Extra


# Rewrites `seen` only, with a key of its own for each (modality, batch.index).
MaskFn = Callable[[PRNGKey, Batch], Batch]
# (params, batch, key, extra) -> (scalar, Aux). `key=None` switches all randomness (dropout) off.
LossFn = Callable[[Params, Batch, PRNGKey | None, Extra], tuple[chex.Scalar, Aux]]
# A training method turns the loss of clean batches into the loss that is trained.
Method = Callable[[LossFn], LossFn]


class Phase(NamedTuple):
  """One loss with the parameters it trains; an epoch runs its active phases in order.

  Attributes:
    name: names the phase in logs and optimizer states.
    loss: the loss of this phase.
    trains: regex that is searched in each "a/b/c" parameter path; the rest is constant.
    share: part of the epoch's steps that this phase runs, in (0, 1].
    epochs: first epoch and the one after the last (None: to the end) in which it runs.
    enter: optional `(params, extra) -> (params, extra)`, applied when the phase first starts.
  """

  name: str
  loss: LossFn
  trains: str = ""
  share: float = 1.0
  epochs: tuple[int, int | None] = (0, None)
  enter: Callable[[Params, Extra], tuple[Params, Extra]] | None = None


class System(NamedTuple):
  """A multimodal sentiment model as pure functions.

  Attributes:
    init: `(key, spec) -> (params, extra)`.
    predict: `(params, batch, extra) -> dict`; "prediction" is [B] (regression) or [B, C]
      (logits), "feature" the fused representation [B, D] behind it, the other entries are the
      model's named intermediates. No randomness.
    phases: the training phases, one for most systems.
    torch_rules: ((regex over a PyTorch state_dict name, parameter path or None), ...): how
      published weights map onto `params` (see `torch_import`); None ignores a tensor.
  """

  init: Callable[[PRNGKey, Spec], tuple[Params, Extra]]
  predict: Callable[[Params, Batch, Extra], dict[str, Array]]
  phases: tuple[Phase, ...]
  torch_rules: tuple[tuple[str, str | None], ...] = ()


class TrainState(NamedTuple):
  """All that training changes, as one pytree: checkpoint it and nothing is lost.

  Attributes:
    step: [] int32, optimizer steps done; the per-step keys fold it in.
    params: the parameters.
    opt: optimizer state of each phase by its name.
    extra: the system's training arrays.
  """

  step: Array
  params: Params
  opt: dict[str, Any]
  extra: Extra
