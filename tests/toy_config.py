"""The toy system as a config, `--config=tests/toy_config.py:NAME`: what binaries do, in seconds."""

from experiments.configs import quickstart


def get_config(dataset="tiny"):
  config = quickstart.get_config(dataset)
  config.model = dict(name="toy:make")
  return config
