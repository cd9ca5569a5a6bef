import copy
import logging
import sys

import jax
import numpy as np
import pytest

from mmjax import data, synthetic, types

ARRAYS = synthetic.make_arrays(seed=0, num_train=9, num_valid=4, num_test=4)


def test_features_lengths_and_labels():
  dataset = data.from_arrays(ARRAYS, name="mosi")
  train = dataset.train
  np.testing.assert_array_equal(train.text.x, ARRAYS["train"]["text"])
  np.testing.assert_array_equal(train.text.valid, ARRAYS["train"]["text_bert"][:, 1] > 0)
  np.testing.assert_array_equal(train.audio.valid.sum(1), ARRAYS["train"]["audio_lengths"])
  assert train.audio.seen.all() and (train.audio.fill == 0).all()
  np.testing.assert_array_equal(train.label, ARRAYS["train"]["regression_labels"])
  assert dataset.spec.text == types.ModalitySpec(20, 32)
  assert dataset.spec.label_range == (-3.0, 3.0) and dataset.spec.num_classes == 0
  assert dataset.ids["test"] == list(ARRAYS["test"]["id"])
  assert dataset.name == "mosi" and dataset.spec.num_train == 9
  for batch, rows in zip(dataset[:3], (9, 4, 4), strict=True):
    np.testing.assert_array_equal(batch.index, np.arange(rows))
    kinds = [a.dtype for a in (batch.text.x, batch.vision.x, batch.label, batch.index)]
    assert kinds == [np.float32] * 3 + [np.int32] and batch.info == {}


def test_the_labels_of_all_splits_make_the_scale():
  arrays = copy.deepcopy(ARRAYS)
  arrays["valid"]["regression_labels"][0], arrays["test"]["regression_labels"][0] = -2.75, 2.875
  arrays["test"]["classification_labels"][0] = 3
  spec = data.from_arrays(arrays, name="any").spec
  assert spec.label_range == (-2.75, 2.875) and type(spec.label_range[0]) is float
  with pytest.warns(UserWarning, match="train/classification_labels: no sample has the class 3"):
    spec = data.from_arrays(arrays, name="any", task="classification").spec
  assert spec.num_classes == 4
  given = data.from_arrays(arrays, name="any", label_range=(-3.5, 3.5)).spec
  assert given.label_range == (-3.5, 3.5)


def test_a_vocabulary_is_that_of_token_ids_whose_largest_is_known():
  for text, largest, vocab in (
    ("features", 7, 0),
    ("tokens", 7, 8),
    ("tokens", None, 0),
  ):
    train = data.from_arrays(ARRAYS, name="any", text=text).train
    assert (
      data.make_spec(train, train.label, "any", "regression", None, largest).text.vocab == vocab
    )


def test_a_channel_that_never_changes_is_not_divided():
  mean, std = data.as_moments([1, 2], [0, 4])
  assert (mean.tolist(), std.tolist(), std.dtype) == ([1, 2], [1, 4], np.float32)


def test_the_newest_complete_version_is_read(tmp_path):
  for version in ("1.0.0", "9.0.0", "10.0.0", "11.0.0", "tmp"):
    (tmp_path / "any" / version).mkdir(parents=True)
    for file in (data.CARD, "dataset_info.json")[: 1 if version == "11.0.0" else 2]:
      (tmp_path / "any" / version / file).write_text(f'"{version}"')
  assert data.dataset_folder(tmp_path, "any").name == "10.0.0"
  assert data.read_card(tmp_path, "any") == "10.0.0"


def test_what_tfds_chats_about_is_left_out_but_not_its_errors():
  for path, level, kept in (
    ("tensorflow_datasets/core.py", logging.WARNING, False),
    ("tensorflow_datasets/core.py", logging.ERROR, True),
    ("jax/core.py", logging.INFO, True),
  ):
    record = logging.LogRecord("absl", level, path, 1, "", (), None)
    assert data._worth_reading(record) == kept


def test_tokens_and_classes():
  dataset = data.from_arrays(ARRAYS, name="any", text="tokens", task="classification")
  np.testing.assert_array_equal(dataset.valid.text.x, ARRAYS["valid"]["text_bert"][:, 0])
  assert dataset.valid.text.x.dtype == np.int32 and (dataset.valid.text.fill == types.UNK).all()
  largest = max(fields["text_bert"][:, 0].max() for fields in ARRAYS.values())
  assert dataset.spec.text == types.ModalitySpec(20, 0, tokens=True, vocab=largest + 1)
  assert dataset.spec.num_classes == 3 and dataset.train.label.dtype == np.int32


def test_aligned_data_take_the_texts_lengths():
  arrays = copy.deepcopy(ARRAYS)
  for fields in arrays.values():
    for name in ("audio", "vision"):
      del fields[f"{name}_lengths"]
      steps = fields["text_bert"][:, 1, :, None] > 0
      fields[name] = fields[name][:, :20] * steps
  train = data.from_arrays(arrays, name="any").train
  np.testing.assert_array_equal(train.vision.valid, train.text.valid)
  for fields in arrays.values():
    del fields["text_bert"]  # then the text ends at its last step that is not zero
  text = data.from_arrays(arrays, name="any").train.text
  np.testing.assert_array_equal(text.valid, train.text.valid)


