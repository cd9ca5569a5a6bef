import copy

import numpy as np
import pytest

from mmjax import data, synthetic, types

ARRAYS = synthetic.make_arrays(seed=3, num_train=9, num_valid=4, num_test=4)


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


def test_tokens_and_classes():
  dataset = data.from_arrays(ARRAYS, name="any", text="tokens", task="classification")
  np.testing.assert_array_equal(dataset.valid.text.x, ARRAYS["valid"]["text_bert"][:, 0])
  assert dataset.valid.text.x.dtype == np.int32 and (dataset.valid.text.fill == types.UNK).all()
  assert dataset.spec.text == types.ModalitySpec(20, 0, tokens=True)
  assert dataset.spec.num_classes == 3 and dataset.train.label.dtype == np.int32


def test_aligned_data_take_the_texts_lengths():
  arrays = copy.deepcopy(ARRAYS)
  for fields in arrays.values():
    for name in ("audio", "vision"):
      del fields[f"{name}_lengths"]
      fields[name] = fields[name][:, :20]
  train = data.from_arrays(arrays, name="any").train
  np.testing.assert_array_equal(train.vision.valid, train.text.valid)
  for fields in arrays.values():
    del fields["text_bert"]  # then the text ends at its last step that is not zero
  text = data.from_arrays(arrays, name="any").train.text
  np.testing.assert_array_equal(text.valid, train.text.valid)


def test_standardizing_uses_the_valid_training_steps():
  plain = data.from_arrays(ARRAYS, name="any")
  scaled = data.from_arrays(ARRAYS, name="any", standardize=True)
  steps = scaled.train.vision.x[scaled.train.vision.valid]
  np.testing.assert_allclose(steps.mean(0), 0, atol=1e-5)
  np.testing.assert_allclose(steps.std(0), 1, atol=1e-4)
  assert (scaled.test.vision.x[~scaled.test.vision.valid] == 0).all()
  known = plain.train.vision.x[plain.train.vision.valid]
  expected = (plain.test.vision.x - known.mean(0)) / known.std(0)
  valid = plain.test.vision.valid
  np.testing.assert_allclose(scaled.test.vision.x[valid], expected[valid], atol=1e-4)


def test_unimodal_labels_and_segments_go_into_info():
  arrays = copy.deepcopy(ARRAYS)
  for fields in arrays.values():
    fields["regression_labels_A"] = np.arange(len(fields["id"]), dtype=np.float32)
    fields["text_bert"][:, 2, 0] = 1
  info = data.from_arrays(arrays, name="sims", text="tokens").train.info
  np.testing.assert_array_equal(info["label_audio"], np.arange(9))
  assert info["segment_ids"].sum() == 9


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


def test_missing_fields_are_named_with_their_split(tmp_path):
  arrays = copy.deepcopy(ARRAYS)
  del arrays["test"]["text"]
  with pytest.raises(data.DataError, match="any/test: the key 'text' is missing"):
    data.from_arrays(arrays, name="any")
  with pytest.raises(data.DataError, match="split 'valid' is missing"):
    data.from_arrays({"train": arrays["train"], "test": arrays["test"]}, name="any")
  with pytest.raises(data.DataError, match="data_prep.convert"):
    data.load(tmp_path, "any")
