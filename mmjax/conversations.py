"""Conversations: which utterances of a split belong to one video, and in which order.

`group` adds the columns "conversation", "turn" and "speaker" to the `info` of a dataset's splits,
which stay what they were: a row is an utterance. A source or a grid over a split with these
columns takes whole conversations, as batches that `take` makes: masks, losses and predictions see
utterances there too, and `types.places` tells how they lie.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import data, types
from mmjax.check import SPLITS

COLUMNS = ("conversation", "turn", "speaker")
_CLIP = r"(?P<clip>\d+\.?\d*)"
# What ids look like; the first that matches the whole id decides.
PATTERNS = (
  rf"(?P<video>.+?)\$_\${_CLIP}(\$_\$.*)?",  # MMSA: video$_$clip; MulT: video, start, end
  rf"(?P<video>Ses\d.*)_(?P<speaker>[FM]){_CLIP}",  # IEMOCAP: Ses01F_impro01_F000
  rf"(?P<video>.+)\[{_CLIP}\]",  # the CMU multimodal SDK: video[clip]
  rf"(?P<video>.+)[_/](utt)?{_CLIP}",  # MOSI: video_clip; MELD: dia0_utt3
)


class Name(NamedTuple):
  """What an id tells: the video, the number of the clip in it, and who speaks ("" if unknown)."""

  video: str
  clip: float
  speaker: str


def parse(name: str) -> Name | None:
  """The parts of an utterance's id, see `PATTERNS`; None if it holds no video."""
  for pattern in PATTERNS:
    if match := re.fullmatch(pattern, name):
      found = match.groupdict()
      # samples without ids are named by their split and row
      if found["video"] in SPLITS:
        return None
      return Name(found["video"], float(found["clip"]), found.get("speaker") or "")
  return None


def group(dataset: data.Dataset) -> data.Dataset:
  """Tells which utterances are of one video, by the ids.

  Args:
    dataset: in memory.

  Returns:
    The dataset, with three more columns [N] int32 in the `info` of each split: "conversation"
    numbers the split's videos, "turn" the utterances of each by their clip (those with the same
    clip by their row), "speaker" the dataset's speakers, 0 where ids tell none.

  Raises:
    DataError: if the training split stays on disk.

  Warns:
    UserWarning: of the number of ids that hold no video; each is a conversation of its own.
  """
  if not isinstance(dataset.train, types.Batch):
    raise data.DataError(
      f"{dataset.name}: conversations cannot be streamed, their utterances lie anywhere in the"
      " files: set config.data.stream=False."
    )
  names = {split: [parse(name) for name in dataset.ids[split]] for split in SPLITS}
  parsed = [name for found in names.values() for name in found]
  known = [name for name in parsed if name is not None]
  if len({name.video for name in known}) == 1:  # of everything: it tells nothing
    names, known = {split: [None] * len(found) for split, found in names.items()}, []
  if len(known) < len(parsed):
    example = next(
      one
      for split in SPLITS
      for one, name in zip(dataset.ids[split], names[split], strict=True)
      if name is None
    )
    warnings.warn(
      f"{dataset.name}: {len(parsed) - len(known)} of {len(parsed)} ids hold no video, such as"
      f" {example!r}: each of these utterances is a conversation of its own. Expected are ids"
      " like video$_$3, video_3 or video[3].",
      stacklevel=2,
    )
  told = speakers(dataset.ids)

  def grouped(split):
    batch = getattr(dataset, split)
    return batch._replace(info={**batch.info, **columns(names[split], told)})

  return dataset._replace(**{split: grouped(split) for split in SPLITS})


def speakers(ids: Mapping[str, Sequence[str]]) -> list[str]:
  """Who speaks in a dataset, by its ids; the column "speaker" is the place in this list."""
  names = (parse(name) for split in ids.values() for name in split)
  return sorted({name.speaker for name in names if name} - {""})


def columns(names: Sequence[Name | None], speakers: Sequence[str]) -> dict[str, np.ndarray]:
  """The columns that `group` adds to one split, [N] int32 each.

  Args:
    names: of its N rows; None: a conversation of its own.
    speakers: of the dataset, see `speakers`.
  """
  videos: dict[Any, list[int]] = {}
  for row, name in enumerate(names):
    videos.setdefault(row if name is None else name.video, []).append(row)
  found = {column: np.zeros(len(names), np.int32) for column in COLUMNS}
  for number, rows in enumerate(videos.values()):
    rows = sorted(rows, key=lambda row: name.clip if (name := names[row]) else 0)
    found["conversation"][rows] = number
    found["turn"][rows] = np.arange(len(rows))
  for row, name in enumerate(names):
    if name and name.speaker:
      found["speaker"][row] = speakers.index(name.speaker)
  return found


def is_grouped(split: types.Batch) -> bool:
  """Whether a split has the columns that `group` adds."""
  return "conversation" in split.info


def table(split: types.Batch) -> np.ndarray:
  """[V, U] int32: the row of each conversation's utterances in their order; -1 beyond its end.

  Args:
    split: the whole split, with the columns of `group`.
  """
  conversation, turn = (np.asarray(split.info[name]) for name in COLUMNS[:2])
  found = np.full((conversation.max() + 1, turn.max() + 1), -1, np.int32)
  found[conversation, turn] = np.arange(len(turn))
  return found


def take(split: types.Batch, rows: Any) -> types.Batch:
  """A batch of whole conversations.

  Args:
    split: N utterances.
    rows: [C, U] int32, of `table`.

  Returns:
    C · U utterances, conversation after conversation. Where `rows` is -1 everything is 0 and
    nothing valid, and the index is N. `info["place"]` is what `types.places` gives.
  """
  count, length = rows.shape
  flat = rows.reshape(-1)
  real = flat >= 0

  def of(a):
    return jnp.asarray(a)[jnp.where(real, flat, 0)]

  def blank(a):
    a = of(a)
    return jnp.where(real.reshape(-1, *[1] * (a.ndim - 1)), a, jnp.zeros((), a.dtype))

  def modality(m):
    return types.Modality(blank(m.x), blank(m.valid), of(m.seen), of(m.fill))

  kept: Mapping[str, Any] = {k: v for k, v in split.info.items() if k not in COLUMNS[:2]}
  place = jnp.eye(length, dtype=bool)[None] & (rows >= 0)[..., None]
  return types.Batch(
    **{name: modality(getattr(split, name)) for name in types.MODALITIES},
    label=blank(split.label),
    index=jnp.where(real, of(split.index), split.index.shape[0]),
    info={**jax.tree.map(blank, kept), "place": place.reshape(count * length, length)},
  )
