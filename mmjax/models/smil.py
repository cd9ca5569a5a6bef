"""SMIL: multimodal learning with severely missing modality (Ma et al. 2021).

Few training samples are complete. What a sample lacks is reconstructed as a mixture of centres
(K-means over the complete samples' vectors), and what goes into the two layers of the head is
regularized by learned noise; small networks ψ tell the mixture and the noise from what the sample
has. ψ and the rest θ are meta-learned: θ takes inner steps on the incomplete samples, and both
are trained by the loss of the complete ones, of which something is hidden, at what θ became.

Paper: https://arxiv.org/abs/2103.05677. Its code, for two modalities of digits, departs from it;
`variant` is "code" or "paper". Parity: the meta-learning step of the code and its quirks: the
outer loss holds the last inner one, targets are not detached, ε has unit variance and exists in
the inner loop alone.

In sentiment analysis nobody has said which modality is the one that goes missing. Here each of
`missing` may, by default all three. A drawn share of the training samples counts as complete,
each other one has lost a set of modalities for good (`extra["available"]`, [N, M]): they must not
be read but where the trainer's masks hide them too. A batch has both kinds of samples; the inner
loss is the mean over the incomplete ones, the outer loss that over the complete ones. Whatever
the training method's masks take from a sample is missing beside; a modality of which single
steps are left counts as there. Values have a unit-variance Gaussian as their likelihood, the
squared error. At test time what is there passes through, and what is missing is reconstructed.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmjax import bert as bert_lib
from mmjax import layers, losses, masking, meta, parallel, systems, types

Array = types.Array
ENCODERS = ("lstm", "mean")
VARIANTS = ("code", "paper")
COMBINE = ("add", "multiply")
INNER = {"all": "", "head": "(?=.*/fc)"}
THETA = r"^(?!fusion/(weights|regularizer)_)"  # all but ψ
SIGMA = (1e-4, 1.0)  # bounds of the paper's standard deviations
CHUNK = 128  # samples that are encoded at once for K-means


class Noise(NamedTuple):
  """Standard normal draws of a pass; leading axes may be 1.

  Attributes:
    input: [B, ΣD] of the regularizer of the head's input.
    hidden: [B, H] of that of its hidden layer.
    weights: [B, R, K] of the centres' weights, for the R modalities that may be missing; None in
      the variant "code".
  """

  input: Array
  hidden: Array
  weights: Array | None = None


class Pass(NamedTuple):
  """One way through the network behind the encoders.

  Attributes:
    available: [B, M] bool, False hides a modality that is there; None hides nothing.
    noise: None takes the means.
    regularize: whether the head is regularized.
  """

  available: Array | None = None
  noise: Noise | None = None
  regularize: bool = True


def _gaussian_kl(mean: Array, std: Array) -> Array:
  """[B, ...] KL(N(mean, std²) ‖ N(0, 1)), summed over all but the first axis."""
  each = 0.5 * (mean**2 + std**2 - 1) - jnp.log(std)
  return each.reshape(each.shape[0], -1).sum(1)


class Fusion(nn.Module):
  """Reconstruction, regularizers and head; attributes as in `Smil`, by modality."""

  num_outputs: int
  sizes: Mapping[str, int]
  missing: Sequence[str]
  centres: int
  hidden_size: int
  variant: str
  divide: bool
  combine: str
  dropout: float

  def setup(self):
    width = sum(self.sizes.values())
    self.weights = {name: layers.Dense(self.centres) for name in self.missing}
    self.priors = {
      name: self.variable("priors", name, jnp.zeros, (self.centres, self.sizes[name]))
      for name in self.missing
    }
    self.regularizer_1, self.regularizer_2 = layers.Dense(width), layers.Dense(self.hidden_size)
    if self.variant == "paper":
      self.regularizer_1_std = layers.Dense(width)
      self.regularizer_2_std = layers.Dense(self.hidden_size)
    self.fc1, self.fc2 = layers.Dense(self.hidden_size), layers.Dense(self.num_outputs)
    self.drop = layers.Dropout(self.dropout)

  def __call__(
    self, vectors: Mapping[str, Array], there: Array, noise: Noise | None, regularize: bool
  ) -> dict[str, Array]:
    """vectors [B, D] by modality, there [B, M] bool -> named tensors [B, ...]."""
    paper, out = self.variant == "paper", {}
    dtype = next(iter(vectors.values())).dtype
    flags, noise = there.astype(dtype), jax.tree.map(lambda a: a.astype(dtype), noise)
    columns = {name: n for n, name in enumerate(self.sizes)}
    kept = {name: vectors[name] * flags[:, n, None] for name, n in columns.items()}
    context = jnp.concatenate([*kept.values(), flags], 1)
    divergences: list[Array] = []
    for n, name in enumerate(self.missing):
      weights = jax.nn.softplus(self.weights[name](context))
      prior = self.priors[name].value.astype(dtype)
      if paper:
        std = jnp.clip(weights, *SIGMA)
        divergences.append(_gaussian_kl(jnp.zeros_like(std), std))
        draws = 0.0 if noise is None or noise.weights is None else noise.weights[:, n]
        weights = 1 + std * draws
      total = weights.sum(1, keepdims=True)
      restored = weights @ prior
      if not paper:
        restored = restored / total
      elif self.divide:
        restored = restored / self.centres
      out |= {f"weights_{name}": weights, f"restored_{name}": restored}
      kept[name] = jnp.where(there[:, columns[name], None], vectors[name], restored)

    joint = jnp.concatenate([*kept.values()], 1)
    if regularize:
      draws = None if noise is None else noise.input
      scale, kl = self._noise(self.regularizer_1(context), "regularizer_1_std", context, draws)
      joint = self._combine(joint, scale)
      divergences.append(kl)
    hidden = jax.nn.relu(self.fc1(joint))
    if regularize:
      draws = None if noise is None else noise.hidden
      scale, kl = self._noise(self.regularizer_2(joint), "regularizer_2_std", joint, draws)
      hidden = self._combine(hidden, scale)
      divergences.append(kl)
      out["kl"] = jnp.stack(divergences).sum(0)
    prediction = layers.prediction(self.fc2(self.drop(hidden)))
    return {**out, "joint": joint, "feature": hidden, "prediction": prediction}

  def _noise(self, mean, std_head, x, draws):
    """Softplus(r), and the divergence of r from its prior."""
    std = jnp.ones_like(mean)
    if self.variant == "paper":
      std = jnp.clip(jax.nn.softplus(getattr(self, std_head)(x)), *SIGMA)
    r = mean if draws is None else mean + std * draws
    return jax.nn.softplus(r), _gaussian_kl(mean, std)

  def _combine(self, x, scale):
    return x + scale if self.combine == "add" else x * scale


# Settings of `Smil` that are `Fusion`'s, too.
SHARED = ("num_outputs", "missing", "hidden_size", "variant", "divide", "combine", "dropout")


class Smil(nn.Module):
  """The network.

  Attributes:
    num_outputs: 1 for regression, else the number of classes.
    modalities: what is read, M of them in the order of `types.MODALITIES`; the paper has two.
    missing: R of these, which the training hides and the network reconstructs. Another one that
      is missing at test time is zeros.
    sizes: width of each modality's vector.
    encoder: "lstm": the last state of an LSTM; "mean": tanh of a layer on the mean over the steps.
    hidden_size: H, of the head.
    centres: K; 0: as many as there are outputs, or 10 in regression. If there are fewer complete
      samples, some centres repeat.
    variant: "code": the centres' weights are positive, have no noise and sum to 1; the noise r
      of the regularizers has unit variance, in the inner loop alone. "paper": weights
      N(1, σ²), r ~ N(μ, σ²), inside and outside, with σ from ψ, within [1e-4, 1].
    divide: whether the variant "paper" divides what it reconstructs by K; its scale grows with K
      otherwise, as in the paper.
    combine: whether the regularizers' softplus(r) is added or multiplied; the code adds.
    samples: predictions that are averaged, over draws of the noise that are the same for every
      sample; 0 predicts from the means; None: 10 in the variant "paper", else 0.
    dropout: of the head's hidden layer.
    bert: for text as token ids, see `bert.setup`; BERT-base without weights by default.
  """

  num_outputs: int = 1
  modalities: Sequence[str] = types.MODALITIES
  missing: Sequence[str] = types.MODALITIES
  sizes: Sequence[int] = (64, 64, 64)
  encoder: str = "lstm"
  hidden_size: int = 64
  centres: int = 0
  variant: str = "code"
  divide: bool = False
  combine: str = "add"
  samples: int | None = None
  dropout: float = 0.5
  bert: bert_lib.Setup = bert_lib.setup(None)

  @nn.compact
  def __call__(self, batch: types.Batch, passes: Mapping[str, Pass] | None = None) -> Any:
    """The tensors of `Fusion` for each pass; without passes those of a prediction alone."""
    sizes = dict(zip(self.modalities, self.sizes, strict=True))
    vectors = {name: self._encode(batch, name, size) for name, size in sizes.items()}
    there = jnp.stack([masking.present(getattr(batch, name)) for name in sizes], 1)
    outputs = math.prod(layers.outputs(self.num_outputs))
    centres = self.centres or (outputs if outputs > 1 else 10)
    shared = {name: getattr(self, name) for name in SHARED}
    fusion = Fusion(sizes=sizes, centres=centres, **shared, name="fusion")
    encoded = {f"vector_{name}": value for name, value in vectors.items()}

    def through(one):
      seen = there if one.available is None else there & one.available
      return {**fusion(vectors, seen, one.noise, one.regularize), **encoded}

    if passes is not None:
      return {name: through(one) for name, one in passes.items()}
    out = through(Pass())
    samples = (10 if self.variant == "paper" else 0) if self.samples is None else self.samples
    if samples:
      keys = [jax.random.fold_in(jax.random.key(0), n) for n in range(samples)]
      drawn = [through(Pass(noise=draw_noise(self, key, (1,), centres))) for key in keys]
      out["prediction"] = _average(jnp.stack([one["prediction"] for one in drawn]))
    return out

  def _encode(self, batch, name, size):
    m = getattr(batch, name)
    x = bert_lib.text_states(self.bert.config, batch) if name == "text" else masking.observed(m)
    if self.encoder == "lstm":
      return layers.LSTM(size, name=f"encoder_{name}")(x, m.valid)[1]
    mean = layers.mean_over_steps(x, m.valid)
    return jnp.tanh(layers.Dense(size, name=f"encoder_{name}")(mean))


def draw_noise(network: Smil, key: types.PRNGKey, shape: tuple[int, ...], centres: int) -> Noise:
  """Noise with these leading axes, as far as the network's variant has it."""
  widths: list[tuple[int, ...]] = [(sum(network.sizes),), (network.hidden_size,)]
  if network.variant == "paper":
    widths.append((len(network.missing), centres))
  keys = jax.random.split(key, len(widths))
  return Noise(*(jax.random.normal(k, (*shape, *w)) for k, w in zip(keys, widths, strict=True)))


