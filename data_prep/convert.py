"""Converts feature files in the MMSA layout to TFRecords.

mmjax-prepare --pickle=unaligned_50.pkl --dataset=mosi --data_dir=data
mmjax-prepare --pickle=train.npz,valid.npz,test.npz --dataset=mosi --data_dir=data

In the repository `python -m data_prep.convert` is the same. It needs TensorFlow (extra `data`).
MulT's files are read too: their `labels` [N, 1, 1], and of IEMOCAP [N, 4, 2] or [N, 4].
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Sequence

from mmjax import check, data, files

from . import builder, card


def convert(
  pickle: files.Path | Sequence[files.Path],
  dataset: str,
  data_dir: str | os.PathLike,
  *,
  file_format: str = "tfrecord",
  overwrite: bool = False,
) -> pathlib.Path:
  """Checks feature files and stores it as a dataset with its card.

  The dataset is written aside and gets its name when it is whole, so an interrupted
  conversion leaves nothing that looks complete, and an old dataset stays until then.

  Args:
    pickle: the file, or several that are put together, see `mmjax.files`.
    dataset: name of the dataset; mosi, mosei, sims, simsv2 and iemocap bring their labels' range.
    data_dir: folder of the datasets.
    file_format: "tfrecord" or "array_record".
    overwrite: whether to replace a dataset of that name.

  Returns:
    The dataset's folder, data_dir/dataset/version.

  Raises:
    data.DataError: if the file has a fault, the dataset exists and may not be replaced, or
      TensorFlow is missing.
  """
  paths = [pickle] if isinstance(pickle, str | os.PathLike) else list(pickle)
  paths, data_dir = [pathlib.Path(path) for path in paths], pathlib.Path(data_dir)
  if not re.fullmatch(r"[a-z][a-z0-9_]*", dataset):
    raise data.DataError(f"dataset {dataset!r}: expected small letters, digits and underscores.")
  if file_format not in builder.FILE_FORMATS:
    raise data.DataError(f"file_format {file_format!r}: expected one of {builder.FILE_FORMATS}.")
  final = data_dir / dataset / builder.VERSION
  if data.is_complete(final) and not overwrite:
    raise data.DataError(f"{final} exists already; --overwrite replaces it.")
  data.import_tfds()  # what is missing is told before anything is read
  found = files.read(paths)
  checked = check.check(found.content, found.name, dataset, own=True)
  checked.notes[:0] = found.notes
  statistics = card.make_card(checked, paths, dataset, file_format)
  draft = data_dir / f".incomplete-{dataset}"
  shutil.rmtree(draft, ignore_errors=True)  # of a conversion that was interrupted
  draft.mkdir(parents=True)
  written = builder.write(checked.arrays, draft, dataset, file_format)
  text = json.dumps(statistics, indent=1, ensure_ascii=False, allow_nan=False)
  (written / data.CARD).write_text(text + "\n", encoding="utf-8")
  shutil.rmtree(final, ignore_errors=True)
  final.parent.mkdir(exist_ok=True)
  os.replace(written, final)
  shutil.rmtree(draft)
  return final


def main():
  """The binary."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  text = "The feature file (.pkl, .npz, .safetensors), or several."
  add("--pickle", type=lambda text: text.split(","), required=True, help=text)
  add("--dataset", required=True, help="Name of the dataset: mosi, mosei, sims …")
  add("--data_dir", default="data", help="Folder of the datasets; data if unset.")
  add("--file_format", default="tfrecord", choices=builder.FILE_FORMATS, help="How to store it.")
  add("--overwrite", action="store_true", help="Replace a dataset of that name.")
  given = parser.parse_args()
  try:
    folder = convert(**vars(given))
  except data.DataError as error:
    sys.exit(f"error: {error}")
  print(card.to_text(data.read_card(given.data_dir, given.dataset)))
  print(f"Written to {folder}.")


if __name__ == "__main__":
  main()
