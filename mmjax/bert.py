"""A BERT encoder in linen, with weights from a local Hugging Face folder.

Semantics are those of Hugging Face's BertModel (Devlin et al. 2018): post-norm blocks, exact
GELU, no pooler. [PAD]'s embedding gets no gradient, as PyTorch's `padding_idx` has it.
"""

import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax import layers, masking, torch_import, types

Array = types.Array
PAD = 0


class BertConfig(NamedTuple):
  """The entries of a Hugging Face `config.json` that matter here; defaults are BERT-base's."""

  vocab_size: int = 30522
  hidden_size: int = 768
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  intermediate_size: int = 3072
  max_position_embeddings: int = 512
  type_vocab_size: int = 2
  layer_norm_eps: float = 1e-12
  hidden_dropout_prob: float = 0.1
  attention_probs_dropout_prob: float = 0.1
  initializer_range: float = 0.02


# What a model's `bert` may say, see `setup`.
SETTINGS = ("folder", "from_scratch", *BertConfig._fields)


class BertFolderError(types.UsageError):
  """A folder does not hold a BERT that can be read."""


# Settings that say which BERT it is to be.
_SIZES = (
  "vocab_size",
  "hidden_size",
  "num_hidden_layers",
  "num_attention_heads",
  "intermediate_size",
)
# What a config may say of choices that are not ours to make; each is also Hugging Face's default.
_SUPPORTED = {
  "model_type": "bert",
  "hidden_act": "gelu",
  "position_embedding_type": "absolute",
  "is_decoder": False,
}


def make_config(settings: Mapping[str, Any]) -> BertConfig:
  """A config from a Hugging Face dictionary; entries without influence here are ignored.

  Raises:
    ValueError: if it describes another kind of model.
  """
  for key, expected in _SUPPORTED.items():
    if settings.get(key, expected) != expected:
      raise ValueError(f"BERT config: {key} is {settings[key]!r}, only {expected!r} is supported.")
  config = BertConfig(**{k: settings[k] for k in BertConfig._fields if k in settings})
  if config.hidden_size % config.num_attention_heads:
    raise ValueError(
      f"BERT config: hidden_size {config.hidden_size} is not divisible by"
      f" num_attention_heads {config.num_attention_heads}."
    )
  return config


class _Block(nn.Module):
  config: BertConfig

  @nn.compact
  def __call__(self, x: Array, bias: Array) -> Array:
    config, width = self.config, self.config.hidden_size
    init = layers.normal(config.initializer_range)
    norm = lambda name: layers.LayerNorm(epsilon=config.layer_norm_eps, name=name)  # noqa: E731

    def heads(name):
      y = nn.Dense(width, kernel_init=init, name=name)(x)
      return y.reshape(*y.shape[:2], config.num_attention_heads, -1)

    q, k, v = heads("query"), heads("key"), heads("value")
    y = layers.attend(q, k, v, bias, layers.Dropout(config.attention_probs_dropout_prob))
    y = nn.Dense(width, kernel_init=init, name="attention_output")(y)
    x = norm("attention_norm")(x + layers.Dropout(config.hidden_dropout_prob)(y))
    y = nn.Dense(config.intermediate_size, kernel_init=init, name="intermediate")(x)
    y = nn.Dense(width, kernel_init=init, name="output")(layers.gelu(y))
    return norm("output_norm")(x + layers.Dropout(config.hidden_dropout_prob)(y))


def _mask_bias(mask: Array) -> Array:
  """[B, L] -> [B, 1, 1, L], what is added to the attention's logits."""
  return layers.attention_bias(mask.astype(bool))[:, None, None, :]


class Blocks(nn.Module):
  """Blocks of BERT over states of any width D: [B, L, D] -> [B, L, D]."""

  depth: int

  @nn.compact
  def __call__(self, x: Array, mask: Array) -> Array:
    width = x.shape[-1]
    heads = max(n for n in range(1, 13) if width % n == 0)
    config = BertConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width)
    for n in range(self.depth):
      x = _Block(config, name=f"layer_{n}")(x, _mask_bias(mask))
    return x


