"""MulT: the multimodal Transformer for unaligned sequences (Tsai et al. 2019).

A convolution brings each modality to one width. Each modality then attends to the two others in a
crossmodal Transformer each, and a memory Transformer over both results gives, as its last step,
the modality's vector. A residual block over the vectors predicts.

Paper: https://arxiv.org/abs/1906.00295. Parity: MMSA's implementation, which has no positions, and
with `positions` the authors' own; both read padding, and the last step may be one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import batched, crossmodal, layers, losses, masking, systems, torch_import, types
from mmjax import bert as bert_lib

Array = types.Array
MEMORY_DEPTH = 3  # at least
# A modality's letter in the published names.
LETTERS = {"text": "l", "audio": "a", "vision": "v"}


class Residual(nn.Module):
  """[B, D] -> [B, D]: a ReLU layer beside the identity.

  Attributes:
    dropout: of the hidden layer.
    hidden: its width; D by default.
  """

  dropout: float
  hidden: int | None = None

  @nn.compact
  def __call__(self, x: Array) -> tuple[Array, Array]:
    """The result, and the hidden layer [B, hidden]."""
    width = x.shape[-1]
    hidden = jax.nn.relu(layers.Dense(self.hidden or width, name="proj1")(x))
    y = layers.Dense(width, name="proj2")(layers.Dropout(self.dropout)(hidden))
    return x + y, hidden


def project(network: Any, batch: types.Batch) -> dict[str, Array]:
  """Convolutions to `network.size` channels, by modality, as MulT and DMD have them.

  To be called inside of a network with settings `size`, `kernel_sizes`, `text_dropout`, `bert`.

  Args:
    network: that.
    batch: B samples.

  Returns:
    [B, L - kernel + 1, size] by modality; one that has this width already stays as it is.
  """
  states = bert_lib.text_states(network.bert.config, batch)
  found = {"text": layers.Dropout(network.text_dropout)(states)}
  found |= {name: masking.observed(getattr(batch, name)) for name in types.MODALITIES[1:]}
  for (name, x), width in zip(found.items(), network.kernel_sizes, strict=True):
    conv = layers.Conv1d(network.size, width, use_bias=False, name=f"{name}_conv")
    projected = conv(x)  # the published parameter exists without a use too
    found[name] = x if x.shape[-1] == network.size else projected
  return found


def transformer(
  network: Any, name: str, depth: int, source: str, *, positions: bool
) -> crossmodal.CrossmodalTransformer:
  """The Transformer `name` of a network; `source` tells its attention's dropout."""
  return crossmodal.CrossmodalTransformer(
    network.heads,
    depth,
    network.attention_dropout[types.MODALITIES.index(source)],
    network.relu_dropout,
    network.residual_dropout,
    network.embedding_dropout,
    causal=network.causal,
    positions=positions,
    xavier=True,
    name=name,
  )


def exchange(
  network: Any,
  x: Mapping[str, Array],
  targets: Sequence[str] = types.MODALITIES,
  *,
  positions: bool,
) -> dict[str, Array]:
  """What each target finds in the two other modalities.

  To be called inside of a network with the settings of `Mult` that its Transformers read.

  Args:
    network: that.
    x: [B, L, D] by modality.
    targets: the modalities that ask.
    positions: whether the Transformers add them.

  Returns:
    "target_with_source" [B, L, D], "memory_target" [B, L, 2D] and, by target, the memory's last
    step [B, 2D].
  """
  pairs = [(t, s) for t in targets for s in types.MODALITIES if s != t]
  found = batched.together(
    [
      transformer(network, f"{t}_with_{s}", network.depth, s, positions=positions) for t, s in pairs
    ],
    [(x[t], x[s]) for t, s in pairs],
  )
  out = {f"{t}_with_{s}": value for (t, s), value in zip(pairs, found, strict=True)}
  depth = max(network.depth, MEMORY_DEPTH)
  memory = batched.together(
    [transformer(network, f"{t}_memory", depth, "text", positions=positions) for t in targets],
    [
      (jnp.concatenate([out[f"{t}_with_{s}"] for target, s in pairs if target == t], -1),)
      for t in targets
    ],
  )
  for target, value in zip(targets, memory, strict=True):
    out[f"memory_{target}"], out[target] = value, value[:, -1]
  return out


