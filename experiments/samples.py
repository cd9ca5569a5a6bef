"""Files with a value for each sample; one appears when it is whole."""

import csv
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import numpy as np

from mmjax import evaluate, predict, types


def check(flag: str, path: str, suffixes: Sequence[str]) -> None:
  """Raises a `UsageError` unless a file of such a kind could be written there."""
  if pathlib.Path(path).suffix not in suffixes:
    raise types.UsageError(
      f"--{flag}={path}: expected a file that ends in {' or '.join(suffixes)}."
    )
  if pathlib.Path(path).is_dir():
    raise types.UsageError(f"--{flag}={path}: this is a folder, expected a file.")
  folder = pathlib.Path(path).absolute().parent
  if not folder.is_dir():
    raise types.UsageError(f"--{flag}={path}: there is no folder {folder}; make it first.")


def write(path: str, fill: Callable[[IO[bytes]], object]) -> None:
  """Writes a file under another name and then gives it its own."""
  draft = pathlib.Path(f"{path}.part")
  with draft.open("wb") as file:
    fill(file)
  draft.replace(path)


def write_csv(path: str, columns: Mapping[str, Any]) -> None:
  """Columns of equal length; numbers with all their digits."""

  def fill(file):
    text = csv.writer(_Encoded(file), lineterminator="\n")
    text.writerow(columns)
    text.writerows(zip(*columns.values(), strict=True))

  write(path, fill)


def write_npz(path: str, arrays: Mapping[str, np.ndarray]) -> None:
  """Arrays; strings as such, so that they are read without unpickling."""
  plain = {k: v.astype(str) if v.dtype == object else v for k, v in arrays.items()}
  write(path, lambda file: np.savez_compressed(file, **plain))  # pyright: ignore[reportArgumentType]


class _Encoded:
  """A binary file that takes text."""

  def __init__(self, file: IO[bytes]):
    self._file = file

  def write(self, text: str) -> None:
    self._file.write(text.encode())


def write_grid(
  path: str,
  predictions: np.ndarray,
  conditions: Sequence[evaluate.Condition],
  mask_seeds: Sequence[int],
  ids: Sequence[str],
  label: np.ndarray,
  classes: Sequence[str],
) -> None:
  """The predictions of an evaluation, sample by sample.

  Args:
    path: a `.csv` gets a row per condition, mask seed and sample, with the class's name and the
      probabilities of all where there are classes; an `.npz` the arrays as they are.
    predictions: [C, S, N, ...], see `evaluate.make_grid`.
    conditions: C of them.
    mask_seeds: S of them.
    ids: N names.
    label: [N].
    classes: their names, or nothing.
  """
  kinds, names = ([str(c[n]) for c in conditions] for n in (0, 1))
  if path.endswith(".npz"):
    arrays = {"kind": kinds, "condition": names, "mask_seed": mask_seeds, "id": ids, "label": label}
    arrays |= {"prediction": predictions, "class": classes}
    write_npz(path, {key: np.asarray(value) for key, value in arrays.items()})
    return
  cells, rows = len(kinds) * len(mask_seeds), len(ids)
  columns = {
    "kind": np.repeat(kinds, len(mask_seeds) * rows),
    "condition": np.repeat(names, len(mask_seeds) * rows),
    "mask_seed": np.tile(np.repeat(mask_seeds, rows), len(kinds)),
    "id": np.tile(np.array(ids, object), cells),
    "label": np.tile(np.array(classes, object)[label] if len(classes) else label, cells),
    **predict.columns(predictions.reshape(cells * rows, *predictions.shape[3:]), classes),
  }
  write_csv(path, columns)
