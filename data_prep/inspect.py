"""Prints the card of a converted dataset.

python -m data_prep.inspect --dataset=mosi --data_dir=data
"""

import sys

from absl import app, flags

from mmjax import data

from . import card


def _run(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  try:
    found = data.read_card(flags.FLAGS.data_dir, flags.FLAGS.dataset)
  except data.DataError as error:
    sys.exit(f"error: {error}")
  print(card.to_text(found))


def main():
  """The binary."""
  flags.DEFINE_string("dataset", None, "Name of the dataset.", required=True)
  flags.DEFINE_string("data_dir", "data", "Folder of the datasets.")
  app.run(_run)


if __name__ == "__main__":
  main()
