"""LNLN: the language-dominated noise-resistant network (Zhang, Wang & Yu 2024).

Text dominates sentiment, so a damaged text is corrected first (DMC): a completeness score w of
the observed text weighs it against a proxy that audio and vision generate, and a discriminator
behind a gradient reversal makes the result look like complete text. ALMT's hyper-modality
learning follows (DMML), and a reconstructor restores the complete tokens of each modality.

Paper: https://arxiv.org/abs/2409.20012. Parity: the authors' code; where it differs from the
paper's equations, a setting of `Lnln` offers the paper's.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mmjax import batched, hyper_layers, layers, losses, masking, systems, torch_import, types
from mmjax import bert as bert_lib

Array = types.Array
ORDER = ("audio", "vision", "text")  # of the reconstructed tokens
# The transformers whose shape can be set on its own.
PARTS = ("embedding", "proxy", "completeness", "reconstructor", "text", "fusion")
REVERSALS = ("proxy", "discriminator")
PROXIES = ("generator", "learned")


class Embedding(nn.Module):
  """{modality: [B, T, D]} tokens that stand for what is observed of each modality."""

  size: int
  tokens: int
  depth: int
  heads: int
  hidden_size: int
  bert: bert_lib.BertConfig

  @nn.compact
  def __call__(self, batch: types.Batch) -> dict[str, Array]:
    out = {"text_states": bert_lib.text_states(self.bert, batch)}
    embed, projected = [], []
    for name in types.MODALITIES:
      x = out["text_states"] if name == "text" else masking.observed(getattr(batch, name))
      projected.append((layers.Dense(self.size, name=f"project_{name}")(x),))
      shape = self.depth, self.heads, self.hidden_size, self.tokens
      embed.append(hyper_layers.TokenTransformer(*shape, name=f"embed_{name}"))
    found = batched.together(embed, projected)
    for name, states in zip(types.MODALITIES, found, strict=True):
      out[f"embedded_{name}"] = states[-1]
      out[name] = out[f"embedded_{name}"][:, : self.tokens]
    return out


def _mlp(x: Array, hidden: int, size: int, name: str) -> Array:
  """Inside of a module: two layers with LeakyReLU(0.1) between."""
  x = jax.nn.leaky_relu(layers.Dense(hidden, name=f"{name}_1")(x), 0.1)
  return layers.Dense(size, name=f"{name}_2")(x)


class Lnln(nn.Module):
  """The network.

  Attributes:
    num_outputs: 1 for regression, else the number of classes.
    size: D, width of all tokens.
    tokens: T, tokens that stand for a modality.
    discriminator_size: hidden width of the effectiveness discriminator.
    depth, heads, hidden_size: of the transformers, for all or by part (`PARTS`).
    hyper_depth: scales of the text, hence hyper-modality layers; the text has one block less.
    hyper_heads: heads of the hyper-modality layers; they divide D.
    correction: False leaves out DMC (Table 4): the text is taken as it is.
    hyper_learning: False leaves out DMML: the mean of all tokens is what the head reads.
    reconstruction: False leaves out the reconstructor.
    reversal: where the gradient is reversed. "proxy" is the code's: every loss reaches the
      proxy's generator with its sign flipped, the sentiment's too. "discriminator" is the
      paper's (eq. 6): only the discriminator's loss is.
    proxy: which tokens are the proxy: the "generator"'s own (the code's) or the "learned" ones
      that it reads (the paper's H_p, eq. 4).
    bert: for text as token ids, see `bert.setup`; it then needs a folder or sizes.
  """

  num_outputs: int = 1
  size: int = 128
  tokens: int = 8
  discriminator_size: int = 64
  depth: int | Mapping[str, int] = 2
  heads: int | Mapping[str, int] = 8
  hidden_size: int | Mapping[str, int] = 128
  hyper_depth: int = 3
  hyper_heads: int = 8
  correction: bool = True
  hyper_learning: bool = True
  reconstruction: bool = True
  reversal: str = "proxy"
  proxy: str = "generator"
  bert: bert_lib.Setup = bert_lib.setup(None)

  @nn.compact
  def __call__(self, batch: types.Batch, train: bool) -> dict[str, Array]:
    """`train` adds what the losses need: the tokens of the complete data, and their use."""
    embedding = Embedding(
      self.size,
      self.tokens,
      *self._shape("embedding"),
      self.bert.config,
      name="embedding",
    )
    if train:  # in turn, so that devices which share the rows keep their own
      in_turn = lambda a, b: jnp.stack([a, b], 1).reshape(-1, *a.shape[1:])  # noqa: E731
      both = embedding(jax.tree.map(in_turn, batch, masking.complete(batch)))
      split = {name: x.reshape(-1, 2, *x.shape[1:]) for name, x in both.items()}
      out, complete = ({name: x[:, n] for name, x in split.items()} for n in range(2))
    else:
      out, complete = embedding(batch), {}
    text = out["text"]
    if self.correction:
      out |= self._correct(out)
      text = out["corrected"]
    out |= self._fuse(text, out)
    scores = layers.Dense(self.num_outputs, name="head")(out["feature"])
    out["prediction"] = layers.prediction(scores)
    if train:
      out |= {f"{name}_complete": value for name, value in complete.items()}
    if train and self.reconstruction:
      towers = [self._transformer("reconstructor", name) for name in ORDER]
      restored = batched.together(towers, [(out[name],) for name in ORDER])
      out["reconstructed"] = jnp.concatenate([states[-1] for states in restored], 1)
      out["complete"] = jnp.concatenate([complete[name] for name in ORDER], 1)
    if train and self.correction:
      corrected = text
      if self.reversal == "discriminator":
        corrected = layers.reverse_gradient(corrected)
      shown = jnp.concatenate([corrected, complete["text"]]).reshape(-1, self.size)
      out["effectiveness"] = _mlp(shown, self.discriminator_size, 2, "discriminator")
    return out

  def _shape(self, part: str) -> tuple[int, int, int]:
    """Depth, heads and hidden size of a transformer."""
    shape = (self.depth, self.heads, self.hidden_size)
    depth, heads, hidden = (n if isinstance(n, int) else n[part] for n in shape)
    return self.hyper_depth - 1 if part == "text" else depth, heads, hidden

  def _transformer(self, part, name=None, tokens=0):
    return hyper_layers.TokenTransformer(
      *self._shape(part), tokens, name=part if name is None else f"{part}_{name}"
    )

  def _correct(self, seen: Mapping[str, Array]) -> dict[str, Array]:
    """Dominant modality correction (§3.4): w, the proxy, and the text that both make up."""
    states = self._transformer("completeness", tokens=1)(seen["text"])[-1]
    w = jax.nn.sigmoid(_mlp(states[:, 0], self.size // 2, 1, "completeness_score"))
    learned = self.param("proxy_tokens", nn.initializers.ones, (1, self.tokens, self.size))
    learned = jnp.broadcast_to(learned, seen["audio"].shape)
    given = jnp.concatenate([learned, seen["audio"], seen["vision"]], 1)
    generated = self._transformer("proxy", tokens=self.tokens)(given)[-1]
    first = 0 if self.proxy == "generator" else self.tokens
    proxy = generated[:, first : first + self.tokens]
    if self.reversal == "proxy":
      proxy = layers.reverse_gradient(proxy)
    corrected = proxy * (1 - w[:, :, None]) + seen["text"] * w[:, :, None]
    return {
      "completeness_states": states,
      "w": w,
      "generated": generated,
      "proxy": proxy,
      "corrected": corrected,
    }

  def _fuse(self, text: Array, seen: Mapping[str, Array]) -> dict[str, Array]:
    """Dominant modality based multimodal learning (§3.5): "feature" [B, D] and what led there."""
    if not self.hyper_learning:
      tokens = jnp.concatenate([text, seen["audio"], seen["vision"]], 1)
      return {"feature": tokens.mean(1)}
    scales = self._transformer("text")(text)
    hyper = self.param("hyper", nn.initializers.ones, (1, self.tokens, self.size))
    hyper = jnp.broadcast_to(hyper, text.shape)
    for n in range(self.hyper_depth):
      layer = hyper_layers.HyperLearning(self.hyper_heads, name=f"hyper_{n}")
      hyper = layer(scales[n], seen["audio"], seen["vision"], hyper)
    fuse = hyper_layers.CrossTransformer(*self._shape("fusion"), name="fusion")
    fused = fuse(hyper, scales[-1])
    texts = {f"text_{n}": scale for n, scale in enumerate(scales)}
    return {**texts, "hyper": hyper, "fused": fused, "feature": fused[:, 1:].mean(1)}


def completeness(batch: types.Batch) -> Array:
  """[B] target of w: 1 - the missing rate of the text.

  The rate is `info["missing_rate_text"]` where the data hold it (the published code takes the
  rate that the masks were drawn with), else the share of the valid steps that is not seen.
  """
  if "missing_rate_text" in batch.info:
    return 1 - batch.info["missing_rate_text"].reshape(-1)
  m = batch.text
  seen = m.seen.astype(float) if m.seen.ndim == 2 else m.seen.mean(-1)
  seen = jnp.broadcast_to(seen, m.valid.shape)
  return jnp.where(m.valid, seen, 0).sum(1) / jnp.maximum(m.valid.sum(1, dtype=float), 1)


@systems.configurable(Lnln)
def make(
  network: Lnln,
  *,
  completeness_weight: float = 0.9,
  adversarial_weight: float = 0.8,
  reconstruction_weight: float = 0.1,
  task_weight: float = 1.0,
) -> types.System:
  """LNLN as a system; the defaults are the authors' for MOSI and MOSEI.

  Args:
    network: settings of `Lnln`.
    completeness_weight, adversarial_weight, reconstruction_weight, task_weight: α, β, γ, σ.

  Returns:
    The system. Its one phase, "main", logs the parts l_sp, l_cc, l_adv and l_rec.
  """
  for name, known in (("reversal", REVERSALS), ("proxy", PROXIES)):
    if getattr(network, name) not in known:
      raise ValueError(f"{name} is {getattr(network, name)!r}, expected one of {known}.")
  size, heads = network.size, network.hyper_heads
  if size % heads:
    raise ValueError(f"size is {size}, but must be divisible by hyper_heads {heads}.")
  for shape in (network.depth, network.heads, network.hidden_size):
    if not isinstance(shape, int) and shape.keys() != set(PARTS):
      raise ValueError(f"parts are {sorted(shape)}, expected {sorted(PARTS)}.")

  def loss(out, batch, extra):
    parts = {"l_sp": losses.task(out["prediction"], batch.label).mean()}
    total = task_weight * parts["l_sp"]
    if network.correction:
      error = optax.losses.squared_error(out["w"][:, 0], completeness(batch))
      real = jnp.repeat(jnp.array([1, 0]), len(out["effectiveness"]) // 2)
      judged = optax.losses.softmax_cross_entropy_with_integer_labels(out["effectiveness"], real)
      parts |= {"l_cc": error.mean(), "l_adv": judged.mean()}
      total += completeness_weight * parts["l_cc"] + adversarial_weight * parts["l_adv"]
    if network.reconstruction:  # the target is not detached, as published
      parts["l_rec"] = losses.reconstruction(out["reconstructed"], out["complete"])
      total += reconstruction_weight * parts["l_rec"]
    return total, types.Aux(parts, extra)

  return systems.supervised(network, loss, head="head")


def _embedding_rules(name: str, letter: str) -> torch_import.Rules:
  return (
    (rf"proj_{letter}\.0\.(weight|bias)", rf"embedding/project_{name}/\1"),
    *hyper_layers.transformer_rules(rf"proj_{letter}\.1", f"embedding/embed_{name}"),
  )


TORCH_RULES = (
  *bert_lib.torch_rules(r"bertmodel\.model\.", "embedding/bert"),
  *_embedding_rules("text", "l"),
  *_embedding_rules("audio", "a"),
  *_embedding_rules("vision", "v"),
  (r"h_hyper", "hyper"),
  (r"h_p", "proxy_tokens"),
  *hyper_layers.transformer_rules("proxy_dominate_modality_generator", "proxy"),
  (r"effective_discriminator\.0\.(weight|bias)", r"discriminator_1/\1"),
  (r"effective_discriminator\.2\.(weight|bias)", r"discriminator_2/\1"),
  *hyper_layers.transformer_rules(r"completeness_check\.0", "completeness"),
  (r"completeness_check\.1\.0\.(weight|bias)", r"completeness_score_1/\1"),
  (r"completeness_check\.1\.2\.(weight|bias)", r"completeness_score_2/\1"),
  *(
    rule
    for n, name in enumerate(ORDER)
    for rule in hyper_layers.transformer_rules(rf"reconstructor\.{n}", f"reconstructor_{name}")
  ),
  *hyper_layers.transformer_rules(r"dmml\.0", "text"),
  *hyper_layers.hyper_rules(r"dmml\.1", "hyper"),
  *hyper_layers.transformer_rules(r"dmml\.2", "fusion"),
  (r"dmml\.3\.(weight|bias)", r"head/\1"),
)
