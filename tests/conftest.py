"""What several test files share."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
  """Tiny shapes: compiling takes all the time, and half of it is optimizing."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
