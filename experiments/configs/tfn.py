"""TFN (Zadeh et al. 2017) with MMSA's hyperparameters.

python -m experiments.train --config=tfn:mosi \
    --data_dir=data --workdir=runs/tfn --method=m3s --missing_rate=0.4,0.6
"""

from . import common

# MMSA's settings per dataset, where they differ from the model's own: MOSI's.
MODEL = {
  "mosi": dict(),
  "mosei": dict(
    hidden_sizes=(128, 16, 128),
    text_size=128,
    fusion_size=16,
    input_dropout=(0.4, 0.4),
    fusion_dropout=0.4,
  ),
  "sims": dict(text_size=256, fusion_size=32, input_dropout=(0.4, 0.4), fusion_dropout=0.4),
  "sims_v2": dict(text_size=128, fusion_size=32),
}
# Batch size and learning rate.
TRAIN = {"mosi": (32, 1e-3), "mosei": (128, 5e-3), "sims": (32, 5e-4), "sims_v2": (128, 2e-3)}


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  config.model = dict(name="tfn", **common.settings_for("tfn", dataset, MODEL), bert=common.BERT)
  config.train.batch_size, rate = TRAIN.get(dataset, TRAIN["mosi"])
  config.train.epochs = 100
  config.train.patience = 8
  config.optimizer = dict(
    name="adam",
    learning_rate=rate,
    groups=(("^bert/", dict(learning_rate=5e-5)),),  # ours: MMSA's reads features
  )
  config.method.optimizer.learning_rate = rate
  return config
