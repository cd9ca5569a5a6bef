"""The types that every part of mmjax speaks: batches, masks, losses, phases, systems.

This module imports nothing of ours. Shapes use B for samples, L for steps (frames or
tokens) of one modality and D for its feature channels.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
PRNGKey = jax.Array
Params = Any  # a pytree of arrays, nested dicts as flax makes them
Extra = Mapping[str, Any]  # training arrays that are not parameters: tables, memories, statistics


class UsageError(ValueError):
  """What a user asked for cannot be done; the message says what and how to mend it.

  Binaries print it as `error: …`; every other exception is a bug and keeps its traceback.
  """


MODALITIES = ("text", "audio", "vision")  # the one order in which modalities are enumerated
UNK = 100  # [UNK] of every BERT vocabulary


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


def modality(x: Any, valid: Any = None, seen: Any = None, *, fill: float | None = None) -> Modality:
  """The one constructor of modalities.

  Args:
    x: [B, L, D] float features, or [B, L] integer token ids.
    valid: [B, L] bool; by default every step is real.
    seen: as in `Modality`; by default everything is observed.
    fill: what replaces an unseen entry; by default 0 for features, the [UNK] id for tokens.

  Returns:
    The modality: host arrays where `x` is one, else device arrays.

  Raises:
    ValueError: if `x` has neither two nor three axes.
  """
  if x.ndim not in (2, 3):
    raise ValueError(f"a modality is [B, L, D] features or [B, L] token ids, got {x.shape}.")
  xp: Any = (jnp, np)[isinstance(x, np.ndarray)]
  tokens = x.ndim == 2
  valid = xp.ones(x.shape[:2], bool) if valid is None else xp.asarray(valid, bool)
  if seen is None:
    seen = xp.ones(x.shape if tokens else (*x.shape[:2], 1), bool)
  fill = (UNK if tokens else 0) if fill is None else fill
  return Modality(x, valid, seen, xp.full(x.shape[0], fill, x.dtype))


class Batch(NamedTuple):
  """Samples with their labels. Every leaf has the leading axis B.

  Attributes:
    text, audio, vision: the modalities.
    label: [B] float sentiment (regression) or int32 class.
    index: [B] int32, the sample's row in its split: keys its masks and its table entries.
    info: further arrays [B, ...], such as "label_text" (SIMS), "segment_ids", or of whole
      conversations "place" and "speaker" (see `conversations`); what a loss of your own needs of
      each sample, such as a weight, belongs here.
  """

  text: Modality
  audio: Modality
  vision: Modality
  label: Array
  index: Array
  info: dict[str, Array]


def places(batch: Batch) -> Array:
  """How the samples of a batch lie in conversations.

  Args:
    batch: B samples. In a batch of whole conversations each one has U rows, one after the other,
      and `info["place"]`; in any other every sample is a conversation of its own, U = 1.

  Returns:
    [B, U] bool, True at the sample's place in its conversation; rows of padding are all False.
  """
  place = batch.info.get("place")
  return jnp.ones((batch.index.shape[0], 1), bool) if place is None else place


class ModalitySpec(NamedTuple):
  """Shape of one modality: `length` steps of `dim` channels.

  Token ids (`tokens`) have no channels; they are below `vocab` in all splits (0: not known).
  """

  length: int
  dim: int
  tokens: bool = False
  vocab: int = 0


class Spec(NamedTuple):
  """What a system must know of the data to build its parameters and tables.

  Attributes:
    text, audio, vision: shape of each modality.
    num_train: number of training samples (tables have one row for each).
    num_classes: 0 for regression, else the number of classes.
    label_range: smallest and largest label of the dataset's scale, as (-3.0, 3.0).
    problems: names of K binary problems, as IEMOCAP's emotions. A label is then one of 2^K
      classes: the number whose bit k is the answer to problem k (see `layers.joint`).
  """

  text: ModalitySpec
  audio: ModalitySpec
  vision: ModalitySpec
  num_train: int
  num_classes: int = 0
  label_range: tuple[float, float] = (-3.0, 3.0)
  problems: tuple[str, ...] = ()


def example_batch(spec: Spec, rows: int = 2) -> Batch:
  """A batch of zeros with the shapes of a spec: enough to initialise parameters.

  Args:
    spec: the shapes.
    rows: B.

  Returns:
    The batch, everything valid and seen.
  """

  def one(m):
    shape = (rows, m.length)
    x = jnp.zeros(shape, jnp.int32) if m.tokens else jnp.zeros((*shape, m.dim))
    return modality(x)

  label = jnp.zeros(rows, jnp.int32 if spec.num_classes else jnp.float32)
  text, audio, vision = (one(getattr(spec, name)) for name in MODALITIES)
  return Batch(text, audio, vision, label, jnp.arange(rows), {})


class Aux(NamedTuple):
  """What a loss returns beside its value: scalars to log, and the successor of `extra`."""

  metrics: dict[str, Array]
  extra: Extra


class MaskFn(Protocol):
  """A missing-data transform; the factories in `masking` make them."""

  def __call__(self, key: PRNGKey, batch: Batch) -> Batch:
    """Marks entries of a batch as unseen.

    Args:
      key: of what is random; each (modality, `batch.index`) has a key of its own folded from it,
        so that neither the batch size nor the order of the samples changes a mask.
      batch: B samples.

    Returns:
      The batch with less `seen`; nothing else changes.
    """
    ...


class LossFn(Protocol):
  """The one signature of all losses: of models, of methods around them, and of your own."""

  def __call__(
    self, params: Params, batch: Batch, key: PRNGKey | None, extra: Extra
  ) -> tuple[Array, Aux]:
    """The loss of a batch.

    Args:
      params: the parameters.
      batch: B samples.
      key: of what is random (dropout, masks); None switches a model's randomness off.
      extra: training arrays that are not parameters.

    Returns:
      [] the loss; and the scalars to log, with the successor of `extra`.
    """
    ...


class WrapFn(Protocol):
  """How a training method turns a loss of clean batches into the loss that is trained."""

  def __call__(
    self, loss: LossFn, key: PRNGKey, method_params: Params, *, hessian: str = "reverse"
  ) -> LossFn:
    """Wraps a loss.

    Args:
      loss: of B clean rows.
      key: the run's, the same at every step (ORIG's fixed masks hang on it).
      method_params: from `Method.init`, or {}; the wrapped loss is differentiated by them.
      hessian: of the loss, see `Phase`.

    Returns:
      A loss of `Method.draws` · B rows, the draws one after the other.
    """
    ...


class Cost(NamedTuple):
  """What one step of a method computes, in rows of batches; a pure count, nothing is timed.

  Attributes:
    rows: that the step reads.
    gradients: rows of all losses whose gradient is taken, each time that it is.
    products: rows of all products of a Hessian with a vector.
    losses: rows of all losses that have no derivative.
  """

  rows: int
  gradients: int
  products: int
  losses: int

  @property
  def equivalent(self) -> float:
    """The whole in rows of gradients.

    A backward pass counts as two forward ones, so a loss alone is a third of a gradient; a product
    is the derivative of a gradient along a vector, two gradients.
    """
    return self.gradients + 2 * self.products + self.losses / 3


class Method(NamedTuple):
  """A training method as a value; `meta.METHODS` has the registered ones.

  Attributes:
    draws: independent draws of B rows that one step takes.
    wrap: makes the loss that is trained, see `WrapFn`.
    init: optional `(key, params) -> method_params`: parameters of the method's own, of one
      phase's trained parameters, that the outer optimizer trains beside them. None: it has none.
    title: how tables write it; its registered name by default.
    cost: optional `B -> Cost` of one step of draws of B rows.
  """

  draws: int
  wrap: WrapFn
  init: Callable[[PRNGKey, Params], Params] | None = None
  title: str = ""
  cost: Callable[[int], Cost] | None = None


class Source(Protocol):
  """A training split, in memory or on disk, as the trainer and `Phase.on_epoch` see it."""

  @property
  def rows(self) -> int:
    """The number of samples, N, or of conversations, that an epoch passes."""
    ...

  def read(self) -> Batch:
    """The whole split as one batch of N rows, on the host."""
    ...


class Phase(NamedTuple):
  """One loss with the parameters it trains; an epoch runs its active phases in order.

  Attributes:
    name: names the phase in logs and optimizer states.
    loss: the loss of this phase.
    trains: regex that is searched in each "a/b/c" parameter path; the rest is constant.
    share: part of the epoch's steps that this phase runs, in (0, 1].
    epochs: first epoch and the one after the last (None: to the end) in which it runs.
    on_epoch: optional `(params, extra, epoch, train) -> (params, extra)`, applied before the
      phase's first step of each epoch; `epoch` is an int, `train` the `Source` of the training
      split. It must be a function of its arguments alone, or a resumed run would differ.
    hessian: "symmetric" if the loss's gradient is the gradient of something, stopped gradients
      included: then products with it may be taken forward over reverse, which is faster.
      "reverse" is right for every loss; reversed gradients (LNLN's adversary) need it.
  """

  name: str
  loss: LossFn
  trains: str = ""
  share: float = 1.0
  epochs: tuple[int, int | None] = (0, None)
  on_epoch: Callable[[Params, Extra, int, Source], tuple[Params, Extra]] | None = None
  hessian: str = "reverse"


class System(NamedTuple):
  """A multimodal sentiment model as pure functions; `systems.supervised` builds most of them.

  Attributes:
    init: `(key, spec) -> (params, extra)`.
    predict: `(params, batch, extra) -> dict`; "prediction" is [B] (regression) or [B, C]
      (logits), "feature" the fused representation [B, D] behind it, the other entries are the
      model's named intermediates. No randomness.
    phases: the training phases, one for most systems.
    conversations: whether it reads whole conversations (see `conversations.group`), so that a
      batch size counts them and not utterances.
  """

  init: Callable[[PRNGKey, Spec], tuple[Params, Extra]]
  predict: Callable[[Params, Batch, Extra], dict[str, Array]]
  phases: tuple[Phase, ...]
  conversations: bool = False

  @property
  def loss(self) -> LossFn:
    """The main loss, of the last phase."""
    return self.phases[-1].loss


class TrainState(NamedTuple):
  """All that training changes, as one pytree: checkpoint it and nothing is lost.

  Attributes:
    step: [] int32, optimizer steps done; the per-step keys fold it in.
    params: the parameters.
    opt: optimizer state of each phase by its name.
    extra: the system's training arrays.
    method: the training method's own parameters of each phase, {} where it has none.
  """

  step: Array
  params: Params
  opt: dict[str, Any]
  extra: Extra
  method: dict[str, Params]