def _average(predictions: Array) -> Array:
  """[S, B] values or [S, B, C] logits -> the mean value, or the logits of the mean probability."""
  if predictions.ndim == 2:
    return predictions.mean(0)
  return jax.nn.logsumexp(jax.nn.log_softmax(predictions), 0) - jnp.log(float(len(predictions)))


class Draws(NamedTuple):
  """What is random in one training step of B samples; None switches a part off.

  Attributes:
    inner_dropout: [K] keys, one for each inner step.
    inner_noise: of the inner steps, with a leading axis K.
    hide: [B] int, which set of modalities each complete sample loses; by `index` if None.
    dropout: key of the outer passes.
    noise: of the outer pass.
  """

  inner_dropout: Any = None
  inner_noise: Noise | None = None
  hide: Array | None = None
  dropout: Any = None
  noise: Noise | None = None


class Step(NamedTuple):
  """What a training step computed: the loss, its parts, θ* and what the passes returned."""

  total: Array
  parts: dict[str, Array]
  adapted: types.Params
  passes: Mapping[str, Mapping[str, Array]]


class Learner(NamedTuple):
  """The meta-learning of a network; the attributes are the settings of `make`."""

  network: Smil
  model: systems.Model
  inner_steps: int
  inner_rate: float
  inner_decay: int
  inner: str
  order: str
  align_weights: Sequence[float]
  kl_weight: float

  @property
  def subsets(self) -> np.ndarray:
    """[n, M] bool: the sets of modalities that a sample may lose, not all of them."""
    of = self.network.missing
    sets = itertools.chain(*(itertools.combinations(of, n) for n in range(1, len(of) + 1)))
    names = self.network.modalities
    table = np.array([[name in one for name in names] for one in sets])
    return table[~table.all(1)]

  def run(self, params, batch, extra, key, **passes: Pass) -> dict[str, Any]:
    """The network's passes, in training."""
    return dict(self.model.apply(params, batch, extra, key, passes=passes)[0])

  def draw(self, key: types.PRNGKey, rows: int, extra: types.Extra) -> Draws:
    """The draws of one step."""
    inner, dropout, hide, outer, outer_dropout = jax.random.split(key, 5)
    centres = next(iter(extra["priors"]["fusion"].values())).shape[0]
    paper = self.network.variant == "paper"
    return Draws(
      jax.random.split(dropout, self.inner_steps),
      draw_noise(self.network, inner, (self.inner_steps, rows), centres),
      jax.random.randint(hide, (rows,), 0, len(self.subsets)),
      outer_dropout,
      draw_noise(self.network, outer, (rows,), centres) if paper else None,
    )

  def step(
    self, params: types.Params, batch: types.Batch, extra: types.Extra, draws: Draws
  ) -> Step:
    """Inner steps on the incomplete samples, and the losses at θ* (Algorithm 1 of the paper).

    Args:
      params: θ and ψ.
      batch: B samples of both kinds.
      extra: has "available", "priors", "iteration".
      draws: what is random.

    Returns:
      The step.
    """
    available = extra["available"][batch.index]
    complete = available.all(1)

    def error(out, weight):
      return losses.masked_mean(losses.task(out["prediction"], batch.label), weight)

    def inner(params, batch, key, extra):
      dropout, noise = key if key is not None else (None, None)
      out = self.run(params, batch, extra, dropout, noised=Pass(available, noise))["noised"]
      return error(out, ~complete), types.Aux({}, out)

    decays = extra["iteration"] // (self.inner_decay or jnp.iinfo(jnp.int32).max)
    sgd = optax.sgd(self.inner_rate * 0.1 ** decays.astype(jnp.float32))

    def keys_of(steps):
      return jax.tree.map(lambda a: a[steps], (draws.inner_dropout, draws.inner_noise))

    def adapt(params, start, stop):
      unused, keys = jnp.zeros(stop - start), keys_of(slice(start, stop))
      keys: Any = meta.MetaKeys(unused, keys, unused, unused)  # pyright: ignore[reportArgumentType]
      settings: Any = dict(optimizer=sgd, order=self.order, inner_trains=THETA + INNER[self.inner])
      settings["mode"] = "mixed"  # no gradient is reversed; recurrences stay single kernels
      mask = lambda key, batch: batch  # noqa: E731
      return meta.adapt(inner, mask, params, batch, keys, extra, **settings)[0]

    last = self.inner_steps - 1
    before = adapt(params, 0, last) if last else params
    adapted = adapt(before, last, last + 1)
    # the loss of the last inner step, which is a part of the code's outer loss
    train, aux = inner(before, batch, keys_of(last), extra)
    passes: dict[str, Any] = {"train": aux.extra}

    if self.network.variant == "paper":
      passes |= self.run(adapted, batch, extra, draws.dropout, noised=Pass(available, draws.noise))
      parts = {"inner": train, "task": error(passes["noised"], complete)}
      parts["kl"] = losses.masked_mean(passes["noised"]["kl"], complete)
      return Step(parts["task"] + self.kl_weight * parts["kl"], parts, adapted, passes)

    subsets = jnp.asarray(self.subsets)
    hidden = subsets[batch.index % len(subsets) if draws.hide is None else draws.hide]
    both = {"noised": Pass(available & ~hidden), "clean": Pass(available, regularize=False)}
    passes |= self.run(adapted, batch, extra, draws.dropout, **both)
    noised, clean = passes["noised"], passes["clean"]
    parts = {"inner": train, "task": error(noised, complete)}
    total = train + parts["task"]
    for name, key, weight in zip(
      ("joint", "hidden"), ("joint", "feature"), self.align_weights, strict=True
    ):
      parts[name] = losses.reconstruction(noised[key], clean[key], complete[:, None])
      total = total + weight * parts[name]
    if self.kl_weight:
      parts["kl"] = losses.masked_mean(noised["kl"], complete)
      total = total + self.kl_weight * parts["kl"]
    return Step(total, parts, adapted, passes)

  def loss(self, params, batch, key, extra):
    """The loss of phase "main"."""
    draws = Draws() if key is None else self.draw(key, len(batch.index), extra)
    step = self.step(params, batch, extra, draws)
    return step.total, types.Aux(step.parts, {**extra, "iteration": extra["iteration"] + 1})

  def first_loss(self, params, batch, key, extra):
    """The loss of phase "pretrain": the task's, of the complete samples."""
    available = extra["available"][batch.index]
    clean = Pass(available, regularize=False)
    out = self.run(params, batch, extra, key, clean=clean)["clean"]
    each = losses.task(out["prediction"], batch.label)
    task = losses.masked_mean(each, available.all(1))
    return task, types.Aux({"task": task}, extra)


