"""MulT (Tsai et al. 2019) with MMSA's hyperparameters.

python -m experiments.train --config=mult:mosi \
    --data_dir=data --workdir=runs/mult --method=m3s --missing_rate=0.4,0.6
"""

from . import common

# MMSA's settings per dataset, where they differ from the model's own: MOSI's. Threes are of text,
# audio, vision.
MODEL = {
  "mosi": dict(),
  "mosei": dict(
    size=30,
    heads=6,
    kernel_sizes=(5, 1, 3),
    text_dropout=0.3,
    attention_dropout=(0.4, 0.0, 0.0),
    embedding_dropout=0.0,
  ),
  "sims": dict(
    depth=2,
    kernel_sizes=(5, 1, 1),
    text_dropout=0.3,
    attention_dropout=(0.2, 0.1, 0.0),
    residual_dropout=0.2,
    embedding_dropout=0.1,
    output_dropout=0.1,
  ),
  "sims_v2": dict(
    size=30,
    heads=6,
    kernel_sizes=(5, 3, 1),
    attention_dropout=(0.1, 0.2, 0.0),
    relu_dropout=0.1,
    output_dropout=0.3,
  ),
}
# Batch size, learning rate, patience of its schedule.
TRAIN = {
  "mosi": (16, 2e-3, 5),
  "mosei": (4, 5e-4, 20),
  "sims": (16, 2e-3, 10),
  "sims_v2": (16, 5e-4, 10),
}


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  config.model = dict(name="mult", **common.settings_for("mult", dataset, MODEL), bert=common.BERT)
  config.train.batch_size, rate, patience = TRAIN.get(dataset, TRAIN["mosi"])
  config.train.epochs = 100
  config.train.patience = 8
  config.optimizer = dict(
    name="adam",
    learning_rate=rate,
    groups=(("^bert/", dict(learning_rate=5e-5)),),  # ours: MMSA's reads features
    accumulate=8,
    clip_value=1.0 if dataset == "sims_v2" else 0.6,
    plateau=dict(patience=patience, factor=0.1),
  )
  config.method.optimizer.learning_rate = rate
  return config
