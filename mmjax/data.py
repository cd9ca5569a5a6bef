"""Datasets: arrays in the MMSA layout, or a converted dataset on disk -> batches.

The MMSA layout is a dictionary per split with `id`, `text` [N, L, D], `text_bert` [N, 3, L]
(ids, attention mask, segments), `audio` and `vision` [N, L, D], their `…_lengths` [N] where
the data are not aligned, `regression_labels` and `classification_labels` [N].
`python -m data_prep.convert` turns a pickle of it into TFRecords, which `load` reads.
"""

import collections
import json
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mmjax import types

SPLITS = ("train", "valid", "test")
CARD = "card.json"  # the statistics beside a converted dataset
TEXTS = ("features", "tokens")
TASKS = ("regression", "classification")
# Smallest and largest label of known datasets; the training labels' range for any other.
LABEL_RANGES = {"mosi": (-3.0, 3.0), "mosei": (-3.0, 3.0), "sims": (-1.0, 1.0)}

Arrays = Mapping[str, Mapping[str, Any]]


class DataError(types.UsageError):
  """Data that cannot be used; the message says where, what, and how to mend it."""


class Dataset(NamedTuple):
  """A whole dataset in memory.

  Attributes:
    train, valid, test: each split as one batch of N rows (numpy arrays); `train` is a
      `stream.Stream` where it stays on disk.
    spec: its shapes and task.
    ids: the samples' names by split, in the order of the rows.
    name: the dataset's name.
  """

  train: types.Batch
  valid: types.Batch
  test: types.Batch
  spec: types.Spec
  ids: Mapping[str, list[str]]
  name: str


def take(batch: types.Batch, rows: Any) -> types.Batch:
  """The given rows (indices, a slice or a mask) of a batch."""
  return jax.tree.map(lambda a: a[rows], batch)


def pad_rows(batch: types.Batch, multiple: int) -> types.Batch:
  """Fills a batch up to a multiple of rows by repeating its first row."""
  rows = batch.index.shape[0]
  missing = -rows % multiple
  if not missing:
    return batch
  return take(batch, np.concatenate([np.arange(rows), np.zeros(missing, int)]))


def from_arrays(
  arrays: Arrays,
  *,
  name: str,
  text: str = "features",
  task: str = "regression",
  standardize: bool = False,
  label_range: tuple[float, float] | None = None,
) -> Dataset:
  """Makes a dataset of arrays in the MMSA layout.

  Args:
    arrays: {"train" | "valid" | "test": {key: array}}, see the module's docstring. Of the
      keys that are not named there, SIMS' `regression_labels_{T,A,V}` become `info`'s
      "label_text", "label_audio", "label_vision".
    name: the dataset's name; known ones bring their label range.
    text: "features" reads `text`; "tokens" reads the ids of `text_bert`, for a model with a
      BERT.
    task: "regression" reads `regression_labels`, "classification" `classification_labels`.
    standardize: whether features are standardized by the mean and standard deviation of
      the training split's valid steps (padding stays 0). Token ids are not.
    label_range: smallest and largest label of the scale, if the name is not a known one.

  Returns:
    The dataset. Text is valid where the attention mask of `text_bert` says so, or else up to
    its last non-zero step; audio and vision up to their lengths, or (aligned data, without
    lengths) where the text is.

  Raises:
    DataError: if a split or a needed key is missing.
  """
  if text not in TEXTS:
    raise DataError(f"text is {text!r}, expected one of {TEXTS}.")
  if task not in TASKS:
    raise DataError(f"task is {task!r}, expected one of {TASKS}.")
  for split in SPLITS:
    if split not in arrays:
      raise DataError(f"{name}: the split {split!r} is missing; there are {sorted(arrays)}.")
  splits = {split: make_split(arrays[split], f"{name}/{split}", text, task) for split in SPLITS}
  if standardize:
    found = _moments(splits["train"])
    splits = {split: scale(batch, found) for split, batch in splits.items()}
  labels = np.concatenate([splits[split].label for split in SPLITS])
  spec = make_spec(splits["train"], labels, name, task, label_range)
  ids = {
    split: [str(i) for i in arrays[split].get("id", range(len(splits[split].index)))]
    for split in SPLITS
  }
  return Dataset(**splits, spec=spec, ids=ids, name=name)


