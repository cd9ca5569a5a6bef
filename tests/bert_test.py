"""BERT: masks, [PAD], folders. Numbers are checked against the published models by parity."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxprs
from mmjax import bert, types

SETTINGS = {
  "vocab_size": 11,
  "hidden_size": 6,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 8,
  "max_position_embeddings": 7,
  "model_type": "bert",
}
CONFIG = bert.make_config(SETTINGS)
IDS = np.array([[3, 4, 5, 2, 0], [3, 9, 2, 0, 0]])
MASK = IDS > 0
apply = jax.jit(bert.Bert(CONFIG).apply)


@pytest.fixture(scope="module")
def params():
  params = jax.jit(bert.Bert(CONFIG).init)(jax.random.key(0), IDS, MASK)["params"]
  return jax.tree.map(lambda p: 20 * p, params)  # BERT's 0.02 leaves nothing to see


def published_names(params):
  """Parameters -> a BertModel's state_dict."""
  state = {}
  for table in ("word", "position", "token_type"):
    state[f"embeddings.{table}_embeddings.weight"] = params[f"{table}_embeddings"]

  def put(name, entry):
    weight = entry["kernel"].T if "kernel" in entry else entry["scale"]
    state[f"{name}.weight"], state[f"{name}.bias"] = weight, entry["bias"]

  put("embeddings.LayerNorm", params["embeddings_norm"])
  for n in range(CONFIG.num_hidden_layers):
    at, layer = f"encoder.layer.{n}", params[f"layer_{n}"]
    for name in ("query", "key", "value"):
      put(f"{at}.attention.self.{name}", layer[name])
    put(f"{at}.attention.output.dense", layer["attention_output"])
    put(f"{at}.attention.output.LayerNorm", layer["attention_norm"])
    put(f"{at}.intermediate.dense", layer["intermediate"])
    put(f"{at}.output.dense", layer["output"])
    put(f"{at}.output.LayerNorm", layer["output_norm"])
  return {name: np.ascontiguousarray(value) for name, value in state.items()}


def write(folder, state, **settings):
  (folder / "config.json").write_text(json.dumps({**SETTINGS, **settings}))
  safetensors.numpy.save_file(state, folder / "model.safetensors")


def test_padding_is_not_attended_to(params):
  other = np.where(MASK, IDS, 7)
  ours, theirs = apply({"params": params}, IDS, MASK), apply({"params": params}, other, MASK)
  np.testing.assert_allclose(ours[MASK], theirs[MASK], atol=1e-6)
  unmasked = apply({"params": params}, other, np.ones_like(MASK))
  assert np.abs(ours[MASK] - unmasked[MASK]).max() > 1e-3


def test_segments_move_the_states(params):
  zeros, ones = np.zeros_like(IDS), np.ones_like(IDS)
  plain = apply({"params": params}, IDS, MASK)
  np.testing.assert_array_equal(plain, apply({"params": params}, IDS, MASK, zeros))
  assert np.abs(plain - apply({"params": params}, IDS, MASK, ones)).max() > 1e-3


def test_pad_gets_no_gradient(params):
  """Not even where padding feeds the loss."""
  grads = jax.jit(jax.grad(lambda p: jnp.sin(apply({"params": p}, IDS, MASK)).sum()))(params)
  words = np.abs(grads["word_embeddings"]).sum(1)
  assert words[bert.PAD] == 0
  assert (words[[2, 3, 4, 5, 9]] > 0).all()
  assert np.abs(grads["position_embeddings"][4]).sum() > 0  # padding itself does feed it


def test_dropout_only_with_a_key(params):
  plain = apply({"params": params}, IDS, MASK)
  dropped = jax.jit(
    lambda seed: apply({"params": params}, IDS, MASK, rngs={"dropout": jax.random.key(seed)})
  )
  first, again, second = dropped(0), dropped(0), dropped(1)
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - plain).max() > 1e-3
  assert np.abs(first - second).max() > 1e-3


def test_in_bfloat16_every_product_is_of_halves(params):
  halves = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
  encode = lambda params: bert.Bert(CONFIG).apply({"params": params}, IDS, MASK)  # noqa: E731
  traced = jax.make_jaxpr(jax.grad(lambda p: encode(p).sum()))(halves)
  products = jaxprs.named(traced.jaxpr, "dot_general")
  assert {v.aval.dtype for product in products for v in product.invars} == {jnp.dtype("bfloat16")}
  assert len(products) == 3 * 8 * CONFIG.num_hidden_layers
  states, exact = (np.asarray(apply({"params": p}, IDS, MASK), float) for p in (halves, params))
  assert np.linalg.norm((states - exact)[MASK]) < 0.05 * np.linalg.norm(exact[MASK])


