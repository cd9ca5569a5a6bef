"""Reads feature pickles without running what stands in them.

A pickle is a program. This reader lets it build numpy arrays, scalars, dtypes and plain
containers; any other global that it asks for is refused by its name before it is called.
"""

import os
import pathlib
import pickle
from typing import Any


class UnpickleError(ValueError):
  """A file that is no readable pickle, or asks for something that is not let in."""


# Modules whose members carry the same objects in numpy 1 ("core") and 2 ("_core").
_NUMPY = {
  f"numpy.{core}.{module}": names
  for core in ("core", "_core")
  for module, names in {
    "multiarray": {"_reconstruct", "scalar"},
    "numeric": {"_frombuffer"},
  }.items()
}
_ALLOWED = {
  **_NUMPY,
  "numpy": {"ndarray", "dtype"},
  "collections": {"OrderedDict"},
  "_codecs": {"encode"},  # how protocols 0-2 write bytes
  "builtins": {"bytearray", "bytes", "complex", "dict", "frozenset", "list", "set", "tuple"},
}
_ALLOWED["__builtin__"] = _ALLOWED["builtins"]  # Python 2's name


class _Unpickler(pickle.Unpickler):
  def find_class(self, module: str, name: str) -> Any:
    allowed = name in _ALLOWED.get(module, ())
    # numpy.dtypes holds dtype classes alone, such as StringDType
    if allowed or (module == "numpy.dtypes" and name.endswith("DType") and "." not in name):
      return super().find_class(module, name)
    raise UnpickleError(
      f"it asks for {module}.{name}, which is not let in: only numpy arrays, numbers, strings"
      " and plain containers are. Save the features as numpy arrays and try again."
    )


def load(path: str | os.PathLike) -> Any:
  """Reads a pickle of arrays; protocols 0 to 5, Python 2's latin-1 strings too.

  Args:
    path: the file.

  Returns:
    What was pickled.

  Raises:
    UnpickleError: if the file is missing, truncated, no pickle, or asks for another global.
  """
  path = pathlib.Path(path)
  try:
    with path.open("rb") as file:
      try:
        return _Unpickler(file).load()
      except UnicodeDecodeError:  # written by Python 2: bytes in str
        file.seek(0)
        return _Unpickler(file, encoding="latin1").load()
  except FileNotFoundError:
    raise UnpickleError(f"{path}: there is no such file.") from None
  except UnpickleError as error:
    raise UnpickleError(f"{path}: {error}") from None
  except Exception as error:  # a broken pickle raises whatever its bytes happen to mean
    raise UnpickleError(
      f"{path}: this is no whole pickle of arrays ({type(error).__name__}: {error}). Expected a"
      " feature file as MMSA writes it; download it again if it was cut short."
    ) from None
