"""Arrays -> a TensorFlow Datasets dataset on disk."""

import contextlib
import io
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from mmjax import data

VERSION = "1.0.0"
FILE_FORMATS = ("tfrecord", "array_record")


def _rows(fields: Mapping[str, np.ndarray]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
  for row in range(len(fields["id"])):
    yield row, {key: value[row] for key, value in fields.items()}


def write(
  arrays: Mapping[str, Mapping[str, np.ndarray]],
  data_dir: pathlib.Path,
  name: str,
  file_format: str,
) -> pathlib.Path:
  """Stores checked arrays, rows in their order.

  Args:
    arrays: {split: {key: array}}, strings as object arrays.
    data_dir: folder to write in.
    name: the dataset's name.
    file_format: "tfrecord" or "array_record".

  Returns:
    The dataset's folder, data_dir/name/version.
  """
  tfds = data.import_tfds()

  def feature(value):
    if value.dtype == object:
      return tfds.features.Text()
    # raw bytes: a list of floats takes 15 times as long to write, and float64 would be cut
    encoding = tfds.features.Encoding.BYTES
    return tfds.features.Tensor(shape=value.shape[1:], dtype=value.dtype, encoding=encoding)

  features = {key: feature(value) for key, value in next(iter(arrays.values())).items()}
  builder = tfds.dataset_builders.AdhocBuilder(
    name=name,
    version=VERSION,
    features=tfds.features.FeaturesDict(features),
    split_datasets={split: _rows(fields) for split, fields in arrays.items()},
    data_dir=str(data_dir),
    file_format=file_format,
    disable_shuffling=True,
    description="Multimodal features in the MMSA layout.",
  )
  with contextlib.redirect_stdout(io.StringIO()):  # it would name the folder it writes aside
    builder.download_and_prepare()
  return pathlib.Path(builder.data_dir)
