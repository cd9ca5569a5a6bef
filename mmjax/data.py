"""Datasets: arrays in the MMSA layout, or a converted dataset on disk -> batches.

The MMSA layout is a dictionary per split with `id`, `text` [N, L, D], `text_bert` [N, 3, L]
(ids, attention mask, segments), `audio` and `vision` [N, L, D], their `…_lengths` [N] where
the data are not aligned, `regression_labels` and `classification_labels` [N].
`load` finds a dataset by its name: a feature file NAME.pkl (`from_pickle`), or the TFRecords that
`data_prep.convert` makes of one, which can be streamed and need TensorFlow (extra `data`). Every
way in passes the same check, see `check`.
"""

import hashlib
import json
import logging
import math
import os
import pathlib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from mmjax import check, files, padding, types
from mmjax.check import LABEL_RANGES, SPLITS, DataError

CARD = "card.json"  # the statistics beside a converted dataset
FILES = (".pkl", ".npz", ".safetensors")  # feature files
TEXTS = ("features", "tokens")
TASKS = ("regression", "classification", "binary")
STANDARDIZED = ("audio", "vision")

Arrays = Mapping[str, Mapping[str, Any]]
Moments = Mapping[str, tuple[np.ndarray, np.ndarray]]


class Dataset(NamedTuple):
  """A whole dataset in memory.

  Attributes:
    train, valid, test: each split as one batch of N rows (numpy arrays); `train` is a
      `stream.Stream` where it stays on disk.
    spec: its shapes and task.
    ids: the samples' names by split, in the order of the rows.
    name: the dataset's name.
    moments: mean and deviation by which modalities were standardized, or nothing.
    classes: names of the classes, where `annotations` have one for each; or nothing.
  """

  train: types.Batch
  valid: types.Batch
  test: types.Batch
  spec: types.Spec
  ids: Mapping[str, list[str]]
  name: str
  moments: Moments = MappingProxyType({})
  classes: tuple[str, ...] = ()


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
  """Checks arrays in the MMSA layout and makes a dataset of them; they are not changed.

  Args:
    arrays: {"train" | "valid" | "test": {key: array}}, see the module's docstring. Of the
      keys that are not named there, SIMS' `regression_labels_{T,A,V}` become `info`'s
      "label_text", "label_audio", "label_vision".
    name: the dataset's name; known ones bring their label range.
    text: "features" reads `text`; "tokens" reads the ids of `text_bert`, for a model with a
      BERT.
    task: "regression" reads `regression_labels`, "classification" `classification_labels`; "binary"
      asks of each class whether it is the sample's: it reads `binary_labels`, or the classes where
      there are none (of IEMOCAP in the order of `check.PROBLEMS`).
    standardize: whether audio and vision are standardized by the mean and standard deviation of
      the training split's valid steps (padding stays 0). Text is not.
    label_range: smallest and largest label of the scale, if the name is not a known one; by
      default those of the labels.

  Returns:
    The dataset. Text is valid where the attention mask of `text_bert` says so, or else up to
    its last non-zero step; audio and vision up to their lengths, or (aligned data, without
    lengths) where the text is. Rows that are padded in front begin with their steps (`padding`).

  Raises:
    DataError: if the arrays have a fault or lack a key, see `check`.

  Warns:
    UserWarning: of what was mended or looks wrong, with the split, key and number of rows.
  """
  found = files.Found(arrays, name, [])
  return _checked(found, False, name, text, task, standardize, label_range)


def from_pickle(
  path: files.Path | Sequence[files.Path],
  *,
  name: str,
  text: str = "features",
  task: str = "regression",
  standardize: bool = False,
  label_range: tuple[float, float] | None = None,
) -> Dataset:
  """Reads feature files, safely (see `unpickle`), and makes a dataset of them.

  Args:
    path: a pickle, `.npz` or `.safetensors` in the MMSA layout, or several, see `files`.
    name, text, task, standardize, label_range: see `from_arrays`.

  Returns:
    The dataset, as `from_arrays` makes it.

  Raises:
    DataError: if a file cannot be read, asks for more than arrays, or has a fault.

  Warns:
    UserWarning: of what was mended or looks wrong, with the split, key and number of rows.
  """
  paths = [path] if isinstance(path, str | os.PathLike) else list(path)
  found = files.read(paths)
  return _checked(found, True, name, text, task, standardize, label_range)


