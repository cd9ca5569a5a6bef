"""TransM (TransModality, Wang et al. 2020), trained with HRLF's MSM.

python -m experiments.train --config=transm:mosi \
    --data_dir=data --workdir=runs/transm

The settings are a public re-implementation's, of all datasets; the paper's own are not known. As
wide as HRLF it is with --config.model.size=40 --config.model.heads=10.
"""

from . import common


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  config.model = dict(name="transm", bert=common.BERT)
  config.train.batch_size = 32
  config.train.epochs = 40
  config.train.patience = 8
  config.optimizer = dict(name="adam", learning_rate=3e-4, weight_decay=1e-4, clip_norm=1.0)
  config.mask = dict(name="msm", drop=())
  config.method = dict(name="spl")
  return config
