"""The check of arrays: what is refused, by file, split and key; what is mended, and noted.

Files and notebooks pass the same one: faults are tried both ways.
"""

import copy
import warnings

import numpy as np
import pytest

from mmjax import check, data, synthetic

ARRAYS = synthetic.make_arrays(seed=2, num_train=12, num_valid=4, num_test=4)
CLASSES = np.arange(12) % 3


def edited(split, key, value):
  """The arrays with one field replaced, or removed if the value is None."""
  arrays = copy.deepcopy(ARRAYS)
  if value is None:
    del arrays[split][key]
  else:
    arrays[split][key] = value
  return arrays


def everywhere(key, make):
  """The arrays with a field of all splits made from their fields."""
  arrays = copy.deepcopy(ARRAYS)
  for fields in arrays.values():
    fields[key] = make(fields)
  return arrays


def with_token(value, row=0):
  tokens = ARRAYS["train"]["text_bert"].copy()
  tokens[1, row, 2] = value
  return tokens


def one_hot(columns, n=12):
  return np.eye(columns)[np.arange(n) % columns]


@pytest.mark.parametrize(
  "split, key, value, found",
  [
    ("valid", "audio", None, "the keys"),
    ("test", "regression_labels", np.zeros(3, np.float32), "3 rows, expected 4"),
    ("train", "vision", np.zeros((12, 25)), r"shape \(12, 25\), expected 3 axes"),
    ("train", "vision", np.zeros((12, 25, 0)), r"shape \(12, 25, 0\), expected at least one"),
    ("train", "audio", np.zeros((12, 0, 8)), r"shape \(12, 0, 8\), expected at least one"),
    ("valid", "id", [], "no rows"),
    ("test", "id", ["a", "b", "a", "c"], "'a' twice"),
    ("train", "regression_labels", np.full(12, 3.5, np.float32), "3.5 in row 0"),
    ("train", "regression_labels", np.full(12, np.nan, np.float32), "nan in row 0.*finite"),
    ("train", "regression_labels", np.zeros((12, 7)), r"shape \(12, 7\).*labels\[:, 0\]"),
    ("train", "regression_labels", one_hot(4), r"shape \(12, 4\), expected one label"),
    ("train", "regression_labels", np.full(12, 1e39), r"1e\+39 in row 0.*finite"),
    ("train", "id", 3, "a int, expected one string for each row"),
    ("train", "regression_labels", 1.0, "a single number"),
    ("train", "regression_labels", ["good"] * 12, "no array of numbers"),
    ("train", "classification_labels", np.full(12, 0.5), "0.5 in row 0"),
    ("train", "classification_labels", CLASSES - 1, "-1 in row 0.*whole classes from 0"),
    ("train", "classification_labels", [np.nan] * 12, "nan in row 0"),
    ("train", "classification_labels", 2 * one_hot(4), "rows with a single 1"),
    ("train", "classification_labels", np.ones((12, 4, 2)), r"shape \(12, 4, 2\)"),
    ("train", "audio_lengths", [31] * 12, "31 in row 0.*from 0 to 30"),
    ("train", "audio_lengths", [-1] * 12, "-1 in row 0"),
    ("train", "audio_lengths", [3, 2.5] * 6, "2.5 in row 1 .*whole numbers"),
    ("train", "vision_lengths", [np.nan] * 12, "nan in row 0"),
    ("test", "audio", np.zeros((4, 30, 9), np.float32), r"rows of shape \(30, 9\)"),
    ("test", "text_bert", np.zeros((4, 2, 20), np.float32), r"\[N, 3, L\]"),
    ("train", "text_bert", with_token(np.nan), "the id nan in row 1, step 2"),
    ("train", "text_bert", with_token(-4), "the id -4.0 in row 1, step 2"),
    ("train", "text_bert", with_token(7.5), "the id 7.5 in row 1, step 2"),
    ("train", "text_bert", with_token(-1, row=2), "the segment -1.0 in row 1, step 2"),
    ("train", "text_bert", ARRAYS["train"]["text_bert"][:, [0, 2, 1]], "in this order"),
    ("test", "id", list(ARRAYS["train"]["id"][:4]), "which is in 'train' too"),
    ("test", "annotations", None, "it in some splits only"),
    ("test", "audio", [[1.0], [2.0, 3.0]], "no array of numbers"),
    ("test", "audio", np.zeros((4, 30, 8), complex), "no array of numbers.*complex"),
  ],
)
def test_a_fault_is_named_with_file_split_and_key(split, key, value, found):
  arrays = edited(split, key, value)
  expected = rf", split '{split}', key '{key}': found .*{found}"
  with pytest.raises(data.DataError, match=r"mosi\.pkl" + expected):
    check.check(arrays, "mosi.pkl", "mosi")
  with pytest.raises(data.DataError, match="mosi" + expected):
    data.from_arrays(arrays, name="mosi", task="classification")


