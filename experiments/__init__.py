"""Experiment binaries over mmjax."""

import logging
import os
import pathlib

# Compiled programs are kept, so that the next process of the same model starts at once.
_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "mmjax" / "programs"))

# JAX tells at INFO level which accelerators it did not find; absl would print that.
logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