class Bert(nn.Module):
  """The encoder; dropout is on where `apply` gets a "dropout" key.

  Attributes:
    config: its shape.
    inject: applied to the states [B, L, D] after the first layer (CENET).
    train_embeddings: whether the embeddings get a gradient.
  """

  config: BertConfig
  inject: Callable[[Array], Array] | None = None
  train_embeddings: bool = True

  @nn.compact
  def __call__(self, ids: Array, mask: Array, segments: Array | None = None) -> Array:
    """Encodes.

    Args:
      ids: [B, L] token ids.
      mask: [B, L] bool, the attention mask.
      segments: [B, L] token types, 0 by default.

    Returns:
      [B, L, hidden_size] last hidden states.
    """
    config = self.config
    chex.assert_rank([ids, mask], 2)
    chex.assert_equal_shape([ids, mask])
    if ids.shape[1] > config.max_position_embeddings:
      raise ValueError(
        f"BERT has {config.max_position_embeddings} positions, but the text has {ids.shape[1]}"
        " tokens: shorten the sequences."
      )
    init = layers.normal(config.initializer_range)

    def table(name, rows):
      return self.param(name, init, (rows, config.hidden_size))

    words = table("word_embeddings", config.vocab_size)[ids]
    words = jnp.where((ids == PAD)[..., None], jax.lax.stop_gradient(words), words)
    positions = table("position_embeddings", config.max_position_embeddings)[: ids.shape[1]]
    types_table = table("token_type_embeddings", config.type_vocab_size)
    kinds = types_table[:1][None] if segments is None else types_table[segments]
    x = layers.LayerNorm(epsilon=config.layer_norm_eps, name="embeddings_norm")(
      words + positions[None] + kinds
    )
    x = layers.Dropout(config.hidden_dropout_prob)(x)
    if not self.train_embeddings:
      x = jax.lax.stop_gradient(x)
    for n in range(config.num_hidden_layers):
      if n == 1 and self.inject is not None:
        x = self.inject(x)
      x = _Block(config, name=f"layer_{n}")(x, _mask_bias(mask))
    return x


def text_states(config: BertConfig, batch: types.Batch) -> Array:
  """[B, L, D] states of the observed text, inside of a module: BERT's, or the features given.

  Token ids [B, L] pass through a `Bert` named "bert" (segments from `info["segment_ids"]`);
  precomputed features [B, L, D] are returned as they are observed.
  """
  x = masking.observed(batch.text)
  if x.ndim == 3:
    return x
  return Bert(config, name="bert")(x, batch.text.valid, batch.info.get("segment_ids"))


# Names of a Hugging Face BertModel -> paths below the encoder.
_LAYER = r"encoder\.layer\.(\d+)\."
TORCH_RULES = (
  (r"embeddings\.(word|position|token_type)_embeddings\.weight", r"\1_embeddings"),
  (r"embeddings\.LayerNorm\.(weight|bias)", r"embeddings_norm/\1"),
  (_LAYER + r"attention\.self\.(query|key|value)\.(weight|bias)", r"layer_\1/\2/\3"),
  (_LAYER + r"attention\.output\.dense\.(weight|bias)", r"layer_\1/attention_output/\2"),
  (_LAYER + r"attention\.output\.LayerNorm\.(weight|bias)", r"layer_\1/attention_norm/\2"),
  (_LAYER + r"intermediate\.dense\.(weight|bias)", r"layer_\1/intermediate/\2"),
  (_LAYER + r"output\.dense\.(weight|bias)", r"layer_\1/output/\2"),
  (_LAYER + r"output\.LayerNorm\.(weight|bias)", r"layer_\1/output_norm/\2"),
  (r"(embeddings\.position_ids|pooler\..*|cls\..*)", None),
)


def torch_rules(prefix: str, path: str) -> tuple[tuple[str, str | None], ...]:
  """`TORCH_RULES` for a BERT that sits at `prefix` in a state_dict and at `path` in params."""
  return tuple(
    (prefix + pattern, None if target is None else f"{path}/{target}")
    for pattern, target in TORCH_RULES
  )


class Setup(NamedTuple):
  """A model's BERT before its parameters exist.

  Attributes:
    config: its sizes.
    folder: where pretrained weights lie, or None.
    from_scratch: whether random weights were asked for.
  """

  config: BertConfig
  folder: pathlib.Path | None
  from_scratch: bool = False

  def check(self, spec: types.Spec) -> None:
    """Whether this BERT can read the text of `spec`; to be called before parameters are made.

    Raises:
      types.UsageError: if the text is token ids, and there are no weights and none were asked for,
        or an id is beyond the vocabulary, or there are more tokens than positions.
    """
    text, config = spec.text, self.config
    if not text.tokens:
      return
    if self.folder is None and not self.from_scratch:
      raise types.UsageError(
        "the text is token ids, but no pretrained BERT is given to read them: set"
        " --config.model.bert.folder=FOLDER, in Python bert=dict(folder=…). To train one from"
        " random numbers, set bert.from_scratch=True."
      )
    if text.vocab > config.vocab_size:
      raise types.UsageError(
        f"the text has the token id {text.vocab - 1}, but the BERT's vocabulary has only"
        f" {config.vocab_size} entries: use the BERT whose tokenizer made `text_bert`."
      )
    if text.length > config.max_position_embeddings:
      raise types.UsageError(
        f"BERT has {config.max_position_embeddings} positions, but the text has {text.length}"
        " tokens: shorten the sequences."
      )

  def with_weights(self, params: types.Params) -> types.Params:
    """`params` with the pretrained weights at "bert", if the model has one and a folder."""
    if self.folder is None or "bert" not in params:
      return params
    return {**params, "bert": load(self.folder)[1]}