def _checked(found, own, name, text, task, standardize, label_range) -> Dataset:
  _check_options(text, task)
  checked = check.check(
    found.content, found.name, name, task=task, label_range=label_range, own=own
  )
  for note in (*found.notes, *checked.notes):
    warnings.warn(f"{name}: {note}", stacklevel=3)
  return make_dataset(
    checked.arrays,
    name=name,
    text=text,
    task=task,
    standardize=standardize,
    label_range=label_range,
  )


def make_dataset(
  arrays: Arrays,
  *,
  name: str,
  text: str = "features",
  task: str = "regression",
  standardize: bool = False,
  label_range: tuple[float, float] | None = None,
) -> Dataset:
  """`from_arrays` of arrays that were checked, such as converted ones."""
  _check_options(text, task)
  splits = {split: make_split(arrays[split], f"{name}/{split}", text, task) for split in SPLITS}
  moments = _moments(splits["train"]) if standardize else {}
  splits = {split: scale(batch, moments) for split, batch in splits.items()}
  labels = np.concatenate([splits[split].label for split in SPLITS])
  largest = max(int(b.text.x.max()) for b in splits.values()) if text == "tokens" else None
  spec = make_spec(splits["train"], labels, name, task, label_range, largest)
  ids = {split: [str(i) for i in arrays[split]["id"]] for split in SPLITS}
  classes = _class_names(arrays) if task == "classification" else ()
  return Dataset(**splits, spec=spec, ids=ids, name=name, moments=moments, classes=classes)


def _class_names(arrays: Arrays) -> tuple[str, ...]:
  """What annotations call the classes 0, 1, …; nothing if they do not name each of them once."""
  if not all("annotations" in fields for fields in arrays.values()):
    return ()
  columns = [[f[k] for f in arrays.values()] for k in (check.CLASSES, "annotations")]
  classes, names = (np.concatenate(parts) for parts in columns)
  pairs = sorted({(int(c), str(name)) for c, name in zip(classes, names, strict=True)})
  found = tuple(name for _, name in pairs)
  return found if [c for c, _ in pairs] == list(range(len(set(found)))) else ()


def _check_options(text: str, task: str) -> None:
  if text not in TEXTS:
    raise DataError(f"text is {text!r}, expected one of {TEXTS}.")
  if task not in TASKS:
    raise DataError(f"task is {task!r}, expected one of {TASKS}.")


def make_spec(
  train: types.Batch,
  labels: np.ndarray,
  name: str,
  task: str,
  label_range: tuple[float, float] | None,
  largest_id: int | None = None,
) -> types.Spec:
  """The spec of a training split, see `from_arrays`.

  Args:
    train: the split, or some rows of it.
    labels: of all splits.
    name, task, label_range: see `from_arrays`.
    largest_id: the largest token id of all splits, if it is known.
  """
  known = check.known(LABEL_RANGES, name)
  text, audio, vision = (_spec(getattr(train, m)) for m in types.MODALITIES)
  classes, problems = int(labels.max()) + 1 if task != "regression" else 0, ()
  if task == "binary":
    numbered = tuple(str(k) for k in range(max(2, (classes - 1).bit_length())))
    problems = check.known(check.PROBLEMS, name) or numbered
    if classes > 2 ** len(problems):
      raise DataError(f"{name}: expected the answers to {len(problems)} binary problems, not more.")
    classes = 2 ** len(problems)
  if text.tokens and largest_id is not None:
    text = text._replace(vocab=largest_id + 1)
  return types.Spec(
    text,
    audio,
    vision,
    num_train=len(train.index),
    num_classes=classes,
    label_range=label_range or known or (float(labels.min()), float(labels.max())),
    problems=problems,
  )


def _get(fields: Mapping[str, Any], key: str, where: str, why: str) -> np.ndarray:
  if key not in fields:
    raise DataError(f"{where}: the key {key!r} is missing, {why}; there are {sorted(fields)}.")
  return np.asarray(fields[key])


