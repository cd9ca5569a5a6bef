"""SMIL (Ma et al. 2021); rates and batch size are the paper's for MOSI.

python -m experiments.train --config=smil:mosi \
    --data_dir=data --workdir=runs/smil --method=orig --missing_rate=0

A fifth of the training samples is complete, the others lack modalities before any mask of the
training method (`--config.model.complete_share=0.1`; 1 leaves all to the method's masks).
"""

from . import common

# The settings per dataset, where they differ from the model's own.
MODEL = {"mosi": dict(inner_rate=1e-4)}


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  config.model = dict(name="smil", **common.settings_for("smil", dataset, MODEL), bert=common.BERT)
  config.train.batch_size = 32
  config.train.epochs = 120  # of which 20 are the pretraining's; 5000 iterations of the paper
  config.optimizer = dict(name="adam", learning_rate=1e-4, weight_decay=1e-4)
  # the pretraining is the code's, with its rate
  config.phase_optimizer = dict(pretrain=dict(learning_rate=1e-3))
  config.method.optimizer.learning_rate = 1e-4
  return config
