"""Turns a PyTorch checkpoint of a published model into a run that `evaluate` reads.

python -m experiments.import_torch --model=misa --dataset=mosi --checkpoint=model.pth \\
    --data_dir=data --out=runs/imported
python -m experiments.evaluate --workdir=runs/imported

The file is a state_dict, as MMSA saves it; for MMIN it is the folder of its networks
(`…_net_A.pth`, …). Hyperparameters that differ from the config's are flags,
`--config=experiments/configs/misa.py:mosi --config.model.hidden_size=64`.
Needs the extra "parity" (torch).
"""

import importlib
import pathlib
import sys
from collections.abc import Mapping

import jax
import ml_collections
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from experiments import run as run_lib
from experiments import workdir as workdir_lib
from mmjax import checkpoint, models, torch_import
from mmjax.torch_import import read_state

_MODEL = flags.DEFINE_enum("model", None, list(models.MODELS), "The published model.")
_DATASET = flags.DEFINE_string("dataset", "mosi", "Name of the converted dataset.")
_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; the model's by default.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "The .pth file, or MMIN's folder.")
_DATA_DIR = flags.DEFINE_string("data_dir", "data", "Folder of the converted datasets.")
_OUT = flags.DEFINE_string("out", None, "Folder of the run that is written.")


def import_state(
  config: ml_collections.ConfigDict, state: Mapping[str, np.ndarray], data_dir: str
) -> dict:
  """{"params", "extra"} of the config's model with the published weights.

  What the last phase does not train, as MMIN's teacher, may be absent: it has no part in
  predictions and keeps its initial values.
  """
  dataset = run_lib.load_data(config, data_dir)
  system = run_lib.make_system(config)
  params, extra = system.init(jax.random.key(0), dataset.spec)
  settings = config.model.to_dict()
  rules = models.torch_rules(settings.pop("name"), **settings)
  params = torch_import.from_torch(params, state, rules, required=system.phases[-1].trains)
  return {"params": params, "extra": extra}


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  config = _CONFIG.value
  if config is None:
    module = importlib.import_module(f"experiments.configs.{_MODEL.value}")
    config = module.get_config(_DATASET.value)
  if config.model.name != _MODEL.value:
    sys.exit(f"error: --model is {_MODEL.value!r}, but the config's is {config.model.name!r}.")
  path = pathlib.Path(_CHECKPOINT.value)
  try:
    state = read_state(path)
    if any("bert" in name or name.startswith("text_model.") for name in state):
      config.data.text = "tokens"  # the checkpoint brings its own encoder
      if "pooling" in config.model and config.model.pooling in ("first", "mean"):
        config.model.pooling = "first"  # the published one
    best = import_state(config, state, _DATA_DIR.value)
    asked = run_lib.describe(
      config, _DATA_DIR.value, method="orig", missing_rate=(0.0, 0.0), seed=0
    )
    asked["imported"] = path.name
    folder = workdir_lib.Workdir(_OUT.value, asked, _DATA_DIR.value)
    checkpoint.save(folder.checkpoints, 0, {"best": best})
    folder.close()
  except ValueError as error:
    sys.exit(f"error: {error}")
  print(
    f"{len(state)} tensors of {path}. Next:\n"
    f"  python -m experiments.evaluate --workdir={_OUT.value}"
  )


if __name__ == "__main__":
  flags.mark_flags_as_required(["model", "checkpoint", "out"])
  app.run(main)
