"""What all configs share: the data, the training loop, the missing data and M³S."""

import ml_collections

# Datasets whose labels are classes; every other one is regression.
CLASSIFICATION = ("iemocap",)
# Sets of changes that `experiments.ablate` can make to every model (LNLN's Table 6).
ABLATIONS = {
  "modalities": {
    "w/o language": {"mask.drop": ("text",)},
    "w/o audio": {"mask.drop": ("audio",)},
    "w/o vision": {"mask.drop": ("vision",)},
  }
}


def get_config(dataset: str) -> ml_collections.ConfigDict:
  """The settings that every model's config starts from.

  Args:
    dataset: name under which the data were converted, such as "mosi".

  Returns:
    The config; any entry is a flag, `--config.train.epochs=3`.
  """
  classes = dataset in CLASSIFICATION
  config = ml_collections.ConfigDict()
  config.data = dict(
    name=dataset,
    text="features",  # "features": precomputed; "tokens": raw ids through a BERT
    task="classification" if classes else "regression",
    stream=False,  # leave the training split on disk, for data larger than the memory
    standardize=False,  # audio and vision by the training split's mean and std
  )
  config.train = dict(
    batch_size=128,
    epochs=100,
    patience=20,  # epochs without a better validation; 0 never stops early
    select="f1" if classes else "mae",  # the validation metric that picks the epoch
    valid_rate=(),  # (lowest, highest) missing rate in validation; as in training
    selection="validation",  # "test_oracle" picks by the test split, as published LNLN: no result
  )
  config.optimizer = dict(name="adam", learning_rate=1e-4)
  config.mask = dict(
    kind="span",  # span (M³S) or bernoulli (LNLN)
    axis="time",  # of spans: "time" or "feature"
    complete_share=0.0,  # bernoulli, in training: how many samples' modalities stay complete
    drop=(),  # modalities that are never seen, in training and testing
  )
  config.m3s = dict(
    inner_steps=1,  # K; not given in the paper
    order="first",  # as in Algorithm 1; "second" is the exact meta-gradient
    fresh_masks=False,  # one support mask for all inner steps
    optimizer=dict(name="sgd", learning_rate=1e-4),
  )
  return config


def epoch_warmup(config: ml_collections.ConfigDict, peak: float, **settings) -> dict:
  """An optimizer whose rate moves once an epoch, as ALMT's and LNLN's: a rise, then a cosine."""
  epochs = config.train.get_ref("epochs")  # follows `--config.train.epochs`
  rate = ml_collections.ConfigDict(dict(name="epoch_warmup_cosine", peak=peak, warmup=0.1))
  rate.epochs = epochs
  return ml_collections.ConfigDict(dict(learning_rate=rate, **settings))
