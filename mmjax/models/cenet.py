"""CENET: the cross-modal enhancement network (Wang et al. 2023).

Inside of BERT, after its first layer, every token asks audio and vision for what belongs to it,
and the answers shift its state. BERT's other layers and a small head on [CLS] follow.

Paper: https://doi.org/10.1109/TMM.2022.3183830. Parity: MMSA's implementation and its quirks.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import bert as bert_lib
from mmjax import layers, losses, masking, systems, types

Array = types.Array
SHARPNESS = 8.0  # of the attention, in place of 1 / √d


class Enhancement(nn.Module):
  """[B, L, D] -> [B, L, D]: text shifted by what it finds in vision and audio (no padding mask)."""

  @nn.compact
  def __call__(self, text: Array, vision: Array, audio: Array) -> tuple[Array, dict[str, Array]]:
    width, out = text.shape[-1], {}
    for name, x in (("vision", vision), ("audio", audio)):
      hidden = jax.nn.relu(layers.Dense(width, name=f"{name}_1")(x))
      out[f"transformed_{name}"] = source = layers.Dense(width, name=f"{name}_2")(hidden)
      q, k, v = (
        layers.Dense(width, name=f"{name}_{role}")(y)
        for role, y in (("query", text), ("key", source), ("value", source))
      )
      q, k, v = (a[:, :, None] for a in (q, k, v))  # one head
      out[f"found_{name}"] = layers.attend(q, k, v, scale=SHARPNESS)
    found = jnp.concatenate([out["found_vision"], out["found_audio"]], -1)
    return text + layers.Dense(width, name="connect")(found), out


class Cenet(nn.Module):
  """The network.

  The published model reads tokens only. Precomputed text states take the place of the first
  BERT layer's output here, and a few blocks that of the others (our choice).

  Attributes:
    num_outputs: 1 for regression, else the number of classes.
    dropout: of the head.
    feature_layers: Transformer blocks over precomputed text states.
    bert: for text as token ids, see `bert.setup`; it then needs a folder or sizes.
      Its embeddings are not trained, as published.
  """

  num_outputs: int = 1
  dropout: float = 0.1
  feature_layers: int = 1
  bert: bert_lib.Setup = bert_lib.setup(None)

  @nn.compact
  def __call__(self, batch: types.Batch) -> dict[str, Array]:
    x, audio, vision = (masking.observed(getattr(batch, name)) for name in types.MODALITIES)
    enhance, out = Enhancement(name="enhancement"), {}

    def inject(states):
      shifted, found = enhance(states, vision, audio)
      out.update(found, before=states, enhanced=shifted)
      return shifted

    if x.ndim == 2:
      states = bert_lib.Bert(self.bert.config, inject, train_embeddings=False, name="bert")(
        x, batch.text.valid, batch.info.get("segment_ids")
      )
    else:  # precomputed states: blocks of their width follow the enhancement
      states = bert_lib.Blocks(self.feature_layers, name="blocks")(inject(x), batch.text.valid)
    out["text_states"] = states
    out["feature"] = states[:, 0]
    hidden = layers.Dropout(self.dropout)(out["feature"])
    hidden = jnp.tanh(layers.Dense(hidden.shape[-1], name="head_1")(hidden))
    hidden = layers.Dropout(self.dropout)(hidden)
    scores = layers.Dense(self.num_outputs, name="head_2")(hidden)
    out["prediction"] = layers.prediction(scores)
    return out


@systems.configurable(Cenet)
def make(network: Cenet) -> types.System:
  """CENET as a system; the settings are `Cenet`'s, the defaults MMSA's.

  Returns:
    The system. Its one phase, "main", logs the part l1 (the task's loss).
  """
  if network.bert.config.num_hidden_layers < 2:
    raise ValueError("CENET needs a BERT of at least 2 layers: it works after the first.")

  def loss(out, batch, extra):
    value = losses.task(out["prediction"], batch.label, "l1").mean()
    return value, types.Aux({"l1": value}, extra)

  return systems.supervised(network, loss, head="head_2", hessian="symmetric")


_ROLES = {"Wq": "query", "Wk": "key", "Wv": "value"}
TORCH_RULES = (
  (r"bert\.embeddings\.(senti|pos_tag|polarity)_embeddings\.weight", None),  # never used
  *bert_lib.torch_rules(r"bert\.", "bert"),
  *(
    rule
    for name, transform, attention in (
      ("vision", "visual_transform", "hv"),
      ("audio", "acoustic_transform", "ha"),
    )
    for rule in (
      (rf"bert\.encoder\.CE\.{transform}\.0\.(weight|bias)", rf"enhancement/{name}_1/\1"),
      (rf"bert\.encoder\.CE\.{transform}\.2\.(weight|bias)", rf"enhancement/{name}_2/\1"),
      *(
        (
          rf"bert\.encoder\.CE\.{attention}\.{theirs}\.(weight|bias)",
          rf"enhancement/{name}_{ours}/\1",
        )
        for theirs, ours in _ROLES.items()
      ),
    )
  ),
  (r"bert\.encoder\.CE\.cat_connect\.(weight|bias)", r"enhancement/connect/\1"),
  (r"classifier\.dense\.(weight|bias)", r"head_1/\1"),
  (r"classifier\.out_proj\.(weight|bias)", r"head_2/\1"),
)
