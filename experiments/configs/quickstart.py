"""A small MISA for the built-in synthetic data: trains in seconds on a CPU.

python -m experiments.quickstart
"""

from . import common, misa


def get_config(dataset: str = "synthetic"):
  config = misa.get_config("mosi")
  config.data = common.get_config(dataset).data
  config.model.hidden_size = 32
  config.model.dropout = 0.1
  config.train.batch_size = 32
  config.train.epochs = 20
  config.train.patience = 0
  config.optimizer.learning_rate = 1e-3
  config.method.optimizer.learning_rate = 1e-3
  return config
