"""Where the real steps of a row are; rows that are padded in front get their steps moved.

Batches hold real steps first. Some files hold them last (MulT's, and MMSA-FET's
`padding_location="start"`). Each row and modality is read by this rule, where a step is empty if
all its channels are zero:

- With a length (a modality's own `…_lengths`, the attention mask for `text`, or the text for
  modalities of the text's length without lengths): what reaches beyond the length although it
  would fit into it is moved forward, by the padding in front or by the empty steps there,
  whichever are fewer. Empty steps within a length are real. What does not fit is not read, and
  noted. A length of 0 on a row that is not empty was no length: the values decide.
- Without a length: empty steps at the end are padding. A row that begins empty and does not end so
  is padded in front if, in its split, more rows are like it than end empty; or more than fill the
  whole length otherwise, and more than begin and end empty. Else it stays as it is, and is noted.
- An attention mask that begins with zeros, or marks leading [PAD] as real, is padded in front, and
  the states of the same text are moved with it.
"""

from collections.abc import Iterator

import numpy as np

PAD = 0  # [PAD]'s id
_BLOCK = 1 << 24  # bytes that are looked at in one go: no second copy of an array in memory


def blocks(x: np.ndarray) -> Iterator[slice]:
  """Slices of rows that cover x, each of a few megabytes."""
  rows = max(1, _BLOCK * len(x) // max(1, x.nbytes))
  return (slice(start, start + rows) for start in range(0, len(x), rows))


def extent(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """[N, L, D] -> [N] the first step that is not empty, and the one after the last; L, 0 if none."""
  rows, steps = x.shape[:2]
  first, end = np.full(rows, steps), np.zeros(rows, int)
  for part in blocks(x):
    some = np.any(x[part].astype(np.float32, copy=False) != 0, -1)
    found = some.any(1)
    first[part] = np.where(found, some.argmax(1), steps)
    end[part] = np.where(found, steps - some[:, ::-1].argmax(1), 0)
  return first, end


def _move(x: np.ndarray, shift: np.ndarray) -> None:
  """Turns rows [L, …] of x to the front by [N] steps, in place."""
  rows, steps = np.flatnonzero(shift), np.arange(x.shape[1])
  for part in blocks(x):
    some = rows[(rows >= part.start) & (rows < part.stop)]
    x[some] = x[some[:, None], (steps + shift[some, None]) % x.shape[1]]


class _Split:
  """The arrays of one split, which it may change, with what it counts and notes."""

  def __init__(self, fields: dict[str, np.ndarray], where: str, own: bool):
    self.fields, self.where, self.own = fields, where, own
    self.moved: dict[str, int] = {}
    self.notes: list[str] = []

  def change(self, key: str) -> np.ndarray:
    """The array of a key that may be written to."""
    value = self.fields[key]
    if not (self.own and value.flags.writeable):
      self.fields[key] = value = value.copy()
    return value

  def note(self, key: str, rows: np.ndarray, text: str) -> None:
    if rows.any():
      self.notes.append(f"{self.where}/{key}: {rows.sum()} of {len(rows)} rows {text}")

  def move(self, key: str, shift: np.ndarray) -> None:
    if shift.any():
      x = self.change(key)
      _move(x.swapaxes(1, 2) if key == "text_bert" else x, shift)
      self.moved[key] = int((shift > 0).sum())
      text = "were padded in front: their steps were moved to the beginning"
      self.note(key, shift > 0, text)

  def tokens(self) -> tuple[np.ndarray, np.ndarray]:
    """Straightens `text_bert` -> [N] shifts and lengths."""
    ids, mask = self.fields["text_bert"][:, 0, :, None], self.fields["text_bert"][:, 1, :, None] > 0
    (words, _), (lead, end) = extent(ids), extent(mask)
    steps = ids.shape[1]
    shift = np.where(end > 0, lead, 0)
    # where all rows begin with one 0, it may be another vocabulary's first token
    least = 1 if (words == 0).any() else 2
    hidden = (words >= least) & (words < steps) & (words > shift) & (end > words)
    if hidden.any():
      mask = self.change("text_bert")[:, 1]
      mask[hidden[:, None] & (np.arange(steps) < words[:, None])] = 0
      shift = np.where(hidden, words, shift)
    self.move("text_bert", shift)
    return shift, np.maximum(end - shift, 0)

  def unmeasured(self, key: str, first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """[N] shifts of rows without lengths."""
    steps = self.fields[key].shape[1]
    front = (first > 0) & (first < end) & (end == steps)
    others = (
      (end > 0) & (end < steps),
      (first == 0) & (end == steps),
      (first > 0) & (first < end) & (end < steps),
    )
    ending, full, both = (count.sum() for count in others)
    if front.sum() > ending:  # then so are those that begin and end empty
      return np.where(first < end, first, 0)
    if front.sum() > max(full, both):
      return np.where(front, first, 0)
    text = "begin with empty steps and fill the length: they are read as they are, not as padded"
    self.note(key, front, text + " in front; give lengths to be sure")
    return np.zeros_like(first)

  def text(self, mask: tuple[np.ndarray, np.ndarray] | None) -> tuple[np.ndarray, np.ndarray]:
    """Straightens `text`, given the mask's shifts and lengths -> [N] shifts and lengths."""
    x = self.fields["text"]
    first, end = extent(x)
    if mask is not None:
      shift, lengths = mask
      shift = np.where((shift > 0) & (first >= shift), shift, _fit(first, end, lengths, x)[0])
      self.move("text", shift)
      return shift, lengths
    shift = self.unmeasured("text", first, end)
    if shift.any():
      for key in [key for key in ("audio", "vision") if key in self.fields]:
        other = self.fields[key]
        if f"{key}_lengths" not in self.fields and other.shape[1] == x.shape[1]:
          begin, stop = extent(other)  # aligned: the first word may lack a vector
          known = (begin > 0) | (stop == x.shape[1])
          shift = np.where(known, np.minimum(shift, begin), shift)
    self.move("text", shift)
    return shift, np.maximum(end - shift, 0)

  def timed(self, key: str, text: tuple[np.ndarray, np.ndarray] | None) -> None:
    """Straightens a modality, given the text's shifts and lengths if it is aligned to them."""
    x, name = self.fields[key], f"{key}_lengths"
    (first, end), steps = extent(x), x.shape[1]
    beyond = np.zeros(len(x), bool)
    if name in self.fields:
      lengths = self.fields[name].astype(int)
      front = (first > 0) & (first < end) & (end == steps)
      lost = (lengths == 0) & (end > 0)
      if lost.any():
        lengths = np.where(lost, np.where(front, steps - first, end), lengths)
        self.fields[name] = lengths.astype(self.fields[name].dtype)
        self.note(key, lost, "have a length of 0 but are not empty: the values gave their length")
      shift, beyond = _fit(first, end, lengths, x)
      hollow = front & (lengths == steps)
      if hollow.sum() > ((first == 0) & (end == steps)).sum():
        text_ = "begin with empty steps that their length counts as real; if they are padding,"
        self.note(key, hollow, f"{text_} leave out {name!r} or correct it")
    elif text is not None:
      shift, lengths = text
      fit, beyond = _fit(first, end, lengths, x)
      together = (shift > 0) & (first >= shift)
      shift, beyond = np.where(together, shift, fit), beyond & ~together
    else:
      shift = self.unmeasured(key, first, end)
    self.move(key, shift)
    self.note(key, beyond, "hold steps beyond their length, which are not read")


def _fit(first, end, lengths, x) -> tuple[np.ndarray, np.ndarray]:
  """[N] shifts that bring what reaches beyond the lengths into them, and where none does."""
  beyond = end > lengths
  fits = end - first <= lengths
  shift = np.minimum(first, x.shape[1] - lengths)
  return np.where(beyond & fits, shift, 0), beyond & ~fits


def straighten(
  fields: dict[str, np.ndarray], where: str, own: bool
) -> tuple[dict[str, int], list[str]]:
  """Moves the steps of rows that are padded in front to the beginning; see the module's rule.

  Args:
    fields: clean arrays of one split; entries are replaced.
    where: names the split in notes.
    own: whether the arrays themselves may be written to.

  Returns:
    The number of moved rows by key, and notes.
  """
  split = _Split(fields, where, own)
  known = {}  # the text's shifts and lengths by its number of steps
  if "text_bert" in fields:
    known[fields["text_bert"].shape[2]] = split.tokens()
  if "text" in fields:
    steps = fields["text"].shape[1]
    known[steps] = split.text(known.get(steps))
  for key in [key for key in ("audio", "vision") if key in fields]:
    split.timed(key, known.get(fields[key].shape[1]))
  return split.moved, split.notes
