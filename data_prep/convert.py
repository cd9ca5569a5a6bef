"""Converts feature files in the MMSA layout to TFRecords.

python -m data_prep.convert --pickle=unaligned_50.pkl --dataset=mosi --data_dir=data
python -m data_prep.convert --pickle=train.npz,valid.npz,test.npz --dataset=mosi --data_dir=data
"""

import json
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Sequence

from absl import app, flags

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
    data.DataError: if the file has a fault, or the dataset exists and may not be replaced.
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


def _run(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  values = flags.FLAGS
  try:
    folder = convert(
      values.pickle,
      values.dataset,
      values.data_dir,
      file_format=values.file_format,
      overwrite=values.overwrite,
    )
  except data.DataError as error:
    sys.exit(f"error: {error}")
  print(card.to_text(data.read_card(values.data_dir, values.dataset)))
  print(f"Written to {folder}.")


def main():
  """The binary."""
  flags.DEFINE_list(
    "pickle", None, "The feature file (.pkl, .npz, .safetensors), or several.", required=True
  )
  flags.DEFINE_string("dataset", None, "Name of the dataset: mosi, mosei, sims …", required=True)
  flags.DEFINE_string("data_dir", "data", "Folder of the datasets.")
  flags.DEFINE_enum("file_format", "tfrecord", builder.FILE_FORMATS, "How to store it.")
  flags.DEFINE_bool("overwrite", False, "Replace a dataset of that name.")
  app.run(_run)


if __name__ == "__main__":
  main()
