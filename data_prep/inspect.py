"""Prints the card of a converted dataset.

mmjax-inspect --dataset=mosi --data_dir=data

In the repository `python -m data_prep.inspect` is the same.
"""

import argparse
import sys

from mmjax import data

from . import card


def main():
  """The binary."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--dataset", required=True, help="Name of the dataset.")
  parser.add_argument("--data_dir", default="data", help="Folder of the datasets; data if unset.")
  given = parser.parse_args()
  try:
    found = data.read_card(given.data_dir, given.dataset)
  except data.DataError as error:
    sys.exit(f"error: {error}")
  print(card.to_text(found))


if __name__ == "__main__":
  main()