def test_too_long_a_text():
  ids = np.ones((1, 8), int)
  with pytest.raises(ValueError, match="7 positions, but the text has 8"):
    jax.eval_shape(bert.Bert(CONFIG).init, jax.random.key(0), ids, ids)


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM from TensorFlow"])
def test_load(tmp_path, params, kind):
  state = published_names(params)
  if kind != "BertModel":
    old = {"weight": "gamma", "bias": "beta"}
    state = {
      "bert." + re.sub(r"LayerNorm\.(weight|bias)$", lambda m: f"LayerNorm.{old[m[1]]}", name): v
      for name, v in state.items()
    }
    state["cls.predictions.bias"] = state["bert.pooler.dense.bias"] = np.zeros(3, np.float32)
  write(tmp_path, state, layer_norm_eps=1e-9)
  config, loaded = bert.load(tmp_path)
  assert config == CONFIG._replace(layer_norm_eps=1e-9)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  setup = bert.setup({"folder": str(tmp_path), "hidden_dropout_prob": 0.5})
  assert setup.config == config._replace(hidden_dropout_prob=0.5)
  replaced = setup.with_weights({"bert": None, "head": 1})
  np.testing.assert_array_equal(replaced["bert"]["word_embeddings"], params["word_embeddings"])
  assert replaced["head"] == 1


def test_shards(tmp_path, params):
  """What `save_pretrained` writes of a large model: files, and an index of names."""
  state = published_names(params)
  names = sorted(state)
  parts = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
  for file, held in parts.items():
    safetensors.numpy.save_file({name: state[name] for name in held}, tmp_path / file)
  index = {"metadata": {}, "weight_map": {n: file for file, held in parts.items() for n in held}}
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
  (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
  jax.tree.map(np.testing.assert_array_equal, bert.load(tmp_path)[1], params)
  (tmp_path / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(
    bert.BertFolderError, match="model-00002-of-00002.safetensors: cannot be read"
  ):
    bert.load(tmp_path)
  (tmp_path / "model.safetensors.index.json").write_text("[]")
  with pytest.raises(bert.BertFolderError, match="index.json: cannot be read"):
    bert.load(tmp_path)


def spec_of(tokens=True, vocab=11, length=7):
  text = types.ModalitySpec(length, 0, True, vocab) if tokens else types.ModalitySpec(length, 9)
  return types.Spec(text, types.ModalitySpec(3, 2), types.ModalitySpec(3, 2), num_train=4)


def test_token_ids_need_weights_unless_random_ones_are_asked_for(tmp_path, params):
  write(tmp_path, published_names(params))
  for settings in (None, {}, {"folder": ""}, {"hidden_dropout_prob": 0.2}):
    with pytest.raises(types.UsageError, match=r"--config\.model\.bert\.folder.*from_scratch"):
      bert.setup(settings).check(spec_of())
    bert.setup(settings).check(spec_of(tokens=False))  # features need no BERT
  for settings in ({"from_scratch": True}, SETTINGS, {"folder": tmp_path}):
    bert.setup(settings).check(spec_of())
  with pytest.raises(types.UsageError, match="exclude each other"):
    bert.setup({"folder": tmp_path, "from_scratch": True})


def test_token_ids_are_held_against_the_vocabulary_and_the_positions():
  setup = bert.setup(SETTINGS)
  with pytest.raises(types.UsageError, match="token id 11, but the BERT's vocabulary has only 11"):
    setup.check(spec_of(vocab=12))
  with pytest.raises(types.UsageError, match="7 positions, but the text has 8"):
    setup.check(spec_of(length=8))
  setup.check(spec_of(tokens=False, vocab=12, length=8))


def test_half_precision_weights_become_float32(tmp_path, params):
  write(tmp_path, {k: v.astype(jnp.bfloat16) for k, v in published_names(params).items()})
  loaded = bert.load(tmp_path)[1]["word_embeddings"]
  assert loaded.dtype == jnp.float32
  np.testing.assert_allclose(loaded, params["word_embeddings"], rtol=1e-2)


def test_a_folder_that_cannot_be_read(tmp_path, params):
  state = published_names(params)
  with pytest.raises(bert.BertFolderError, match="config.json: cannot be used"):
    bert.load(tmp_path / "nowhere")
  write(tmp_path, state)
  (tmp_path / "model.safetensors").unlink()
  with pytest.raises(bert.BertFolderError, match="model.safetensors: cannot be read"):
    bert.load(tmp_path)
  (tmp_path / "model.safetensors").write_bytes(b"cut off")
  with pytest.raises(bert.BertFolderError, match="model.safetensors: cannot be read"):
    bert.load(tmp_path)
  (tmp_path / "config.json").write_text('{"model_type": "bert"')
  with pytest.raises(bert.BertFolderError, match="config.json: cannot be used"):
    bert.load(tmp_path)


@pytest.mark.parametrize(
  ("setting", "value"),
  [("model_type", "roberta"), ("hidden_act", "relu"), ("num_attention_heads", 4)],
)
def test_another_architecture(tmp_path, params, setting, value):
  write(tmp_path, published_names(params), **{setting: value})
  with pytest.raises(bert.BertFolderError, match=setting):
    bert.load(tmp_path)


def test_missing_and_misshapen_weights_are_all_named(tmp_path, params):
  state = published_names(params)
  del state["encoder.layer.1.output.dense.bias"]
  state["embeddings.word_embeddings.weight"] = np.zeros((5, 6), np.float32)
  write(tmp_path, state)
  with pytest.raises(bert.BertFolderError) as error:
    bert.load(tmp_path)
  for part in (str(tmp_path), "layer_1/output/bias", "embeddings.word_embeddings.weight"):
    assert part in str(error.value)
