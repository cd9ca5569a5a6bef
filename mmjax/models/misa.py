"""MISA: modality-invariant and -specific representations (Hazarika et al. 2020).

Each modality becomes one utterance vector (text: mean BERT state; audio and vision: two
stacked BiLSTMs). A shared and a private encoder map it into two subspaces, a Transformer
layer attends over the six vectors, and a small head predicts. Beside the task, the loss asks
that shared vectors agree (CMD), private and shared ones differ (DiffLoss), and that both
together restore the utterance vector (reconstruction).

Paper: https://arxiv.org/abs/2005.03545. Parity: MMSA's implementation and its quirks.
"""

from itertools import combinations
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import bert as bert_lib
from mmjax import layers, losses, masking, systems, torch_import, types

Array = types.Array
FUSION_HEADS = 2
PACKS = ("text", "own")


class Misa(nn.Module):
  """The network. `__call__` returns every tensor that the losses need.

  Attributes:
    num_outputs: 1 for regression, else the number of classes.
    hidden_size: H, width of the utterance vectors and subspaces.
    dropout: of the fusion head, before its activation.
    pack: lengths that pack audio and vision. "text" is the published code's: steps beyond
      the text's length are never read, for unaligned data too. "own" reads all valid steps.
    bert: for text as token ids, see `bert.setup`; it then needs a folder or sizes.
  """

  num_outputs: int = 1
  hidden_size: int = 128
  dropout: float = 0.2
  pack: str = "text"
  bert: bert_lib.Setup = bert_lib.setup(None)

  @nn.compact
  def __call__(self, batch: types.Batch) -> dict[str, Array]:
    states = bert_lib.text_states(self.bert.config, batch)  # [B, L, D]
    utterance = {
      "t": layers.mean_over_steps(states, batch.text.valid),
      "v": self._two_lstms(batch.vision, batch.text.valid, "v"),
      "a": self._two_lstms(batch.audio, batch.text.valid, "a"),
    }
    shared_encoder = layers.Dense(self.hidden_size, name="shared")
    out = {"text_states": states}
    for m, vector in utterance.items():
      projected = jax.nn.relu(layers.Dense(self.hidden_size, name=f"project_{m}")(vector))
      original = layers.LayerNorm(name=f"project_{m}_norm")(projected)
      private = jax.nn.sigmoid(layers.Dense(self.hidden_size, name=f"private_{m}")(original))
      shared = jax.nn.sigmoid(shared_encoder(original))
      out |= {f"utt_{m}_orig": original, f"utt_private_{m}": private, f"utt_shared_{m}": shared}
      out[f"utt_{m}"] = private + shared
      out[f"utt_{m}_recon"] = layers.Dense(self.hidden_size, name=f"recon_{m}")(private + shared)

    # Published beside the model, but in no loss.
    discriminate = layers.Dense(4, name="sp_discriminator")
    mean_shared: Any = sum(out[f"utt_shared_{m}"] for m in "tva") / 3
    out["shared_or_private_s"] = discriminate(mean_shared)
    for m in "tva":
      out[f"shared_or_private_p_{m}"] = discriminate(out[f"utt_private_{m}"])

    tokens = [out[f"utt_{kind}_{m}"] for kind in ("private", "shared") for m in "tva"]
    fused = layers.TransformerEncoderLayer(FUSION_HEADS, name="fusion_transformer")(
      jnp.stack(tokens, 1)
    )
    out["fusion"] = fused  # [B, 6, H]
    out["feature"] = fused.reshape(fused.shape[0], -1)
    hidden = layers.Dense(3 * self.hidden_size, name="fusion_1")(out["feature"])
    hidden = jax.nn.relu(layers.Dropout(self.dropout)(hidden))
    scores = layers.Dense(self.num_outputs, name="fusion_2")(hidden)
    out["prediction"] = layers.prediction(scores)
    return out

  def _two_lstms(self, m: types.Modality, text_valid: Array, name: str) -> Array:
    """[B, 4D]: final states of two stacked BiLSTMs, forward ones first."""
    x, valid = masking.observed(m), m.valid
    if self.pack == "text":  # steps beyond the text's length are never read
      x = x[:, : text_valid.shape[1]]
      valid = jnp.arange(x.shape[1])[None] < text_valid.sum(1, keepdims=True)
    width = x.shape[-1]
    h, first = layers.BiLSTM(width, name=f"{name}rnn1")(x, valid)
    h = layers.LayerNorm(name=f"{name}layer_norm")(h)
    _, second = layers.BiLSTM(width, name=f"{name}rnn2")(h, valid)
    return jnp.concatenate([first[0], second[0], first[1], second[1]], -1)


