"""Experiment binaries over mmjax."""

import os
import pathlib

from absl import flags, logging

# Compiled programs are kept, so that the next process of the same model starts at once.
_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "mmjax" / "programs"))

# Warnings and the binaries' own words, not every library's diary; --verbosity=0 shows that.
flags.FLAGS.verbosity = logging.WARNING
