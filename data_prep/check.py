"""Reads a feature pickle and checks it: clean arrays, or one clear error."""

import os

from mmjax import check

from . import unpickle


def read(path: str | os.PathLike, dataset: str) -> check.Checked:
  """The arrays of a pickle, checked as `data.from_arrays` checks them; see `mmjax.check`.

  Raises:
    DataError: if the file cannot be read or has a fault.
  """
  try:
    found = unpickle.load(path)
  except unpickle.UnpickleError as error:
    raise check.DataError(str(error)) from None
  return check.check(found, os.fspath(path), dataset, own=True)