def test_missing_splits_and_other_things_are_named():
  arrays = {split: fields for split, fields in ARRAYS.items() if split != "valid"}
  with pytest.raises(data.DataError, match=r"f\.pkl, split 'valid': found the splits"):
    check.check(arrays, "f.pkl", "any")
  with pytest.raises(data.DataError, match="found a list, expected a dictionary"):
    data.from_arrays([1], name="any")


def test_good_arrays_pass_as_they_are():
  checked = check.check(ARRAYS, "f.pkl", "mosi")
  assert checked.notes == []
  for split, fields in ARRAYS.items():
    for key in ("text", "text_bert", "audio", "vision", "regression_labels"):
      assert checked.arrays[split][key] is fields[key]  # not even copied


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_values_that_are_not_finite_become_zero_and_are_counted(kind):
  arrays = edited("train", "audio", ARRAYS["train"]["audio"].astype(kind))
  audio = arrays["train"]["audio"]
  audio[0, 0, :3] = [-np.inf, np.nan, np.inf]
  if kind is np.float64:
    audio[0, 0, 3] = -1e39  # finite here, but models read float32
  count = 3 + (kind is np.float64)
  given = audio.copy()
  with pytest.warns(UserWarning, match=f"train/audio: {count} NaN or infinite values"):
    found = data.from_arrays(arrays, name="any").train.audio.x
  np.testing.assert_array_equal(audio, given)  # the caller's array is left alone
  assert (found[0, 0, :count] == 0).all() and (found[0, 0, count:] != 0).all()
  checked = check.check(arrays, "f.pkl", "any", own=True)
  assert checked.replaced == {"train": {"audio": count}, "valid": {}, "test": {}}
  np.testing.assert_array_equal(checked.arrays["train"]["audio"].astype(np.float32), found)


def test_one_hot_classes_are_read_as_classes():
  arrays = everywhere("classification_labels", lambda f: one_hot(4, len(f["id"])))
  with pytest.warns(UserWarning, match="one-hot rows of 4 columns"):
    found = data.from_arrays(arrays, name="iemocap", task="classification")
  assert found.train.label.tolist() == (np.arange(12) % 4).tolist()
  assert found.spec.num_classes == 4


def test_classes_begin_at_0_and_unseen_ones_are_noted():
  arrays = everywhere("classification_labels", lambda f: f["classification_labels"] + 1)
  with pytest.raises(data.DataError, match="no class below 1, expected .* subtract 1"):
    data.from_arrays(arrays, name="any", task="classification")
  data.from_arrays(arrays, name="any")  # regression does not read them
  arrays = edited("test", "classification_labels", [0, 1, 2, 4])
  with pytest.warns(UserWarning, match="no sample has the class 3, 4"):
    data.from_arrays(arrays, name="any", task="classification")


def test_mults_labels_and_ids():
  """`labels` [N, 1, 1]; ids of three byte strings (video, start, end)."""
  arrays = {}
  for split, fields in ARRAYS.items():
    n = len(fields["id"])
    arrays[split] = {key: fields[key] for key in ("text", "audio", "vision")}
    arrays[split]["labels"] = fields["regression_labels"].reshape(n, 1, 1)
    arrays[split]["id"] = np.array([[f"{split}{i}", "0.5", "2"] for i in range(n)], "S")
  with pytest.warns(UserWarning, match="'labels' were read as 'regression_labels'"):
    found = data.from_arrays(arrays, name="mosi")
  np.testing.assert_array_equal(found.train.label, ARRAYS["train"]["regression_labels"])
  assert found.ids["test"][1] == "test1$_$0.5$_$2"
  arrays["test"]["id"] = [(b"a", 1.5), ["b", 2], np.array(["c", "d"]), "e"]
  assert check.check(arrays, "f", "mosi").arrays["test"]["id"].tolist() == [
    "a$_$1.5",
    "b$_$2",
    "c$_$d",
    "e",
  ]


EMOTIONS = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])  # one yes in each row


def emotional(rows):
  """The arrays with MulT's `labels` of some rows of answers alone."""
  arrays = {}
  for split, fields in ARRAYS.items():
    arrays[split] = {k: fields[k] for k in ("id", "text", "audio", "vision")}
    arrays[split]["labels"] = rows[np.arange(len(fields["id"])) % len(rows)]
  return arrays


