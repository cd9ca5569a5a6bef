"""DMD (Li et al. 2023) with its authors' hyperparameters.

python -m experiments.train --config=dmd:mosi \
    --data_dir=data --workdir=runs/dmd --method=m3s --missing_rate=0.4,0.6
"""

from . import common

# The authors' settings per dataset, where they differ from the model's own: MOSI's. Threes are of
# text, audio, vision.
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
}


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  config.model = dict(name="dmd", **common.settings_for("dmd", dataset, MODEL), bert=common.BERT)
  config.train.batch_size = 16
  config.train.epochs = 100
  config.train.patience = 10
  config.optimizer = dict(
    name="adam",
    learning_rate=1e-4,  # of the BERT too
    accumulate=10,
    clip_value=0.6,
    plateau=dict(patience=5, factor=0.5),
  )
  config.method.optimizer.learning_rate = 1e-4
  return config