def make_split(fields: Mapping[str, Any], where: str, text: str, task: str) -> types.Batch:
  """One split's fields as a batch of all its rows; see `from_arrays`. `where` is for errors."""
  info = {}
  key = "text_bert" if text == "tokens" else "text"
  words = _get(fields, key, where, f"which text={text!r} reads")
  if text == "tokens":
    x = words[:, 0].astype(np.int32)
    if words[:, 2].any():
      info["segment_ids"] = words[:, 2].astype(np.int32)
  else:
    x = np.asarray(words, np.float32)
  others = {
    m: np.asarray(_get(fields, m, where, "which every system reads"), np.float32)
    for m in ("audio", "vision")
  }
  valid = valid_steps({**fields, **others}, text)
  label: Any = read_labels(fields, where, task)
  for letter, modality in (("T", "text"), ("A", "audio"), ("V", "vision")):
    if f"regression_labels_{letter}" in fields:
      values = np.asarray(fields[f"regression_labels_{letter}"], np.float32)
      info[f"label_{modality}"] = values.reshape(-1)
  index: Any = np.arange(len(label), dtype=np.int32)
  return types.Batch(
    text=types.modality(x, valid["text"]),
    **{m: types.modality(others[m], valid[m]) for m in others},
    label=label,
    index=index,
    info=info,
  )


def label_key(fields: Collection[str], task: str) -> str:
  """The field in which a task's labels stand."""
  if task == "binary" and check.BINARY in fields:
    return check.BINARY
  return check.REGRESSION if task == "regression" else check.CLASSES


def read_labels(fields: Mapping[str, Any], where: str, task: str) -> np.ndarray:
  """[N] labels of a task: float32, classes int32, or the answers to binary problems by number."""
  key = label_key(fields, task)
  found: Any = _get(fields, key, where, f"which task={task!r} reads")
  if key == check.BINARY:
    return (found.astype(int) << np.arange(found.shape[1])[None]).sum(1).astype(np.int32)
  if task == "binary":
    return (1 << found.reshape(-1).astype(int)).astype(np.int32)
  return found.reshape(-1).astype(np.float32 if task == "regression" else np.int32)


def valid_steps(fields: Mapping[str, Any], text: str | None = None) -> dict[str, np.ndarray]:
  """[N, L] bool of each modality of a split: where its steps are real.

  Args:
    fields: the split's arrays.
    text: "features" or "tokens"; by default features where there are any.

  Returns:
    {"text", "audio", "vision": array}.
  """
  tokens = fields.get("text_bert")
  read_tokens = text == "tokens" or (text is None and "text" not in fields)
  if tokens is not None and (read_tokens or tokens.shape[2] == fields["text"].shape[1]):
    found = {"text": tokens[:, 1] > 0}
  else:
    found = {"text": until_last_nonzero(fields["text"])}
  for m in ("audio", "vision"):
    x, lengths = fields[m], fields.get(f"{m}_lengths")
    if lengths is not None:
      found[m] = np.arange(x.shape[1]) < np.asarray(lengths).reshape(-1, 1)
    elif x.shape[1] == found["text"].shape[1]:
      found[m] = found["text"]
    else:
      found[m] = until_last_nonzero(x)
  return found


def until_last_nonzero(x: np.ndarray) -> np.ndarray:
  """[N, L] True up to the last step that is not all zeros."""
  return np.arange(x.shape[1]) < padding.extent(x)[1][:, None]


def _spec(m: types.Modality) -> types.ModalitySpec:
  tokens = m.x.ndim == 2
  return types.ModalitySpec(m.x.shape[1], 0 if tokens else m.x.shape[2], tokens)


def _moments(train: types.Batch) -> Moments:
  """Mean and deviation of every channel over the training's valid steps, by modality."""
  found = {}
  for name in STANDARDIZED:
    m = getattr(train, name)
    if m.valid.any():
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
  complete = _complete(data_dir, name)
  if not complete:
    raise DataError(
      f"{pathlib.Path(data_dir) / name} holds no complete dataset. Convert a pickle first:"
      f" mmjax-prepare --pickle=F --dataset={name} --data_dir={data_dir}"
    )
  return max(complete, key=lambda path: [int(n) for n in path.name.split(".")])