@pytest.mark.parametrize("form", ["pairs", "one-hot", "classes"])
def test_four_emotions_are_binary_problems_and_classes(form):
  """[N, 4, 2] of no and yes, [N, 4], or the classes: the same problems in the files' order."""
  arrays = emotional(
    {"pairs": np.eye(2)[EMOTIONS], "one-hot": EMOTIONS}.get(form, EMOTIONS.argmax(1))
  )
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    found = data.from_arrays(arrays, name="iemocap", task="binary")
    classes = data.from_arrays(arrays, name="iemocap", task="classification")
  assert found.spec.problems == ("neutral", "happy", "sad", "angry")
  assert found.spec.num_classes == 16 and classes.spec.num_classes == 4
  assert found.train.label.tolist() == [2, 1, 8] * 4 and found.train.label.dtype == np.int32
  assert classes.train.label.tolist() == [1, 0, 3] * 4 and classes.spec.problems == ()


def test_emotions_may_come_together_but_are_then_no_classes():
  both = np.eye(2)[np.array([[0, 1, 1, 0], [0, 0, 0, 0]])]
  for rows in (both, both.argmax(2)):
    with pytest.warns(UserWarning, match="'labels' were read as 'binary_labels'"):
      found = data.from_arrays(emotional(rows), name="iemocap", task="binary")
    assert found.test.label.tolist() == [6, 0] * 2
    with pytest.raises(data.DataError, match="classification_labels"), warnings.catch_warnings():
      warnings.simplefilter("ignore")
      data.from_arrays(emotional(rows), name="iemocap", task="classification")
  spec = data.make_dataset(
    check.check(emotional(both), "f", "mine").arrays, name="mine", task="binary"
  ).spec
  assert spec.problems == ("0", "1", "2") and spec.num_classes == 8  # no yes beyond the third
  with pytest.raises(data.DataError, match="4 binary problems"):
    data.make_spec(found.train, np.array([16]), "iemocap", "binary", None)


@pytest.mark.parametrize(
  ("answers", "told"),
  [
    (np.full((12, 4), 0.5), "0 or 1"),
    (np.ones((12, 4, 2)), r"\(1, 0\) for no"),
    (np.ones((12, 1)), r"at least two"),
  ],
)
def test_other_answers_are_refused(answers, told):
  arrays = everywhere("binary_labels", lambda f: np.zeros((len(f["id"]), 4)))
  arrays["train"]["binary_labels"] = answers
  with pytest.raises(data.DataError, match=f"binary_labels.*{told}"):
    check.check(arrays, "f", "any")


def test_samples_without_ids_are_named():
  arrays = {
    split: {key: value for key, value in fields.items() if key != "id"}
    for split, fields in ARRAYS.items()
  }
  with pytest.warns(UserWarning, match="no ids"):
    found = data.from_arrays(arrays, name="any")
  assert found.ids["valid"] == ["valid_0", "valid_1", "valid_2", "valid_3"]


def test_unknown_keys_are_noted_and_empty_ones_ignored():
  arrays = edited("train", "audio_length", [3] * 12)  # a slip
  arrays["test"]["raw_video"] = None
  with pytest.warns(UserWarning, match="left out, not in the MMSA layout: audio_length$"):
    data.from_arrays(arrays, name="any")


def test_objects_and_half_precision_are_numbers():
  audio = ARRAYS["train"]["audio"]
  rows = np.empty(12, object)
  rows[:] = list(audio)
  arrays = edited("train", "audio", rows)
  arrays["train"]["vision"] = arrays["train"]["vision"].astype(np.float16)
  arrays["test"]["text"] = arrays["test"]["text"].astype(">f4")
  arrays["train"]["regression_labels"] = list(map(str, arrays["train"]["regression_labels"]))
  checked = check.check(arrays, "f", "any")
  assert checked.arrays["test"]["text"].dtype.isnative
  train = data.from_arrays(arrays, name="any").train
  np.testing.assert_array_equal(train.audio.x, audio)
  np.testing.assert_allclose(train.vision.x, ARRAYS["train"]["vision"], rtol=1e-2, atol=1e-6)
  np.testing.assert_allclose(train.label, ARRAYS["train"]["regression_labels"], rtol=1e-6)


def test_labels_of_an_unknown_dataset_may_lie_anywhere():
  arrays = edited("train", "regression_labels", np.full(12, 70.0))
  for name in ("other", "mosi_of_ours"):
    assert data.from_arrays(arrays, name=name).spec.label_range[1] == 70
  with pytest.raises(data.DataError, match="70.0 in row 0.*from 0 to 10"):
    data.from_arrays(arrays, name="other", label_range=(0, 10))