@systems.configurable(Misa)
def make(
  network: Misa, *, diff_weight: float = 0.1, sim_weight: float = 0.3, recon_weight: float = 1.0
) -> types.System:
  """MISA as a system; the defaults are MMSA's for MOSI.

  Args:
    network: settings of `Misa`.
    diff_weight: of DiffLoss.
    sim_weight: of CMD.
    recon_weight: of the reconstruction.

  Returns:
    The system. Its one phase, "main", logs the parts cls, diff, cmd and recon.
  """
  if network.pack not in PACKS:
    raise ValueError(f"pack is {network.pack!r}, expected one of {PACKS}.")
  if network.hidden_size % FUSION_HEADS:
    raise ValueError(
      f"hidden_size is {network.hidden_size}, but must be divisible by {FUSION_HEADS}."
    )

  def loss(out, batch, extra):
    private = {m: out[f"utt_private_{m}"] for m in "tva"}
    shared = {m: out[f"utt_shared_{m}"] for m in "tva"}
    pairs = [(private[m], shared[m]) for m in "tva"]
    pairs += [(private[m], private[n]) for m, n in combinations("atv", 2)]
    parts = {
      "cls": losses.task(out["prediction"], batch.label).mean(),
      "diff": sum(losses.difference(x, y) for x, y in pairs),
      "cmd": sum(losses.cmd(shared[m], shared[n]) for m, n in combinations("tva", 2)) / 3,
      "recon": sum(
        losses.reconstruction(out[f"utt_{m}_recon"], out[f"utt_{m}_orig"]) for m in "tva"
      )
      / 3,
    }
    total = (
      parts["cls"]
      + diff_weight * parts["diff"]
      + sim_weight * parts["cmd"]
      + recon_weight * parts["recon"]
    )
    return total, types.Aux(parts, extra)

  return systems.supervised(network, loss, head="fusion_2", hessian="symmetric")


TORCH_RULES = (
  *bert_lib.torch_rules(r"bertmodel\.model\.", "bert"),
  *(
    rule
    for name in ("vrnn1", "vrnn2", "arnn1", "arnn2")
    for rule in torch_import.lstm_rules(name, name, bidirectional=True)
  ),
  (r"([va])layer_norm\.(weight|bias)", r"\1layer_norm/\2"),
  (r"tlayer_norm\..*", None),  # never used
  (r"project_([tva])\.project_.\.(weight|bias)", r"project_\1/\2"),
  (r"project_([tva])\.project_._layer_norm\.(weight|bias)", r"project_\1_norm/\2"),
  (r"private_([tva])\.private_._\d\.(weight|bias)", r"private_\1/\2"),
  (r"shared\.shared_1\.(weight|bias)", r"shared/\1"),
  (r"recon_([tva])\.recon_._1\.(weight|bias)", r"recon_\1/\2"),
  (r"sp_discriminator\.sp_discriminator_layer_1\.(weight|bias)", r"sp_discriminator/\1"),
  (r"fusion\.fusion_layer_1\.(weight|bias)", r"fusion_1/\1"),
  (r"fusion\.fusion_layer_3\.(weight|bias)", r"fusion_2/\1"),
  *torch_import.encoder_layer_rules(r"transformer_encoder\.layers\.0", "fusion_transformer"),
)