def _complete(data_dir: str | pathlib.Path, name: str) -> list[pathlib.Path]:
  folder = pathlib.Path(data_dir) / name
  return [version for version in folder.glob("*") if is_complete(version)]


def feature_file(data_dir: str | pathlib.Path, name: str) -> pathlib.Path | None:
  """What `load` reads where nothing was converted, "data/mosi.pkl"; None if there is none."""
  if _complete(data_dir, name):
    return None
  files = (pathlib.Path(data_dir) / f"{name}{suffix}" for suffix in FILES)
  return next((file for file in files if file.is_file()), None)


def sha256(data_dir: str | pathlib.Path, name: str) -> str:
  """The digest of a dataset's feature file, converted or not: runs keep what they trained on."""
  file = feature_file(data_dir, name)
  return read_card(data_dir, name)["sha256"] if file is None else digest([file])


def digest(paths: Sequence[pathlib.Path]) -> str:
  """SHA-256 of files, one after the other."""
  found = hashlib.sha256()
  for path in paths:
    with path.open("rb") as file:
      while block := file.read(1 << 20):
        found.update(block)
  return found.hexdigest()


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
  rows = builder.info.splits[split].num_examples
  columns, start = {}, 0
  for part in _batches(builder, split, **options):
    for key, values in part.items():
      if key not in columns:
        columns[key] = np.empty((rows, *values.shape[1:]), values.dtype)
      columns[key][start : start + len(values)] = values
    start += len(next(iter(part.values())))
  return {key: _decode(values) for key, values in columns.items()}


def _decode(values: np.ndarray) -> np.ndarray:
  """Strings come back as UTF-8 bytes."""
  if values.dtype.kind not in "OS":
    return values
  texts = np.empty(len(values), object)
  texts[:] = [value.decode() for value in values]
  return texts


def import_tfds():
  """TensorFlow Datasets, imported at its first use and without TensorFlow's start-up chatter.

  Raises:
    DataError: if it is not installed.
  """
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # its notice ignores the log level
  try:
    import tensorflow  # noqa: F401  # TensorFlow Datasets imports it later, and says less
    import tensorflow_datasets as tfds
  except ModuleNotFoundError as error:
    raise DataError(
      f"converted datasets need TensorFlow ({error}): pip install 'mmjax[data]'. What is not"
      " converted, NAME.pkl in the folder of the datasets, is read without it."
    ) from error

  logging.getLogger("absl").addFilter(_worth_reading)
  return tfds


def _worth_reading(record: logging.LogRecord) -> bool:
  return "tensorflow_datasets" not in record.pathname or record.levelno >= logging.ERROR


def _batches(builder, split: str, **options) -> Iterator[dict[str, np.ndarray]]:
  """A split's rows in their order, some megabytes at a time (more makes TensorFlow warn)."""
  tfds = import_tfds()
  kinds = {key: feature.np_dtype for key, feature in builder.info.features.items()}
  if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
    features = builder.info.features.values()
    row = sum(math.prod(f.shape) * np.dtype(f.np_dtype).itemsize for f in features)
    size = max(1, min(512, (1 << 25) // max(1, row)))
    dataset = builder.as_dataset(split, batch_size=size, shuffle_files=False, **options)
    yield from tfds.as_numpy(dataset)
    return
  for row in builder.as_data_source(split, **options):
    yield {key: np.array([value], kinds[key]) for key, value in row.items()}


def load(data_dir: str | pathlib.Path, name: str, **options: Any) -> Dataset:
  """Reads a dataset: a converted one, or else `data_dir/NAME.pkl`, the same bits of either.

  Args:
    data_dir: folder of the datasets.
    name: the dataset's name.
    **options: of `from_arrays`.

  Raises:
    DataError: if there is no dataset of that name, a needed key is missing, or (converted ones)
      TensorFlow.
  """
  file = feature_file(data_dir, name)
  if file is not None:
    return from_pickle(file, name=name, **options)
  return make_dataset(read_arrays(data_dir, name), name=name, **options)
