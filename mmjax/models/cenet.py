"""CENET: the cross-modal enhancement network (Wang et al. 2023).

Inside of BERT, after its first layer, every token asks audio and vision for what belongs to it,
and the answers shift its state. BERT's other layers and a small head on [CLS] follow.

Paper: https://doi.org/10.1109/TMM.2022.3183830. Parity: MMSA's implementation and its quirks.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import bert as bert_lib
from mmjax import layers, losses, masking, types

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
      weights = jax.nn.softmax(SHARPNESS * jnp.einsum("blc,bmc->blm", q, k), -1)
      out[f"found_{name}"] = jnp.einsum("blm,bmc->blc", weights, v)
    found = jnp.concatenate([out["found_vision"], out["found_audio"]], -1)
    return text + layers.Dense(width, name="connect")(found), out


class Cenet(nn.Module):
  """The network; see `make` for the attributes."""

  num_outputs: int
  feature_layers: int
  dropout: float
  bert: bert_lib.BertConfig

  @nn.compact
  def __call__(self, batch: types.Batch) -> dict[str, Array]:
    x, audio, vision = (masking.observed(getattr(batch, name)) for name in types.MODALITIES)
    enhance, out = Enhancement(name="enhancement"), {}

    def inject(states):
      shifted, found = enhance(states, vision, audio)
      out.update(found, before=states, enhanced=shifted)
      return shifted

    if x.ndim == 2:
      states = bert_lib.Bert(self.bert, inject, train_embeddings=False, name="bert")(
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
    out["prediction"] = scores[:, 0] if self.num_outputs == 1 else scores
    return out


def make(
  *,
  dropout: float = 0.1,
  feature_layers: int = 1,
  bert: Mapping[str, Any] | None = None,
) -> types.System:
  """CENET as a system; the defaults are MMSA's.

  The published model reads tokens only. Precomputed text states take the place of the first
  BERT layer's output here, and a few blocks that of the others (our choice).

  Args:
    dropout: of the head.
    feature_layers: Transformer blocks over precomputed text states.
    bert: for text as token ids, see `bert.setup`; BERT-base without weights by default.
      Its embeddings are not trained, as published.

  Returns:
    The system. Its one phase, "main", logs the part l1 (the task's loss).
  """
  encoder = bert_lib.setup(bert)
  if encoder.config.num_hidden_layers < 2:
    raise ValueError("CENET needs a BERT of at least 2 layers: it works after the first.")

  def network(num_outputs):
    return Cenet(num_outputs, feature_layers, dropout, encoder.config)

  def apply(params, batch, key=None):
    rngs = None if key is None else {"dropout": key}
    num_outputs = params["head_2"]["bias"].shape[0]
    return network(num_outputs).apply({"params": params}, batch, rngs=rngs)

  def init(key, spec):
    module = network(spec.num_classes or 1)
    params = jax.jit(module.init)(key, types.example_batch(spec))["params"]
    return encoder.with_weights(params), {}

  def predict(params, batch, extra):
    del extra
    return apply(params, batch)

  def loss(params, batch, key, extra):
    prediction = apply(params, batch, key)["prediction"]
    task = losses.task_loss(0 if prediction.ndim == 1 else prediction.shape[1], "l1")
    value = task(prediction, batch.label).mean()
    return value, types.Aux({"l1": value}, extra)

  return types.System(init, predict, (types.Phase("main", loss, hessian="symmetric"),), TORCH_RULES)


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
