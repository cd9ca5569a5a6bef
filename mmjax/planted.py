"""Planted data whose best possible error is known, whatever goes missing.

A score is told by three modalities through views of it that overlap. Score a and modality m have a
Gaussian view u_{m,a} with Var 1 and Cov(u_{m,a}, u_{n,a}) = ρ, the cross-modal redundancy: near 0
no modality can replace another one, near 1 each tells all. Every step of the modality shows
x = Σ_a c_m u_{m,a} d_{m,a} + noise, with orthonormal directions d, a clarity c_m and noise N(0, I).
The score is y_a = Σ_m w_m u_{m,a}, scaled to Var 1.

Of n_m steps that are seen, the mean of x · d_{m,a} / c_m is all that they say of u_{m,a}: u_{m,a}
plus noise of variance 1 / (n_m c_m²). So the posterior of y_a is Gaussian, with the variance

  v = wᵀ (C⁻¹ + diag(n_m c_m²))⁻¹ w,   C = (1 - ρ) I + ρ 11ᵀ,

whichever steps are missing and whatever the other data are. No predictor has a mean absolute error
below E √(2v/π). One score is a sentiment; two are valence and arousal, whose signs are the four
classes of an emotion. The sign of a score is told rightly with probability
1/2 + arcsin √(1 - v) / π at best.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.scipy import stats

from mmjax import masking, types

# Steps and channels of each modality.
SHAPES = {"text": (20, 16), "audio": (30, 8), "vision": (25, 12)}
STRENGTHS = {"low": 0.1, "medium": 0.5, "high": 0.9}  # of redundancy, ρ
# The datasets of the study: redundancy and number of scores.
DATASETS = {
  **{f"planted_{name}": (rho, 1) for name, rho in STRENGTHS.items()},
  "planted_emotions": (STRENGTHS["medium"], 2),
}
EMOTIONS = ("sad", "angry", "calm", "happy")  # 2 [valence > 0] + [arousal > 0]
CLIPS = 10  # of one video


class World(NamedTuple):
  """What data are planted by.

  Attributes:
    redundancy: ρ.
    weight: [3] w, of text, audio, vision; the score has variance 1.
    clarity: [3] c.
    directions: by modality [A, D], d of each of the A scores.
  """

  redundancy: float
  weight: np.ndarray
  clarity: np.ndarray
  directions: dict[str, np.ndarray]

  @property
  def scores(self) -> int:
    """A: 1 for a sentiment, 2 for an emotion."""
    return len(self.directions["text"])

  @property
  def covariance(self) -> np.ndarray:
    """C [3, 3], of the views of one score."""
    return (1 - self.redundancy) * np.eye(3) + self.redundancy * np.ones((3, 3))


def make_world(
  redundancy: float,
  *,
  scores: int = 1,
  weight: tuple[float, float, float] = (0.5, 0.4, 0.4),
  clarity: tuple[float, float, float] = (0.4, 0.25, 0.25),
  seed: int = 0,
) -> World:
  """A world to plant data by.

  Args:
    redundancy: ρ in [0, 1), the correlation of two modalities' views.
    scores: 1 for a sentiment in float, 2 for an emotion of four classes.
    weight: how much text, audio and vision count, up to a factor.
    clarity: how clearly a step of each shows its view.
    seed: of the directions.

  Returns:
    The world.

  Raises:
    UsageError: on another redundancy or number of scores.
  """
  if not 0 <= redundancy < 1:
    raise types.UsageError(f"redundancy is {redundancy}, expected 0 <= redundancy < 1.")
  if scores not in (1, 2):
    raise types.UsageError(f"scores is {scores}, expected 1 or 2.")
  random = np.random.default_rng(seed)
  directions = {
    name: np.linalg.qr(random.normal(size=(dim, dim)))[0][:scores]
    for name, (_, dim) in SHAPES.items()
  }
  world = World(redundancy, np.array(weight), np.array(clarity), directions)
  scale = np.sqrt(world.weight @ world.covariance @ world.weight)
  return world._replace(weight=world.weight / scale)


def make_arrays(
  world: World,
  seed: int = 0,
  *,
  num_train: int = 800,
  num_valid: int = 300,
  num_test: int = 600,
) -> dict[str, dict[str, Any]]:
  """Samples in the layout of MMSA's feature pickles, without words.

  Args:
    world: what they are planted by.
    seed: of the samples.
    num_train, num_valid, num_test: rows of each split.

  Returns:
    {"train" | "valid" | "test": {"id", "text" [N, 20, 16], "audio" [N, 30, 8], "audio_lengths",
    "vision" [N, 25, 12], "vision_lengths", and "regression_labels" [N], or
    "classification_labels" [N] and "annotations" of two scores}}. A sequence has between a half
    and all of the steps.
  """
  random = np.random.default_rng(seed)
  sizes = {"train": num_train, "valid": num_valid, "test": num_test}
  arrays, video = {}, 0
  for split, rows in sizes.items():
    arrays[split] = _make_split(random, rows, world, video)
    video += -(-rows // CLIPS)  # videos do not stand in two splits
  return arrays


def _make_split(random, rows, world, first_video) -> dict[str, Any]:
  root = np.linalg.cholesky(world.covariance)
  views = random.normal(size=(rows, world.scores, 3)) @ root.T  # [N, A, 3]
  fields: dict[str, Any] = {
    "id": np.array([f"video{first_video + n // CLIPS:03d}$_${n % CLIPS}" for n in range(rows)])
  }
  for m, (name, (steps, dim)) in enumerate(SHAPES.items()):
    lengths = random.integers(-(-steps // 2), steps + 1, rows)
    shown = world.clarity[m] * views[:, :, m] @ world.directions[name]  # [N, D]
    x = shown[:, None] + random.normal(size=(rows, steps, dim))
    valid = np.arange(steps) < lengths[:, None]
    fields[name] = (x * valid[..., None]).astype(np.float32)
    if name != "text":
      fields[f"{name}_lengths"] = lengths.tolist()
  scores = views @ world.weight  # [N, A]
  if world.scores == 1:
    fields["regression_labels"] = scores[:, 0].astype(np.float32)
  else:
    classes = (scores > 0).astype(int) @ np.array([2, 1])
    fields["classification_labels"] = classes.astype(np.float32)
    fields["annotations"] = np.array(EMOTIONS)[classes]
  return fields


def variance(world: World, counts: Any) -> np.ndarray:
  """v, how uncertain a score is at best.

  Args:
    world: the world.
    counts: [..., 3] steps that are seen of text, audio and vision.

  Returns:
    [...] the variance of the posterior.
  """
  return _posterior(world, np.asarray(counts, float), np)[1]


def best_mae(variances: Any) -> np.ndarray:
  """[...] the mean absolute error E|y - E y| of a Gaussian posterior: √(2v/π)."""
  return np.sqrt(2 / np.pi * np.asarray(variances))


def best_accuracy(variances: Any, scores: int = 2) -> np.ndarray:
  """[...] how often all signs are told rightly, each with 1/2 + arcsin √(1 - v) / π."""
  right = np.arcsin(np.sqrt(np.clip(1 - np.asarray(variances), 0, 1)))
  return (0.5 + right / np.pi) ** scores


def _posterior(world, counts, xp):
  """P⁻¹ w [..., 3], where P is the posterior's precision, and wᵀ P⁻¹ w [...]."""
  array = lambda a: xp.asarray(a, counts.dtype)  # noqa: E731
  seen = counts.reshape(-1, 3)
  precision = array(np.linalg.inv(world.covariance))[None]
  precision = precision + seen[:, :, None] * array(np.diag(world.clarity**2))[None]
  weight = xp.broadcast_to(array(world.weight)[None, :, None], (seen.shape[0], 3, 1))
  pulled = xp.linalg.solve(precision, weight)
  v = (pulled * weight).sum((1, 2))
  return pulled.reshape(counts.shape), v.reshape(counts.shape[:-1])


