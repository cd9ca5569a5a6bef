"""Experiment binaries over mmjax."""

import logging

# JAX tells at INFO level which accelerators it did not find; absl would print that.
logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
