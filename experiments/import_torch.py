"""Turns a PyTorch checkpoint of a published model into a run that `evaluate` reads.

python -m experiments.import_torch --config=misa:mosi --checkpoint=model.pth --data_dir=data \\
    --out=runs/imported
python -m experiments.evaluate --workdir=runs/imported

The file is a state_dict, as MMSA saves it; for MMIN it is the folder of its networks
(`…_net_A.pth`, …). Hyperparameters that differ from the config's are flags,
`--config.model.hidden_size=64`. Needs the extra "parity" (torch).
"""

import pathlib
from collections.abc import Mapping

import jax
import numpy as np
from absl import flags

from mmjax import checkpoint, models, torch_import, train

from . import build, cli, settings, workdir

_FLAGS = flags.FlagValues()
_CONFIG, _SET = cli.define_config(_FLAGS)
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", "", "The .pth file, or MMIN's folder.", flag_values=_FLAGS
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir", "data", "Folder of the converted datasets.", flag_values=_FLAGS
)
_OUT = flags.DEFINE_string("out", "", "Folder of the run that is written.", flag_values=_FLAGS)


def import_state(
  config: settings.Config, state: Mapping[str, np.ndarray], data_dir: build.Path
) -> tuple[build.Run, dict]:
  """The run of a config, and {"params", "extra"} of its model with the published weights.

  What the last phase does not train, as MMIN's teacher, may be absent: it has no part in
  predictions and keeps its initial values.
  """
  run = build.make_run(config, build.load_data(config, data_dir))
  system, given = run.recipe.system, settings.plain(config.model)
  params, extra = system.init(jax.random.key(0), run.dataset.spec)
  rules = models.torch_rules(given.pop("name"), **given)
  params, extra = torch_import.variables_from_torch(
    params, extra, state, rules, required=system.phases[-1].trains
  )
  return run, {"params": params, "extra": extra}


@cli.binary(_FLAGS, __doc__, required=["config", "checkpoint", "out"])
def main():
  path = pathlib.Path(_CHECKPOINT.value)
  state = torch_import.read_state(path)
  config = settings.load(_CONFIG.value)
  if any("bert" in name or name.startswith("text_model.") for name in state):
    config.data.text = "tokens"
    config.model.bert = dict(from_scratch=True)  # the checkpoint brings its own encoder
    if config.model.get("pooling") in ("first", "mean"):
      config.model.pooling = "first"  # the published one
  cli.change(config, {}, cli.entries(_SET.value))
  run, found = import_state(config, state, _DATA_DIR.value)
  asked = {**build.describe(config, _DATA_DIR.value), "imported": path.name}
  folder = workdir.Workdir(_OUT.value, asked, _DATA_DIR.value, build.reading(run))
  best = train.Best(np.float32(0), np.int32(0), found["params"], found["extra"])
  checkpoint.save(folder.checkpoints, 0, {"best": dict.fromkeys(run.recipe.select, best)})
  folder.close()
  print(f"{len(state)} tensors of {path}. Next:")
  print(cli.told(f"  python -m experiments.evaluate --workdir={_OUT.value}"))


if __name__ == "__main__":
  main()
