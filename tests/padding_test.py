"""Rows padded in front: read as if they were padded at the end, or noted."""

import copy
import warnings

import numpy as np
import pytest

from data_prep import card
from mmjax import check, data, synthetic

ARRAYS = synthetic.make_arrays(seed=4, num_train=24, num_valid=8, num_test=8)
TIMED = ("audio", "vision")
PLAIN = data.from_arrays(ARRAYS, name="any")


def lengths_of(fields, name):
  if name == "text":
    return fields["text_bert"][:, 1].sum(1).astype(int)
  return np.array(fields[f"{name}_lengths"])


def to_the_end(x, lengths, rows=slice(None)):
  """Moves the first `lengths` steps of the rows to the end."""
  moved = x.copy()
  for row in np.arange(len(x))[rows]:
    moved[row] = np.roll(x[row], len(x[row]) - lengths[row], 0)
  return moved


def arranged(*, front=(), lengths=True, tokens=True, rows=slice(None)):
  """The arrays with some modalities padded in front, with or without lengths."""
  arrays = copy.deepcopy(ARRAYS)
  for fields in arrays.values():
    sizes = {name: lengths_of(fields, name) for name in ("text", *TIMED)}
    for name in front:
      if name == "text_bert":
        moved = to_the_end(fields[name].swapaxes(1, 2), sizes["text"], rows)
        fields[name] = np.ascontiguousarray(moved.swapaxes(1, 2))
      else:
        fields[name] = to_the_end(fields[name], sizes[name], rows)
    if not lengths:
      for name in TIMED:
        del fields[f"{name}_lengths"]
    if not tokens:
      del fields["text_bert"]
  return arrays


def read(arrays, *notes, **options):
  """The dataset, which must come with these notes, others aside."""
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = data.from_arrays(arrays, name="any", **options)
  texts = [str(w.message) for w in caught]
  for note in notes:
    assert any(note in text for text in texts), (note, texts)
  return found


def assert_read_as_plain(found, names=("text", *TIMED), expected=PLAIN):
  for split in data.SPLITS:
    for name in names:
      ours, theirs = (getattr(getattr(d, split), name) for d in (found, expected))
      np.testing.assert_array_equal(ours.valid, theirs.valid)
      np.testing.assert_array_equal(ours.x, theirs.x)


@pytest.mark.parametrize(
  "front, lengths, tokens",
  [
    (TIMED, True, True),  # MMSA-FET, padding_location="start"
    (TIMED, False, True),
    (("text", *TIMED), False, False),  # MulT
    (("text",), True, True),  # states before their ids
    (("text", "text_bert"), True, True),  # a tokenizer that pads on the left
    (("text_bert",), True, True),
  ],
)
def test_rows_padded_in_front_are_read_as_if_padded_at_the_end(front, lengths, tokens):
  arrays = arranged(front=front, lengths=lengths, tokens=tokens)
  before = copy.deepcopy(arrays)
  notes = []
  for name in front:
    key, steps = ("text", 20) if "text" in name else (name, synthetic.SHAPES[name][0])
    short = (lengths_of(ARRAYS["train"], key) < steps).sum()
    notes.append(f"any: train/{name}: {short} of 24 rows were padded in front")
  assert_read_as_plain(read(arrays, *notes))
  for split, fields in before.items():  # the caller's arrays are left alone
    for key in front:
      np.testing.assert_array_equal(arrays[split][key], fields[key])


def test_tokens_padded_in_front():
  expected = data.from_arrays(ARRAYS, name="any", text="tokens")
  arrays = arranged(front=("text_bert",))
  found = read(arrays, "train/text_bert", text="tokens")
  assert_read_as_plain(found, expected=expected)
  for fields in arrays.values():
    fields["text_bert"][:, 1] = 1  # a mask that knows of no padding
  found = read(arrays, "train/text_bert", text="tokens")
  assert_read_as_plain(found, ["text"], expected)


@pytest.mark.parametrize("lengths", [True, False])
def test_each_row_is_read_on_its_own(lengths):
  """Every second row is padded in front."""
  arrays = arranged(front=TIMED, lengths=lengths, rows=slice(0, None, 2))
  assert_read_as_plain(read(arrays, "train/audio: ", "valid/vision: "))


def test_empty_steps_within_a_length_are_real():
  """At its beginning, inside, at its end; on rows that fill the whole length too."""
  arrays = copy.deepcopy(ARRAYS)
  for fields in arrays.values():
    fields["vision"][:, [0, 3]] = 0
    fields["vision"][np.arange(len(fields["id"])), lengths_of(fields, "vision") - 1] = 0
  checked = check.check(arrays, "f", "any")
  assert checked.notes == [] and checked.moved["train"] == {}
  found = data.from_arrays(arrays, name="any")
  np.testing.assert_array_equal(found.train.vision.x, arrays["train"]["vision"])
  np.testing.assert_array_equal(found.train.vision.valid, PLAIN.train.vision.valid)