def test_states_and_ids_of_different_lengths_have_steps_of_their_own():
  fields = dict(ARRAYS["train"])
  fields["text"] = fields["text"][:, :12]
  for text, steps in (("features", 12), (None, 12), ("tokens", 20)):
    assert data.valid_steps(fields, text)["text"].shape == (9, steps)
  del fields["text"]
  assert data.valid_steps(fields)["text"].shape == (9, 20)


def test_standardizing_uses_the_valid_training_steps():
  plain = data.from_arrays(ARRAYS, name="any")
  scaled = data.from_arrays(ARRAYS, name="any", standardize=True)
  for name in ("audio", "vision"):
    train, test = getattr(plain.train, name), getattr(plain.test, name)
    found = getattr(scaled.test, name)
    known = train.x[train.valid]
    expected = (test.x - known.mean(0)) / known.std(0)
    np.testing.assert_allclose(found.x[test.valid], expected[test.valid], atol=1e-4)
    assert (found.x[~test.valid] == 0).all()
  np.testing.assert_array_equal(scaled.train.text.x, plain.train.text.x)  # text stays


def test_a_modality_that_is_absent_is_not_standardized():
  arrays = copy.deepcopy(ARRAYS)
  for fields in arrays.values():
    fields["vision"][:], fields["vision_lengths"] = 0, [0] * len(fields["id"])
  train = data.from_arrays(arrays, name="any", standardize=True).train
  assert not train.vision.valid.any() and not train.vision.x.any()


def test_unimodal_labels_and_segments_go_into_info():
  arrays = copy.deepcopy(ARRAYS)
  for fields in arrays.values():
    for n, letter in enumerate("TAV"):
      fields[f"regression_labels_{letter}"] = np.arange(len(fields["id"]))[:, None] / (9 + n)
    fields["regression_labels"] = fields["regression_labels"] / 3
    fields["text_bert"][:, 2, 0] = 1
  info = data.from_arrays(arrays, name="sims", text="tokens").train.info
  for n, name in enumerate(types.MODALITIES):
    np.testing.assert_allclose(info[f"label_{name}"], np.arange(9) / (9 + n), rtol=1e-6)
  assert info["segment_ids"].sum() == 9 and info["segment_ids"].dtype == np.int32


def test_padding_repeats_the_first_row():
  train = data.from_arrays(ARRAYS, name="any").train
  padded = data.pad_rows(train, 4)
  assert padded.index.tolist() == [*range(9), 0, 0, 0]
  np.testing.assert_array_equal(padded.text.x[9:], train.text.x[[0, 0, 0]])
  assert data.pad_rows(train, 3) is train


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(text="words"), "'words'"),
    (dict(task="ranking"), "'ranking'"),
  ],
)
def test_unknown_options_are_named(options, message):
  with pytest.raises(data.DataError, match=message):
    data.from_arrays(ARRAYS, name="any", **options)


def test_what_a_dataset_lacks_is_named(tmp_path):
  arrays = {
    split: {key: value for key, value in fields.items() if key != "text"}
    for split, fields in ARRAYS.items()
  }
  with pytest.raises(data.DataError, match="any/train: the key 'text' is missing"):
    data.from_arrays(arrays, name="any")
  with pytest.raises(data.DataError, match="mmjax-prepare"):
    data.load(tmp_path, "any")


def test_a_feature_file_and_its_conversion_are_the_same_dataset(tiny, tmp_path, monkeypatch):
  (tmp_path / "tiny.pkl").symlink_to(tiny / "tiny.pkl")
  assert data.feature_file(tiny, "tiny") is None  # converted
  assert data.sha256(tmp_path, "tiny") == data.sha256(tiny, "tiny")
  converted = data.load(tiny, "tiny", standardize=True)
  monkeypatch.setitem(sys.modules, "tensorflow", None)  # not installed
  for found in (
    data.load(tmp_path, "tiny", standardize=True),
    data.from_pickle(str(tiny / "tiny.pkl"), name="tiny", standardize=True),
  ):
    assert found.spec == converted.spec and found.ids == converted.ids
    jax.tree.map(np.testing.assert_array_equal, found.train, converted.train)
  with pytest.raises(data.DataError, match=r"pip install 'mmjax\[data\]'"):
    data.load(tiny, "tiny")


def test_names_are_known_as_a_whole():
  for name, expected in (
    ("mosi", (-3.0, 3.0)),
    ("SIMS_v2", (-1.0, 1.0)),
    ("simsv2", (-1.0, 1.0)),
    ("mosi_long", (-2.5, 9.0)),  # a dataset of its own
  ):
    labels = np.array([-2.5, 9.0], np.float32)
    train = data.from_arrays(ARRAYS, name="any").train
    assert data.make_spec(train, labels, name, "regression", None).label_range == expected


def test_labels_beyond_a_given_range_are_refused():
  with pytest.raises(data.DataError, match="labels from -1 to 1"):
    data.from_arrays(ARRAYS, name="any", label_range=(-1.0, 1.0))


def test_what_is_loaded_is_known_by_its_name(monkeypatch):
  monkeypatch.setattr(data, "read_arrays", lambda folder, name: ARRAYS)
  assert data.load("", "mosi").spec.label_range == (-3.0, 3.0)
  assert data.load("", "any").spec.label_range != (-3.0, 3.0)
