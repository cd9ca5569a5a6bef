import pickle

import numpy as np
import pytest
from sklearn.linear_model import RidgeCV

from mmjax import data, synthetic

ARRAYS = synthetic.make_arrays(seed=0)


def pooled(fields, modality, keep=1.0):
  """[N, D] mean over the valid steps, of which only the first share is kept."""
  if modality == "text":
    lengths = fields["text_bert"][:, 1].sum(1)
  else:
    lengths = np.array(fields[f"{modality}_lengths"])
  steps = np.arange(fields[modality].shape[1]) < keep * lengths[:, None]
  return (fields[modality] * steps[..., None]).sum(1) / lengths[:, None]


def corr(modalities, keep=1.0):
  """Test correlation of a ridge regression on pooled features, trained on complete data."""
  train, test = ARRAYS["train"], ARRAYS["test"]
  model = RidgeCV(np.logspace(-3, 3, 13)).fit(
    np.concatenate([pooled(train, m) for m in modalities], 1), train["regression_labels"]
  )
  prediction = model.predict(np.concatenate([pooled(test, m, keep) for m in modalities], 1))
  error = np.abs(prediction - test["regression_labels"]).mean()
  return np.corrcoef(prediction, test["regression_labels"])[0, 1], error


def test_text_is_strongest_and_the_others_complement_it():
  alone = {m: corr([m])[0] for m in ("text", "audio", "vision")}
  assert alone["text"] > 0.75 > max(alone["audio"], alone["vision"])
  assert min(alone.values()) > 0.4
  assert corr(list(alone))[0] > alone["text"] + 0.03


@pytest.mark.parametrize("modality", ["text", "audio", "vision"])
def test_missing_steps_take_a_part_of_the_evidence(modality):
  (whole, error), (half, half_error) = corr([modality]), corr([modality], keep=0.5)
  assert 0 < half < whole and half_error > error


def test_a_seed_gives_the_same_arrays_and_another_one_others():
  again, other = synthetic.make_arrays(seed=0), synthetic.make_arrays(seed=1)
  np.testing.assert_array_equal(again["test"]["audio"], ARRAYS["test"]["audio"])
  assert (other["test"]["audio"] != ARRAYS["test"]["audio"]).any()


def test_tokens_words_lengths_and_videos_agree():
  videos = {split: {i.split("$_$")[0] for i in f["id"]} for split, f in ARRAYS.items()}
  assert not videos["train"] & videos["valid"] and not videos["valid"] & videos["test"]
  for fields in ARRAYS.values():
    ids, mask, _ = fields["text_bert"].transpose(1, 0, 2)
    lengths = mask.sum(1).astype(int)
    assert (ids[:, 0] == synthetic.CLS).all()
    assert (ids[np.arange(len(ids)), lengths - 1] == synthetic.SEP).all()
    assert ((ids > 0) == (mask > 0)).all()
    assert [len(text.split()) + 2 for text in fields["raw_text"]] == lengths.tolist()
    steps = np.arange(fields["audio"].shape[1])
    beyond = steps >= np.array(fields["audio_lengths"])[:, None]
    assert (fields["audio"][beyond] == 0).all()
    assert np.abs(fields["regression_labels"]).max() <= 3


def test_the_pickle_holds_the_arrays(tmp_path):
  path = synthetic.write_pickle(tmp_path / "deep" / "a.pkl", ARRAYS)
  with path.open("rb") as file:
    read = pickle.load(file)
  np.testing.assert_array_equal(read["valid"]["vision"], ARRAYS["valid"]["vision"])
  assert [p.name for p in path.parent.iterdir()] == ["a.pkl"]
  dataset = data.from_arrays(read, name="synthetic")
  assert dataset.spec.num_train == 600 and dataset.spec.audio.length == 30