def make_spec(
  train: types.Batch,
  labels: np.ndarray,
  name: str,
  task: str,
  label_range: tuple[float, float] | None,
) -> types.Spec:
  """The spec of a training split, with all `labels` of the dataset; see `from_arrays`."""
  known = next((r for n, r in LABEL_RANGES.items() if name.lower().startswith(n)), None)
  return types.Spec(
    *(_spec(getattr(train, m)) for m in types.MODALITIES),
    num_train=len(train.index),
    num_classes=int(labels.max()) + 1 if task == "classification" else 0,
    label_range=label_range or known or (float(labels.min()), float(labels.max())),
  )


def _get(fields: Mapping[str, Any], key: str, where: str, why: str) -> np.ndarray:
  if key not in fields:
    raise DataError(f"{where}: the key {key!r} is missing, {why}; there are {sorted(fields)}.")
  return np.asarray(fields[key])


def make_split(fields: Mapping[str, Any], where: str, text: str, task: str) -> types.Batch:
  """One split's fields as a batch of all its rows; see `from_arrays`. `where` is for errors."""
  info, tokens = {}, None
  if text == "tokens" or "text_bert" in fields:
    tokens = _get(fields, "text_bert", where, "which text='tokens' reads")
  if text == "tokens":
    ids, valid = tokens[:, 0].astype(np.int32), tokens[:, 1] > 0
    language = types.modality(ids, valid)
    if tokens[:, 2].any():
      info["segment_ids"] = tokens[:, 2].astype(np.int32)
  else:
    x = np.asarray(_get(fields, "text", where, "which text='features' reads"), np.float32)
    same = tokens is not None and tokens.shape[2] == x.shape[1]
    language = types.modality(x, tokens[:, 1] > 0 if same else _until_last_nonzero(x))
  others = {m: _timed(fields, m, where, language.valid) for m in ("audio", "vision")}
  if task == "regression":
    label = _get(fields, "regression_labels", where, "which task='regression' reads")
    label = label.reshape(-1).astype(np.float32)
  else:
    label = _get(fields, "classification_labels", where, "which task='classification' reads")
    label = label.reshape(-1).astype(np.int32)
  for letter, modality in (("T", "text"), ("A", "audio"), ("V", "vision")):
    if f"regression_labels_{letter}" in fields:
      values = np.asarray(fields[f"regression_labels_{letter}"], np.float32)
      info[f"label_{modality}"] = values.reshape(-1)
  rows = len(label)
  return types.Batch(
    text=language,
    **others,
    label=label,
    index=np.arange(rows, dtype=np.int32),
    info=info,
  )


def _until_last_nonzero(x: np.ndarray) -> np.ndarray:
  """[N, L] True up to the last step that is not all zeros."""
  some = np.any(x != 0, -1)
  return np.flip(np.maximum.accumulate(np.flip(some, 1), 1), 1)


def _timed(fields, modality, where, text_valid) -> types.Modality:
  x = np.asarray(_get(fields, modality, where, "which every system reads"), np.float32)
  lengths = fields.get(f"{modality}_lengths")
  if lengths is not None:
    valid = np.arange(x.shape[1]) < np.asarray(lengths).reshape(-1, 1)
  elif x.shape[1] == text_valid.shape[1]:
    valid = text_valid
  else:
    valid = _until_last_nonzero(x)
  return types.modality(x, valid)


def _spec(m: types.Modality) -> types.ModalitySpec:
  tokens = m.x.ndim == 2
  return types.ModalitySpec(m.x.shape[1], 0 if tokens else m.x.shape[2], tokens)


Moments = Mapping[str, tuple[np.ndarray, np.ndarray]]


def _moments(train: types.Batch) -> Moments:
  """Mean and deviation of every feature channel over the training's valid steps, by modality."""
  found = {}
  for name in types.MODALITIES:
    m = getattr(train, name)
    if m.x.ndim == 3:
      steps = m.x[m.valid].astype(np.float64)
      found[name] = as_moments(steps.mean(0), steps.std(0))
  return found


def as_moments(mean: Any, std: Any) -> tuple[np.ndarray, np.ndarray]:
  """What `scale` takes for one modality; a channel that never changes is not divided."""
  mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
  return mean, np.where(std > 0, std, np.float32(1))