def setup(settings: Mapping[str, Any] | None) -> Setup:
  """Reads a model's `bert` argument.

  Args:
    settings: {"folder": a local Hugging Face folder} for pretrained weights; or
      {"from_scratch": True} for random ones, or sizes as in a Hugging Face config, which mean the
      same. None is BERT-base, which needs a folder once it shall read token ids.

  Returns:
    The setup.

  Raises:
    BertFolderError: if the folder's config cannot be used.
  """
  settings = dict(settings or {})
  folder, from_scratch = settings.pop("folder", None), settings.pop("from_scratch", False)
  if folder and from_scratch:
    raise types.UsageError(
      f"bert: from_scratch=True and folder={str(folder)!r} exclude each other."
    )
  if folder:
    folder = pathlib.Path(folder)
    return Setup(make_config({**_read_config(folder), **settings}), folder)
  sized = any(settings.get(name) is not None for name in _SIZES)
  return Setup(make_config(settings), None, bool(from_scratch or sized))


def _read_config(folder: pathlib.Path) -> Mapping[str, Any]:
  path = folder / "config.json"
  try:
    settings = json.loads(path.read_text(encoding="utf-8"))
    make_config(settings)
  except (OSError, ValueError, TypeError, AttributeError) as error:
    raise BertFolderError(
      f"{path}: cannot be used ({error}). Expected the folder of a Hugging Face BERT."
    ) from None
  return settings


def tokenize(folder: str | pathlib.Path, texts: Sequence[str], length: int) -> np.ndarray:
  """Raw text -> tokens, with the tokenizer of a local Hugging Face folder.

  Args:
    folder: holds `tokenizer.json`.
    texts: N texts.
    length: L; longer texts are cut, shorter ones padded.

  Returns:
    [N, 3, L] int32, MMSA's `text_bert`: ids, attention mask, token types.

  Raises:
    BertFolderError: if there is no tokenizer that can be read.
  """
  import tokenizers

  path = pathlib.Path(folder) / "tokenizer.json"
  try:
    tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
  except Exception as error:  # noqa: BLE001 - the library raises plain Exception
    raise BertFolderError(
      f"{path}: cannot be read ({error}). Save it with `tokenizer.save_pretrained(...)`."
    ) from None
  tokenizer.enable_truncation(length)
  tokenizer.enable_padding(length=length)
  found = tokenizer.encode_batch(list(texts))
  parts = [(e.ids, e.attention_mask, e.type_ids) for e in found]
  return np.asarray(parts, np.int32).reshape(-1, 3, length)


def _modern(name: str) -> str:
  """A name in a file -> in BertModel: heads' files have a prefix, and old ones gamma and beta."""
  name = name.removeprefix("bert.")
  name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
  return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)


def load(folder: str | pathlib.Path) -> tuple[BertConfig, types.Params]:
  """Reads a local Hugging Face folder: `config.json` and the weights in safetensors.

  Args:
    folder: the folder, as `save_pretrained` writes it, the weights in one file or in shards. No
      network, no torch.

  Returns:
    The config, and the parameters for `Bert(config).apply({"params": params}, …)`.

  Raises:
    BertFolderError: if a file is missing or unreadable, if it is not a BERT, or if weights
      are missing or misshapen.
  """
  folder = pathlib.Path(folder)
  config = make_config(_read_config(folder))
  state = {_modern(name): value for name, value in _read_weights(folder).items()}
  ids = jnp.zeros((1, 1), jnp.int32)
  template = jax.eval_shape(Bert(config).init, jax.random.key(0), ids, ids)["params"]
  try:
    return config, torch_import.from_torch(template, state, TORCH_RULES)
  except torch_import.StateDictError as error:
    raise BertFolderError(f"{folder}: {error}") from None


def _read_weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of `model.safetensors`, or of all shards that its index names."""
  import safetensors
  import safetensors.numpy

  path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
  state = {}
  try:
    files = [path]
    if index.exists() and not path.exists():
      path = index
      names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
      files = [folder / name for name in sorted(set(names))]
    for path in files:
      state.update(safetensors.numpy.load_file(path))
  except FileNotFoundError as error:
    raise BertFolderError(
      f"{path}: cannot be read ({error}). A pytorch_model.bin is not read: convert it with"
      " `save_pretrained(..., safe_serialization=True)`."
    ) from None
  except (safetensors.SafetensorError, OSError, ValueError, TypeError, LookupError) as error:
    raise BertFolderError(f"{path}: cannot be read ({error}); is it whole?") from None
  return state