def check_width(network: Any, *, positions: bool) -> None:
  """Raises ValueError for a `size` that the heads or the positions cannot take."""
  size, heads = network.size, network.heads
  if size % heads:
    raise ValueError(f"size is {size}, but must be divisible by heads {heads}.")
  if positions and size < 4:
    raise ValueError(f"size is {size}, but positions need at least 4 channels.")


class Mult(nn.Module):
  """The network.

  Attributes:
    num_outputs: 1 for regression, else the number of classes.
    size: D, width of the sequences.
    heads: of all Transformers; they divide D.
    depth: layers of the crossmodal Transformers; the memory's have at least 3.
    kernel_sizes: of the convolutions over text, audio, vision; each shortens its sequence.
    causal: whether no step sees later ones; beside a longer sequence, by as much as it is longer.
    positions: whether the Transformers add sinusoids, as the authors' do; MMSA's have none.
    targets: the modalities whose vectors predict. The authors' "lonly" is ("text",).
    text_dropout: of the text's states.
    attention_dropout: where the source is text, audio, vision; the first is the memory's too.
    relu_dropout, residual_dropout, embedding_dropout: of the Transformers.
    output_dropout: of the residual block's hidden layer.
    bert: for text as token ids, see `bert.setup`; BERT-base without weights by default.
  """

  num_outputs: int = 1
  size: int = 50
  heads: int = 10
  depth: int = 4
  kernel_sizes: Sequence[int] = (5, 5, 5)
  causal: bool = True
  positions: bool = False
  targets: Sequence[str] = types.MODALITIES
  text_dropout: float = 0.5
  attention_dropout: Sequence[float] = (0.3, 0.2, 0.0)
  relu_dropout: float = 0.0
  residual_dropout: float = 0.0
  embedding_dropout: float = 0.2
  output_dropout: float = 0.5
  bert: bert_lib.Setup = bert_lib.setup(None)

  @nn.compact
  def __call__(self, batch: types.Batch) -> dict[str, Array]:
    x = project(self, batch)
    out = {f"projected_{name}": value for name, value in x.items()}
    out |= exchange(self, x, self.targets, positions=self.positions)
    feature = jnp.concatenate([out[name] for name in self.targets], -1)
    hidden, _ = Residual(self.output_dropout, name="residual")(feature)
    scores = layers.Dense(self.num_outputs, name="out_layer")(hidden)
    return {**out, "feature": feature, "prediction": layers.prediction(scores)}


def loss(out: dict[str, Array], batch: types.Batch, extra: types.Extra):
  """An `OutputLoss`: the mean absolute error, or the cross-entropy; logged as "task"."""
  error = losses.task(out["prediction"], batch.label, "l1").mean()
  return error, types.Aux({"task": error}, extra)


@systems.configurable(Mult)
def make(network: Mult) -> types.System:
  """MulT as a system; the defaults are MMSA's for MOSI.

  Args:
    network: settings of `Mult`.

  Returns:
    The system. Its one phase, "main", logs the part task.
  """
  check_width(network, positions=network.positions)
  ordered = [name for name in types.MODALITIES if name in network.targets]
  if not ordered or list(network.targets) != ordered:
    raise ValueError(f"targets are {network.targets}, expected some of {types.MODALITIES}.")
  return systems.supervised(network, loss, head="out_layer", hessian="symmetric")


def exchange_rules(prefix: str = "", targets: Sequence[str] = types.MODALITIES):
  """Rules for `project` and `exchange` at the regex `prefix`; what is not a target is ignored."""
  rules = []
  for target, t in LETTERS.items():
    rules.append((rf"{prefix}proj_{t}\.weight", f"{target}_conv/weight"))
    if target not in targets:
      rules.append((rf"{prefix}trans_{t}_(with|mem).*", None))
      continue
    rules += crossmodal.torch_rules(rf"{prefix}trans_{t}_mem", f"{target}_memory")
    for source, s in LETTERS.items():
      rules += crossmodal.torch_rules(rf"{prefix}trans_{t}_with_{s}", f"{target}_with_{source}")
  return tuple(rules)


def torch_rules(settings: Mapping[str, Any]) -> torch_import.Rules:
  """Rules for MMSA's state_dict and the authors'."""
  return (
    *bert_lib.torch_rules(r"text_model\.model\.", "bert"),
    *exchange_rules(targets=settings["targets"]),
    (r"(proj[12])\.(weight|bias)", r"residual/\1/\2"),
    (r"out_layer\.(weight|bias)", r"out_layer/\1"),
  )