def optimum(world: World) -> types.System:
  """The best predictor there is, as a system: it has no parameters and nothing to train.

  A grid of it (`evaluate.make_grid`) has the line that no system's can cross, under the same
  missing data.

  Args:
    world: what the data were planted by.

  Returns:
    The system. It predicts "prediction", the posterior's mean [B], or the logits [B, 4] of the
    classes; and "variance" [B], v. It reads masks of steps, not of channels.
  """

  def predict(params, batch, extra):
    del params, extra
    counts, sums = [], []
    for m, name in enumerate(types.MODALITIES):
      one: types.Modality = getattr(batch, name)
      if one.seen.shape[-1] != 1:
        raise types.UsageError("the optimum is known where steps go missing, not channels.")
      real = one.valid & one.seen[..., 0]
      total = (masking.observed(one) * real[..., None].astype(one.x.dtype)).sum(1)  # [B, D]
      directions = jnp.asarray(world.directions[name], one.x.dtype)
      sums.append(float(world.clarity[m]) * total @ directions.T)  # [B, A]
      counts.append(real.sum(1))
    pulled, v = _posterior(world, jnp.stack(counts, -1).astype(sums[0].dtype), jnp)
    mean = (jnp.stack(sums, -1) * pulled[:, None]).sum(-1)  # [B, A]
    if world.scores == 1:
      return {"prediction": mean[:, 0], "variance": v}
    surely = mean / jnp.sqrt(v)[:, None]
    no, yes = stats.norm.logcdf(-surely), stats.norm.logcdf(surely)
    sides = jnp.stack([no, yes], -1)  # [B, 2, 2]
    logits = sides[:, 0, :, None] + sides[:, 1, None, :]
    return {"prediction": logits.reshape(-1, 4), "variance": v}

  return types.System(lambda key, spec: ({}, {}), predict, ())