def test_empty_steps_move_with_their_row():
  """Padding in front and lengths: the last `length` steps, whatever is in them."""
  arrays = copy.deepcopy(ARRAYS)
  for fields in arrays.values():
    fields["audio"][:, [0, 4]] = 0
  expected = read(arrays)
  for fields in arrays.values():
    fields["audio"] = to_the_end(fields["audio"], lengths_of(fields, "audio"))
  found = read(arrays, "padded in front")
  for split in data.SPLITS:
    np.testing.assert_array_equal(getattr(found, split).audio.x, getattr(expected, split).audio.x)


def test_without_lengths_a_full_row_that_begins_empty_stays_and_is_noted():
  """In a split that is padded at the end."""
  arrays = arranged(lengths=False)
  for fields in arrays.values():
    fields["vision"][:3] = 1.0  # fill the whole length
    fields["vision"][0, :2] = 0
  found = read(arrays, "train/vision: 1 of 24 rows begin with empty steps").train.vision
  np.testing.assert_array_equal(found.x, arrays["train"]["vision"])
  assert found.valid[:3].all()


def test_lengths_made_from_the_first_empty_step():
  """They are 0 wherever padding is in front."""
  arrays = arranged(front=TIMED)
  for fields in arrays.values():
    for name in TIMED:
      empty = ~fields[name].any(-1)
      fields[f"{name}_lengths"] = np.where(empty.any(1), empty.argmax(1), empty.shape[1])
  assert_read_as_plain(read(arrays, "24 rows have a length of 0 but are not empty"))


def test_lengths_that_contradict_the_values_are_noted():
  arrays = copy.deepcopy(ARRAYS)
  arrays["valid"]["audio_lengths"][2] -= 4  # steps beyond the length
  notes = check.check(arrays, "f", "any").notes
  assert notes == ["valid/audio: 1 of 8 rows hold steps beyond their length, which are not read"]
  arrays = arranged(front=TIMED)
  for fields in arrays.values():
    fields["audio_lengths"] = [30] * len(fields["id"])  # the array's, not the rows'
  notes = [note for note in check.check(arrays, "f", "any").notes if "audio" in note]
  assert len(notes) == 3 and all("that their length counts as real" in note for note in notes)


def test_a_few_full_rows_that_begin_empty_are_not_noted():
  arrays = copy.deepcopy(ARRAYS)
  fields = arrays["train"]
  fields["vision"][:3], fields["vision_lengths"][:3] = 1.0, [25] * 3
  fields["vision"][0, :2] = 0
  assert check.check(arrays, "f", "any").notes == []


def test_the_mask_tells_that_a_text_begins_with_an_unknown_word():
  """Most rows are full and begin empty; without a mask that would be padding in front."""
  arrays = copy.deepcopy(ARRAYS)
  for fields in arrays.values():
    fields["text_bert"][:, 1] = 1
    fields["text"][:], fields["text"][:, 0] = 1.0, 0.0
  found = read(arrays).train.text
  np.testing.assert_array_equal(found.x, arrays["train"]["text"])
  assert found.valid.all()


def test_an_aligned_word_without_a_vector_does_not_shift_the_others():
  arrays = copy.deepcopy(ARRAYS)
  for fields in arrays.values():
    mask = fields.pop("text_bert")[:, 1, :, None]
    for name in TIMED:
      del fields[f"{name}_lengths"]
      fields[name] = fields[name][:, :20].copy() * 0 + mask
    fields["text"][:, 0] = 0  # an unknown word
  expected = read(arrays)
  for split, fields in arrays.items():
    for name in ("text", *TIMED):
      fields[name] = to_the_end(fields[name], lengths_of(ARRAYS[split], "text"))
  assert_read_as_plain(read(arrays, "padded in front"), expected=expected)


def test_rows_without_anything_stay():
  arrays = arranged(front=TIMED, lengths=False)
  arrays["train"]["vision"][5] = 0
  found = read(arrays, "padded in front").train.vision
  assert not found.valid[5].any() and not found.x[5].any()


def test_the_card_counts_moved_rows(tmp_path):
  path = synthetic.write_pickle(tmp_path / "a.pkl", arranged(front=["audio"]))
  checked = check.check(arranged(front=["audio"]), "a.pkl", "any", own=True)
  found = card.make_card(checked, [path], "any", "tfrecord")
  assert 20 <= found["moved"]["train"]["audio"] <= 24
  count = found["moved"]["valid"]["audio"]
  text = f"note: valid/audio: {count} of 8 rows were padded in front"
  assert text in card.to_text(found)
