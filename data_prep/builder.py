"""Arrays -> a TensorFlow Datasets dataset on disk."""

import math
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from mmjax import data

VERSION = "1.0.0"
FILE_FORMATS = ("tfrecord", "array_record")
_SHARD = 1 << 28  # bytes of a file, about


def write(
  arrays: dict[str, Mapping[str, np.ndarray]],
  data_dir: pathlib.Path,
  name: str,
  file_format: str,
) -> pathlib.Path:
  """Stores checked arrays, rows in their order.

  TensorFlow Datasets' own builder keeps a second copy of each split in memory, even where nothing
  is shuffled; here rows go straight to the files.

  Args:
    arrays: {split: {key: array}}, strings as object arrays. Splits are let go as they are written:
      it is empty afterwards.
    data_dir: folder to write in.
    name: the dataset's name.
    file_format: "tfrecord" or "array_record".

  Returns:
    The dataset's folder, data_dir/name/version.
  """
  tfds = data.import_tfds()
  from tensorflow_datasets.core import file_adapters

  def feature(value):
    if value.dtype == object:
      return tfds.features.Text()
    # raw bytes: a list of floats takes 15 times as long to write, and float64 would be cut
    encoding = tfds.features.Encoding.BYTES
    return tfds.features.Tensor(shape=value.shape[1:], dtype=value.dtype, encoding=encoding)

  first = next(iter(arrays.values()))
  features = tfds.features.FeaturesDict({key: feature(value) for key, value in first.items()})
  adapter = file_adapters.ADAPTER_FOR_FORMAT[tfds.core.FileFormat(file_format)]
  folder = data_dir / name / VERSION
  folder.mkdir(parents=True)
  written = []
  for split in list(arrays):
    fields = arrays.pop(split)
    rows, size = len(fields["id"]), sum(value.nbytes for value in fields.values())
    shards = min(rows, math.ceil(size / _SHARD))
    ends = [rows * n // shards for n in range(shards + 1)]
    for n in range(shards):
      path = folder / f"{name}-{split}.{file_format}-{n:05d}-of-{shards:05d}"
      adapter.write_examples(path, _serialized(features, fields, ends[n], ends[n + 1]))
    template = tfds.core.ShardedFileTemplate(
      data_dir=folder, dataset_name=name, split=split, filetype_suffix=file_format
    )
    lengths = np.diff(ends).tolist()
    written.append(
      tfds.core.SplitInfo(
        name=split, shard_lengths=lengths, num_bytes=size, filename_template=template
      )
    )
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=features,
    split_infos=written,
    version=VERSION,
    check_data=False,
    description="Multimodal features in the MMSA layout.",
  )
  return folder


def _serialized(features, fields, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
  for row in range(start, stop):
    yield row, features.serialize_example({key: value[row] for key, value in fields.items()})