def scale(batch: types.Batch, moments: Moments) -> types.Batch:
  """Subtracts the mean and divides by the deviation, on valid steps; padding stays 0."""
  scaled = {}
  for name, (mean, std) in moments.items():
    m = getattr(batch, name)
    scaled[name] = m._replace(x=np.where(m.valid[..., None], (m.x - mean) / std, 0))
  return batch._replace(**scaled)


def dataset_folder(data_dir: str | pathlib.Path, name: str) -> pathlib.Path:
  """The newest complete version of a converted dataset.

  Raises:
    DataError: if there is none.
  """
  folder = pathlib.Path(data_dir) / name
  complete = [version for version in folder.glob("*") if is_complete(version)]
  if not complete:
    raise DataError(
      f"{folder} holds no complete dataset. Convert a pickle first: python -m data_prep.convert"
      f" --pickle=F --dataset={name} --data_dir={data_dir}"
    )
  return max(complete, key=lambda path: [int(n) for n in path.name.split(".")])


def is_complete(folder: pathlib.Path) -> bool:
  """Whether a folder holds a dataset that was converted to its end."""
  numbers = folder.name.split(".")
  files = (folder / CARD, folder / "dataset_info.json")
  return all(n.isdigit() for n in numbers) and all(file.exists() for file in files)


def read_card(data_dir: str | pathlib.Path, name: str) -> dict[str, Any]:
  """The statistics that `data_prep.convert` wrote beside a dataset."""
  text = (dataset_folder(data_dir, name) / CARD).read_text(encoding="utf-8")
  return json.loads(text)


def read_arrays(
  data_dir: str | pathlib.Path, name: str, splits: Sequence[str] = SPLITS
) -> dict[str, dict[str, np.ndarray]]:
  """Reads a converted dataset back: {split: {key: array}}, bit for bit what was converted.

  Args:
    data_dir: folder of the datasets.
    name: the dataset's name.
    splits: which ones.

  Returns:
    The arrays, rows in the order of the pickle; strings as an object array of str.

  Raises:
    DataError: if there is no complete dataset of that name.
  """
  folder = dataset_folder(data_dir, name)
  builder = import_tfds().builder_from_directory(str(folder))
  return {split: read_columns(builder, split) for split in splits}


def read_columns(builder: Any, split: str, **options: Any) -> dict[str, np.ndarray]:
  """A split as arrays; `builder` and `options`, such as `decoders`, are TensorFlow Datasets'."""
  columns = collections.defaultdict(list)
  for rows in _batches(builder, split, **options):
    for key, values in rows.items():
      columns[key].append(values)
  return {key: _decode(np.concatenate(parts)) for key, parts in columns.items()}


def _decode(values: np.ndarray) -> np.ndarray:
  """Strings come back as UTF-8 bytes."""
  if values.dtype.kind not in "OS":
    return values
  texts = np.empty(len(values), object)
  texts[:] = [value.decode() for value in values]
  return texts


def import_tfds():
  """TensorFlow Datasets, imported at its first use and without TensorFlow's start-up chatter."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # its notice ignores the log level
  import tensorflow_datasets as tfds

  logging.getLogger("absl").addFilter(_worth_reading)
  return tfds


def _worth_reading(record: logging.LogRecord) -> bool:
  return "tensorflow_datasets" not in record.pathname or record.levelno >= logging.ERROR


def _batches(builder, split: str, size: int = 512, **options) -> Iterator[dict[str, np.ndarray]]:
  """A split's rows in their order, up to `size` at a time."""
  tfds = import_tfds()
  if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
    dataset = builder.as_dataset(split, batch_size=size, shuffle_files=False, **options)
    yield from tfds.as_numpy(dataset)
    return
  kinds = {key: feature.np_dtype for key, feature in builder.info.features.items()}
  for row in builder.as_data_source(split, **options):
    yield {key: np.array([value], kinds[key]) for key, value in row.items()}


def load(data_dir: str | pathlib.Path, name: str, **options: Any) -> Dataset:
  """Reads a converted dataset; `options` are those of `from_arrays`.

  Raises:
    DataError: if there is no complete dataset of that name, or a needed key is missing.
  """
  return from_arrays(read_arrays(data_dir, name), name=name, **options)