def draw_available(key: types.PRNGKey, rows: int, share: float, subsets: np.ndarray) -> Array:
  """[N, M] bool: a share of the samples (at least one) is complete, each other loses a set."""
  order, chosen = jax.random.split(key)
  complete = jax.random.permutation(order, rows) < max(round(share * rows), 1)
  lost = jnp.asarray(subsets)[jax.random.randint(chosen, (rows,), 0, len(subsets))]
  return complete[:, None] | ~lost


def cluster(vectors: np.ndarray, centres: int) -> np.ndarray:
  """K-means by scikit-learn, always the same for the same vectors.

  Args:
    vectors: [N, D].
    centres: K.

  Returns:
    [K, D]; some repeat if there are fewer distinct vectors.
  """
  import sklearn.cluster
  import threadpoolctl

  number = min(centres, len(np.unique(vectors, axis=0)))
  with threadpoolctl.threadpool_limits(1):  # threads add up in any order
    kmeans: Any = sklearn.cluster.KMeans
    fitted = kmeans(number, n_init=10, random_state=0).fit(vectors.astype(np.float64))
  found = fitted.cluster_centers_
  return found[np.arange(centres) % number].astype(np.float32)


@systems.configurable(Smil)
def make(
  network: Smil,
  *,
  complete_share: float = 0.2,
  pretrain_epochs: int = 20,
  refresh_epochs: int = 0,
  inner_steps: int = 1,
  inner_rate: float = 1e-3,
  inner_decay: int = 1000,
  inner: str = "all",
  order: str = "second",
  align_weights: Sequence[float] = (0.01, 0.01),
  kl_weight: float | None = None,
) -> types.System:
  """SMIL as a system; what the paper leaves open is as the code has it, or else our choice.

  Args:
    network: settings of `Smil`.
    complete_share: η, of the training samples that are complete; 1: what is missing is up to the
      training method's masks alone, and there is no inner loss.
    pretrain_epochs: of phase "pretrain", in which encoders and head learn the task from the
      complete samples alone.
    refresh_epochs: after how many epochs of phase "main" the centres are found again; 0: never.
    inner_steps: K of the inner loop.
    inner_rate: its learning rate.
    inner_decay: iterations after each of which a tenth of it is left; 0: never.
    inner: what the inner steps change: "all" of θ, or the "head" alone. (The code spares the
      encoder of the modality that may be missing; here any may.)
    order: of the meta-gradient: "second", or "first", which takes inner gradients as constants.
    align_weights: in the variant "code", of the squared distances between the noised and the
      clean pass, of the head's input and its hidden layer.
    kl_weight: of the divergence of weights from N(1, 1) and of r from N(0, 1), a prior which the
      paper does not state; None: 1e-3 in the variant "paper", 0 in "code".

  Returns:
    The system. Phase "main" logs the parts inner, task, and by variant joint and hidden, or kl.

  Raises:
    UsageError: as it starts to train, if no complete sample has all modalities.
  """
  for name, allowed in (("encoder", ENCODERS), ("variant", VARIANTS), ("combine", COMBINE)):
    if getattr(network, name) not in allowed:
      raise ValueError(f"{name} is {getattr(network, name)!r}, expected one of {allowed}.")
  if inner not in INNER:
    raise ValueError(f"inner is {inner!r}, expected one of {tuple(INNER)}.")
  names = [name for name in types.MODALITIES if name in network.modalities]
  if len(names) < 2 or list(network.modalities) != names:
    raise ValueError(f"modalities are {network.modalities}, expected two or all three.")
  if len(network.sizes) != len(names):
    raise ValueError(f"sizes are {network.sizes}, expected one for each of {names}.")
  if not network.missing or [n for n in names if n in network.missing] != list(network.missing):
    raise ValueError(f"missing is {network.missing}, expected some of {names}.")
  if not 0 < complete_share <= 1:
    raise ValueError(f"complete_share is {complete_share}, expected within (0, 1].")
  if kl_weight is None:
    kl_weight = 1e-3 if network.variant == "paper" else 0.0
  learner = Learner(
    network,
    systems.functional(network, head="fusion/fc2", collections=("priors",)),
    inner_steps,
    inner_rate,
    inner_decay,
    inner,
    order,
    align_weights,
    kl_weight,
  )

  def init(key, spec):
    one, other = jax.random.split(key)
    params, extra = learner.model.init(one, spec)
    available = draw_available(other, spec.num_train, complete_share, learner.subsets)
    return params, {**extra, "available": available, "iteration": jnp.int32(0)}

  @jax.jit
  def encode(params, batch, extra):
    out = learner.run(params, batch, extra, None, clean=Pass())["clean"]
    return {name: out[f"vector_{name}"] for name in network.missing}

  def find_centres(params, extra, batch):
    """`extra` with the centres of the complete samples' vectors."""
    complete = np.flatnonzero(np.asarray(extra["available"])[np.asarray(batch.index)].all(1))
    found = []
    for start in range(0, len(complete), CHUNK):
      rows = complete[np.minimum(np.arange(start, start + CHUNK), len(complete) - 1)]
      vectors = encode(params, jax.tree.map(lambda a, rows=rows: a[rows], batch), extra)
      count = min(CHUNK, len(complete) - start)
      found.append({name: np.asarray(x)[:count] for name, x in vectors.items()})
    priors = {}
    for name, prior in extra["priors"]["fusion"].items():
      vectors = np.concatenate([chunk[name] for chunk in found])
      priors[name] = jnp.asarray(cluster(vectors, prior.shape[0]))
    return {**extra, "priors": {"fusion": priors}}

  def on_epoch(phase, params, extra, epoch, train):
    since = epoch - pretrain_epochs
    refresh = phase == "main" and (
      since == 0 or (since > 0 and refresh_epochs and since % refresh_epochs == 0)
    )
    if epoch > 0 and not refresh:
      return params, extra
    batch = train.read()
    if epoch == 0:  # what the data themselves lack
      there = np.stack([np.asarray(masking.present(getattr(batch, n))) for n in names], 1)
      available = np.array(extra["available"])
      available[np.asarray(batch.index)] &= there
      if not available.all(1).any():
        raise types.UsageError(
          f"smil: none of the samples that complete_share={complete_share} draws is complete."
        )
      extra = {**extra, "available": jnp.asarray(available)}
    if refresh:
      params, extra = parallel.local((params, extra))
      extra = find_centres(params, extra, batch)
    return params, extra

  def phase(name, loss, epochs, trains=""):
    begin: Any = functools.partial(on_epoch, name)
    return types.Phase(name, loss, trains, 1.0, epochs, begin, hessian="symmetric")

  first = phase("pretrain", learner.first_loss, (0, pretrain_epochs), THETA)
  main = phase("main", learner.loss, (pretrain_epochs, None))
  return types.System(init, learner.model.predict, (first, main))
