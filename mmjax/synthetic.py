"""Built-in data: sentences, voices and faces of a planted sentiment, in the MMSA layout.

Nothing is downloaded: a newcomer, the tests and the notebooks run on these arrays. A latent
sentiment shows in all three modalities, strongest in text; audio and vision share one weak
view of it and each has one of its own, so that together they help and neither replaces text.
The evidence is spread over the steps: a missing span takes away a part of it.
"""

import os
import pathlib
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np

CLS, SEP, FIRST_WORD = 101, 102, 1000
# Words by the sentiment that they tell, from strongly negative to strongly positive.
WORDS = (
  ("awful", "terrible", "worst"),
  ("bad", "boring", "weak"),
  ("the", "movie", "was", "scene", "plot", "actor", "story", "and"),
  ("good", "nice", "fun"),
  ("great", "brilliant", "best"),
)
# Steps and channels of each modality.
SHAPES = {"text": (20, 32), "audio": (30, 8), "vision": (25, 12)}
# How clearly a step shows the sentiment, its modality's own view and the shared one.
CLARITY = {"text": (0.55, 0.0, 0.15), "audio": (0.05, 0.3, 0.2), "vision": (0.05, 0.3, 0.2)}
CLIPS = 10  # of one video


def make_arrays(
  seed: int = 0, *, num_train: int = 600, num_valid: int = 150, num_test: int = 150
) -> dict[str, dict[str, Any]]:
  """Synthetic samples in the layout of MMSA's feature pickles.

  Args:
    seed: the same seed gives the same arrays.
    num_train, num_valid, num_test: rows of each split.

  Returns:
    {"train" | "valid" | "test": {"id", "raw_text", "text" [N, 20, 32], "text_bert"
    [N, 3, 20], "audio" [N, 30, 8], "audio_lengths", "vision" [N, 25, 12], "vision_lengths",
    "regression_labels" [N] in [-3, 3], "classification_labels", "annotations"}}.
  """
  random = np.random.default_rng(seed)
  # one world for all splits: the directions in which a modality shows the sentiment
  world = {m: random.normal(size=(3, dim)) for m, (_, dim) in SHAPES.items()}
  vocabulary = random.normal(size=(len(WORDS), SHAPES["text"][1]))
  sizes = {"train": num_train, "valid": num_valid, "test": num_test}
  arrays, video = {}, 0
  for split, rows in sizes.items():
    arrays[split] = _make_split(random, rows, world, vocabulary, video)
    video += -(-rows // CLIPS)  # videos do not stand in two splits
  return arrays


def _make_split(random, rows, world, vocabulary, first_video) -> dict[str, Any]:
  # views of the sentiment that no text tells: one that both other modalities share, one each
  shared = random.normal(size=rows)
  own = {m: random.normal(size=rows) for m in SHAPES}
  spoken = random.normal(size=rows)
  sentiment = 1.1 * spoken + 0.5 * shared + 0.35 * (own["audio"] + own["vision"])
  label = np.clip(np.round(sentiment * 5) / 5, -3, 3).astype(np.float32)

  fields, lengths = {}, {}
  for m, (steps, dim) in SHAPES.items():
    lengths[m] = random.integers(steps // 3, steps + 1, rows)
    valid = np.arange(steps) < lengths[m][:, None]
    views = np.stack([spoken, own[m], shared], 1) * CLARITY[m]  # [N, 3]
    strength = random.exponential(size=(rows, steps, 1))  # some steps tell more than others
    x = strength * (views @ world[m])[:, None] + random.normal(size=(rows, steps, dim))
    fields[m] = x * valid[..., None]
  words = _write_words(random, spoken, lengths["text"])
  ids = np.zeros((rows, SHAPES["text"][0]))
  for row, sentence in enumerate(words):
    ids[row, : len(sentence) + 2] = [CLS, *(FIRST_WORD + word for _, word in sentence), SEP]
    for step, (group, _) in enumerate(sentence, start=1):
      fields["text"][row, step] += 0.5 * vocabulary[group]
  mask = ids > 0
  spelled = [word for group in WORDS for word in group]
  name = lambda row: f"video{first_video + row // CLIPS:03d}$_${row % CLIPS}"  # noqa: E731
  return {
    "id": np.array([name(row) for row in range(rows)]),
    "raw_text": np.array([" ".join(spelled[word] for _, word in s) for s in words]),
    "text": fields["text"].astype(np.float32),
    "text_bert": np.stack([ids, mask, np.zeros_like(ids)], 1).astype(np.float32),
    "audio": fields["audio"].astype(np.float32),
    "audio_lengths": lengths["audio"].tolist(),
    "vision": fields["vision"].astype(np.float32),
    "vision_lengths": lengths["vision"].tolist(),
    "regression_labels": label,
    "classification_labels": np.sign(label) + 1,
    "annotations": np.array(["Negative", "Neutral", "Positive"])[np.sign(label).astype(int) + 1],
  }


def _write_words(random, spoken, lengths) -> list[list[tuple[int, int]]]:
  """Each sentence as (group, word): two words fewer than its tokens, [CLS] and [SEP]."""
  offsets = np.cumsum([0, *(len(group) for group in WORDS)])
  sentences = []
  for sentiment, length in zip(spoken, lengths, strict=True):
    mood = np.exp(-0.5 * (np.linspace(-2, 2, len(WORDS)) - sentiment) ** 2)
    mood[len(WORDS) // 2] += 2.0  # most words tell nothing
    groups = random.choice(len(WORDS), size=length - 2, p=mood / mood.sum())
    sentences.append([(g, int(offsets[g] + random.integers(len(WORDS[g])))) for g in groups])
  return sentences


def write_pickle(path: str | os.PathLike, arrays: Mapping[str, Mapping[str, Any]]) -> pathlib.Path:
  """Writes arrays as a pickle in the MMSA layout; the file appears only when it is whole."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  draft = path.with_name(path.name + ".part")
  with draft.open("wb") as file:
    pickle.dump({split: dict(fields) for split, fields in arrays.items()}, file, protocol=4)
  os.replace(draft, path)
  return path
