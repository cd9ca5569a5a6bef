"""MMIN (Zhao et al. 2021) with the hyperparameters of M³S §4.4 and of the authors' scripts.

python -m experiments.train --config=mmin:iemocap \
    --data_dir=data --workdir=runs/mmin --method=m3s --missing_rate=0.4,0.6
"""

from . import common

TEACHER_EPOCHS = 20  # our choice: neither paper says how long the teacher trains
NETWORKS = ("encoders/audio", "encoders/text", "encoders/vision", "imagine", "cycle", "classifier")


def get_config(dataset: str = "iemocap"):
  config = common.get_config(dataset)
  config.model = dict(name="mmin", teacher_epochs=TEACHER_EPOCHS, bert=common.BERT)
  config.train.batch_size = 256
  config.train.epochs = TEACHER_EPOCHS + 60
  config.train.patience = 0
  rate = dict(name="hold_linear", peak=1e-4)  # held for half of the steps, then down to 0
  config.optimizer = dict(name="adam", b1=0.5, learning_rate=rate)

  def clipped(norm, networks):  # the norm of each network is clipped on its own
    return tuple((f"/{network}/", dict(clip_norm=norm)) for network in networks)

  bert = ("/encoders/bert/", dict(learning_rate=5e-5))  # where the text is raw tokens
  student = (bert, *clipped(1.0, NETWORKS))
  config.phase_optimizer = dict(
    teacher=dict(groups=(bert, *clipped(0.5, (*NETWORKS[:3], "classifier")))),
    student=dict(groups=student),
  )
  # clipped like the outer steps: at first the cascades amplify, and so do their gradients
  config.method.optimizer = dict(name="sgd", learning_rate=2e-4, groups=student)
  return config
