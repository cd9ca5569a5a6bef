"""One suite over every system: what the trainer, the masks and the evaluation rely on.

A new system needs a line in `SETTINGS`. It is tried as regression with features as text, and
as classification with token ids.
"""

import collections
import functools
import itertools
import json

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.interpreters import partial_eval

import jaxprs
from mmjax import masking, models, optim, recurrence, sources, systems, torch_import, types
from mmjax.models import cubemlp, dmd

BERT = dict(
  vocab_size=110,
  hidden_size=8,
  num_hidden_layers=1,
  num_attention_heads=2,
  intermediate_size=8,
  max_position_embeddings=16,
)
# Tiny settings by name, over the defaults of `make`.
SETTINGS = {
  "almt": dict(
    size=4,
    hidden_size=4,
    tokens=2,
    embedding_heads=1,
    text_heads=1,
    hyper_depth=2,
    hyper_heads=2,
    fusion_hidden_size=4,
    fusion_depth=1,
    fusion_heads=1,
    bert=BERT,
  ),
  "cenet": dict(bert={**BERT, "num_hidden_layers": 2}),  # it works after the first
  "cubemlp": dict(
    steps=7,
    size=4,
    encoder="lstm",  # compiles in half the time; parity has the others
    hidden_sizes=((3, 2, 4), (2, 3, 3)),
    out_sizes=((5, 3, 4), (2, 2, 3)),
    project=(True, True),
    bert=BERT,
  ),
  "dmd": dict(size=4, heads=2, depth=1, kernel_sizes=(1, 3, 2), graph_sizes=(3, 2), bert=BERT),
  "gcnet": dict(hidden_size=4, speakers=2, time_attention=True, bert=BERT),
  "corrkd": dict(size=4, heads=2, depth=1, statistics_size=4, teacher_epochs=1, bert=BERT),
  "hrlf": dict(size=4, heads=2, depth=1, teacher_epochs=1, bert=BERT),
  "lmf": dict(hidden_sizes=(4, 3, 4), rank=2, bert=BERT),
  "lnln": dict(
    size=4,
    tokens=2,
    discriminator_size=3,
    depth=1,
    heads=1,
    hidden_size=4,
    hyper_depth=2,
    hyper_heads=2,
    bert=BERT,
  ),
  "mctn": dict(size=3, bert=BERT),
  "misa": dict(hidden_size=4, bert=BERT),
  "mmim": dict(lstm_sizes=(3, 3), out_sizes=(4, 4), hidden_size=5, bert=BERT),
  "mmin": dict(
    embedding_sizes=(3, 4, 3),
    autoencoder_sizes=(6, 4),
    blocks=2,
    classifier_sizes=(8,),
    batch_norm=True,
    bert=BERT,
  ),
  "mult": dict(size=4, heads=2, depth=1, kernel_sizes=(1, 3, 2), bert=BERT),
  "self_mm": dict(
    lstm_sizes=(3, 4),
    out_sizes=(3, 4),
    head_sizes=(5, 4, 3, 4),
    head_dropout=(0.1, 0.1, 0.1, 0.1),
    bert=BERT,
  ),
  "smil": dict(
    sizes=(3, 2, 3), hidden_size=4, centres=2, complete_share=0.5, pretrain_epochs=1, bert=BERT
  ),
  "tetfn": dict(
    size=4, heads=2, lstm_sizes=(3, 2), head_sizes=(4, 3, 4, 3), head_dropout=(0.1,) * 4, bert=BERT
  ),
  "tfn": dict(hidden_sizes=(4, 3, 2), text_size=3, fusion_size=4, bert=BERT),
  "tfr_net": dict(
    size=4,
    heads=2,
    depth=1,
    memory_depth=1,
    temporal_heads=2,
    gate_sizes=(3, 2, 3),
    gate_depth=1,
    hidden_size=4,
    bert=BERT,
  ),
  "transm": dict(size=4, heads=2, bert=BERT),
}
# Systems whose published code reads the frames of padding too.
READS_PADDING = (
  "almt",
  "cenet",
  "cubemlp",
  "dmd",
  "lmf",
  "lnln",
  "mctn",
  "mmin",
  "mult",
  "tetfn",
  "tfn",
  "tfr_net",
)
# Systems whose authors publish no code for these data, so that no names are known.
WITHOUT_CODE = ("corrkd", "hrlf", "smil", "transm")
# Systems without any dropout of their own; BERT's is what is left.
NO_DROPOUT = ("almt", "lnln", "mctn")
# Systems that read as many frames of audio and vision as the text has tokens.
PACKS_WITH_TEXT = ("misa",)

# XLA compiles this generator several times faster than the default one.
make_key = functools.partial(jax.random.key, impl="unsafe_rbg")
ROWS = 5
TEXT, AUDIO, VISION = (6, 5), (9, 3), (8, 4)


def make_spec(tokens: bool, num_classes: int) -> types.Spec:
  text = types.ModalitySpec(TEXT[0], 0 if tokens else TEXT[1], tokens)
  audio, vision = types.ModalitySpec(*AUDIO), types.ModalitySpec(*VISION)
  return types.Spec(text, audio, vision, num_train=12, num_classes=num_classes)


def make_batch(spec: types.Spec, seed: int = 0) -> types.Batch:
  """Random lengths (text and the rest independent), random values, zeros on padding."""
  random = np.random.default_rng(seed)

  def modality(m):
    valid = np.arange(m.length) < random.integers(3, m.length + 1, (ROWS, 1))
    if m.tokens:
      x = random.integers(1, 100, valid.shape).astype(np.int32) * valid
      return types.modality(x, valid)
    x = random.normal(size=(ROWS, m.length, m.dim)).astype(np.float32) * valid[..., None]
    return types.modality(x, valid)

  label = random.uniform(-3, 3, ROWS).astype(np.float32)
  if spec.num_classes:
    label = random.integers(0, spec.num_classes, ROWS).astype(np.int32)
  index = random.permutation(spec.num_train)[:ROWS].astype(np.int32)
  modalities = [modality(getattr(spec, name)) for name in types.MODALITIES]
  return jax.tree.map(jnp.asarray, types.Batch(*modalities, label, index, {}))


class Case:
  """A system with parameters, a batch, and its functions compiled once for all tests."""

  def __init__(self, name: str, tokens: bool, num_classes: int):
    self.name, self.spec = name, make_spec(tokens, num_classes)
    self.system = models.MODELS[name](**SETTINGS[name])
    self.batch = self.make_batch()
    self.params, self.extra = self.system.init(make_key(0), self.spec)
    self.traces = collections.Counter()
    self.predict = jax.jit(self.counted("predict", self.system.predict))
    # `(params, batch, key, extra) -> ((loss, aux), grads)` of each phase
    self.gradients = {
      phase.name: jax.jit(jax.value_and_grad(self.counted(phase.name, phase.loss), has_aux=True))
      for phase in self.system.phases
    }

  @functools.cached_property
  def losses(self):
    """Each phase's loss without a key, traced: `(jaxpr, shapes of what it gives)`."""
    trace = functools.partial(jax.make_jaxpr, return_shape=True)
    args = self.params, self.batch, None, self.extra
    return {phase.name: trace(phase.loss)(*args) for phase in self.system.phases}

  def make_batch(self, seed=0):
    """`make_batch`; for a system of conversations, a conversation of two speakers."""
    batch = make_batch(self.spec, seed)
    if not self.system.conversations:
      return batch
    return batch._replace(info={"place": jnp.eye(ROWS, dtype=bool), "speaker": batch.index % 2})

  def counted(self, name, function):
    """Counts how often a function is traced."""

    def count(*args):
      self.traces[name] += 1
      return function(*args)

    return count


def step(params, grads, length):
  """A step of some length down the gradient, in numpy: nothing to compile."""
  params, grads = jax.device_get((params, grads))
  norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
  return jax.tree.map(lambda p, g: p - np.float32(length / norm) * g, params, grads)


@functools.lru_cache(maxsize=4)  # programs take memory
def make_case(name: str, kind: str) -> Case:
  return Case(name, *{"regression": (False, 0), "classification": (True, 3)}[kind])


# Systems whose programs take long to compile: for `pytest -m slow`, which CI runs too.
LARGE = (
  "almt",
  "cenet",
  "corrkd",
  "dmd",
  "gcnet",
  "hrlf",
  "lnln",
  "mult",
  "smil",
  "tetfn",
  "tfr_net",
  "transm",
)


def all_cases():
  for name in models.MODELS:
    for kind in ("regression", "classification"):
      marks = [pytest.mark.slow] if name in LARGE else []
      yield pytest.param((name, kind), id=f"{name}-{kind}", marks=marks)


@pytest.fixture(scope="module", params=all_cases())
def case(request) -> Case:
  return make_case(*request.param)


@pytest.fixture
def gradients(case):
  """Of large systems with a recorded file only those of classes compile: it has the others."""
  if case.name in set(LARGE) - set(WITHOUT_CODE) and not case.spec.num_classes:
    pytest.skip("the recorded file has the gradients of its regression")


def test_every_model_has_settings():
  assert SETTINGS.keys() == models.MODELS.keys()


def traced(name):
  """A system of binary problems, its batch, and the shapes of its parameters; nothing compiles."""
  case = Case.__new__(Case)
  case.spec = make_spec(False, 8)._replace(problems=("happy", "sad", "angry"))
  case.system = models.MODELS[name](**SETTINGS[name])
  return case, case.make_batch(), jax.eval_shape(lambda: case.system.init(make_key(0), case.spec))


@pytest.mark.parametrize(
  "names",
  [
    pytest.param([name for name in models.MODELS if name not in LARGE], id="small"),
    pytest.param(LARGE, id="large", marks=pytest.mark.slow),
  ],
)
def test_every_system_takes_binary_problems(names):
  """They are classes to it; its head's shape tells them from as many plain classes."""
  for name in names:
    case, batch, (params, extra) = traced(name)
    assert (3, 2) in [leaf.shape for leaf in jax.tree.leaves(params)], name
    found = jax.eval_shape(case.system.predict, params, batch, extra)
    assert found["prediction"].shape == (ROWS, 8), name
    for phase in case.system.phases:
      value, _ = jax.eval_shape(phase.loss, params, batch, make_key(1), extra)
      assert value.shape == (), name


def test_unknown_settings_are_refused():
  for make in models.MODELS.values():
    with pytest.raises(TypeError, match="hiden_size"):
      make(hiden_size=3)


def test_settings_stand_in_the_signature():
  assert models.settings("misa") == dict(
    hidden_size=128,
    dropout=0.2,
    pack="text",
    bert=None,
    diff_weight=0.1,
    sim_weight=0.3,
    recon_weight=1.0,
  )
  for name in models.MODELS:
    settings = models.settings(name)
    assert "num_outputs" not in settings and set(SETTINGS[name]) <= set(settings)
    models.MODELS[name](**json.loads(json.dumps(settings)))  # lists where there were tuples


def test_lists_and_tuples_make_the_same_system():
  shapes = [
    jax.eval_shape(
      lambda s=settings: models.MODELS["self_mm"](**s).init(make_key(0), make_spec(True, 0))
    )
    for settings in (SETTINGS["self_mm"], json.loads(json.dumps(SETTINGS["self_mm"])))
  ]
  assert shapes[0] == shapes[1]


def test_published_names_are_found_beside_the_model():
  for name in models.MODELS:
    if name in WITHOUT_CODE:
      continue
    rules = models.torch_rules(name, **SETTINGS[name])
    assert torch_import.ignored(["nonsense"], rules) == [] and len(rules) > 10
  at = r"C.module.4.weight"  # the second layer, behind a dropout's and a norm's number
  params = {"student": {"classifier": {"layer_1": {"kernel": 0}}}}
  for changes, found in ((dict(batch_norm=True), True), ({}, False)):
    rules = models.torch_rules("mmin", **changes)
    assert (torch_import.locate(params, at, rules) is not None) is found
  for name in ("toy:make_system", *WITHOUT_CODE):
    with pytest.raises(types.UsageError, match="TORCH_RULES"):
      models.torch_rules(name)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["misa", "self_mm", "mmim", "mmin", "tetfn"])
def test_features_of_half_precision_can_be_trained(name, dtype):
  """What they give is compared in `layers_test`; here every system must take them."""
  case_ = models.MODELS[name](**SETTINGS[name])
  spec = make_spec(False, 0)
  batch, key = make_batch(spec), make_key(0)
  halves = {n: getattr(batch, n) for n in types.MODALITIES}
  halves = {
    n: m._replace(x=m.x.astype(dtype), fill=m.fill.astype(dtype)) for n, m in halves.items()
  }

  def gradients(key, batch):
    params, extra = case_.init(key, spec)
    return [
      (params, extra, jax.grad(phase.loss, has_aux=True)(params, batch, key, extra))
      for phase in case_.phases
    ]

  with jax.numpy_dtype_promotion("standard"):
    shapes = jax.eval_shape(gradients, key, batch._replace(**halves))
  for params, extra, (grads, aux) in shapes:
    assert (grads, aux.extra) == (params, extra)


def test_init_depends_on_the_key_alone(case):
  again, other = (case.system.init(make_key(seed), case.spec)[0] for seed in range(2))
  first, again, other = jax.device_get((case.params, again, other))  # numpy compiles nothing
  jax.tree.map(np.testing.assert_array_equal, first, again)
  changed = jax.tree.map(lambda a, b: np.any(a != b), first, other)
  assert any(jax.tree.leaves(changed))
  assert type(case.params) is dict
  # what the trainer saves and restores
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((case.params, case.extra)))


def test_predictions_have_the_tasks_shape(case):
  out = case.predict(case.params, case.batch, case.extra)
  prediction, classes = out["prediction"], case.spec.num_classes
  assert prediction.shape == ((ROWS, classes) if classes else (ROWS,))
  assert np.isfinite(prediction).all()
  assert out["feature"].shape[0] == ROWS and out["feature"].ndim == 2


def test_predictions_are_traced_for_any_number_of_rows(case):
  """So that `serving.export` can."""
  if case.system.conversations:
    pytest.skip("it is not exported: its rows depend on each other")
  (rows,) = jax.export.symbolic_shape("b")
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype), case.batch)
  found = jax.eval_shape(case.system.predict, case.params, shapes, case.extra)
  assert found["prediction"].shape[0] == rows


def test_only_reversed_gradients_make_a_phase_reverse(case):
  for phase in case.system.phases:
    reversed_ = "reverse_gradient" in str(case.losses[phase.name][0])
    assert phase.hessian == ("reverse" if reversed_ else "symmetric"), phase.name


@pytest.mark.parametrize(
  "name",
  [
    *sorted(set(SETTINGS) - set(LARGE)),
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("lnln", "smil")),
  ],
)
def test_phases_tell_whether_products_with_their_hessian_are_symmetric(name):
  """uᵀJv = vᵀJu for the Jacobian J of a gradient, unless gradients are reversed on the way."""
  case, random = make_case(name, "regression"), np.random.default_rng(0)
  for phase in case.system.phases:
    trained, constant = optim.split(case.params, phase.trains)

    def gradient(trained, phase=phase, constant=constant):
      def loss(trained):
        return phase.loss(optim.merge(trained, constant), case.batch, None, case.extra)[0]

      return jax.grad(loss)(trained)

    def product(trained, one, other, gradient=gradient):
      turned = jax.jvp(gradient, (trained,), (one,))[1]
      return optax.tree.vdot(turned, other), optax.tree.norm(turned) * optax.tree.norm(other)

    one, other = (
      jax.tree.map(lambda p: random.normal(size=p.shape).astype(np.float32), trained)
      for _ in range(2)
    )
    with recurrence.plain():  # smaller programs; loops of our own are held to it elsewhere
      product = jax.jit(product).lower(trained, one, other).compile()
    (found, scale), (turned, _) = product(trained, one, other), product(trained, other, one)
    symmetric = abs(found - turned) < 1e-4 * scale
    assert scale > 0
    assert phase.hessian == ("symmetric" if symmetric else "reverse"), phase.name


@pytest.mark.usefixtures("gradients")
def test_losses_and_gradients_are_finite(case):
  key, params, extra = make_key(0), case.params, case.extra
  train = sources.Resident(case.batch)
  touched = jax.tree.map(lambda p: False, case.params)
  for epoch, phase in itertools.product((0, 1, 2), case.system.phases):
    if phase.on_epoch:  # generated labels start to move in the second epoch
      params, extra = phase.on_epoch(params, extra, epoch, train)
    (value, aux), grads = case.gradients[phase.name](params, case.batch, key, extra)
    grads, metrics = jax.device_get((grads, aux.metrics))
    assert value.shape == ()
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert all(np.isfinite(m) and np.shape(m) == () for m in metrics.values())
    touched = jax.tree.map(lambda t, g: t | np.any(g), touched, grads)
    extra = aux.extra
  assert np.mean(jax.tree.leaves(touched)) > 0.7


@pytest.mark.parametrize(
  "name",
  [pytest.param(n, marks=[pytest.mark.slow] if n in LARGE else []) for n in SETTINGS],
)
def test_in_bfloat16_products_are_halves_and_the_loss_is_the_same(name):
  # of the case whose gradients are compiled in any case
  case = make_case(name, "classification" if name in LARGE else "regression")
  half = systems.in_precision(case.system, "bfloat16")

  def network(params):
    return half.predict(params, case.batch, case.extra)["prediction"].sum()

  traced = jax.make_jaxpr(jax.grad(network))(case.params)
  products = jaxprs.named(traced.jaxpr, "dot_general")
  assert {v.aval.dtype for product in products for v in product.invars} == {jnp.dtype("bfloat16")}
  assert len(products) > 10
  args, phase = (case.params, case.batch, make_key(0), case.extra), half.phases[-1]
  (expected, their_aux), grads = case.gradients[phase.name](*args)
  value, aux = jax.jit(phase.loss)(*args)
  np.testing.assert_allclose(value, expected, rtol=0.01)
  gradient = jax.eval_shape(jax.grad(phase.loss, has_aux=True), *args)
  kinds = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)  # noqa: E731
  assert kinds((aux, gradient)) == kinds((their_aux, (grads, their_aux)))


def test_extra_keeps_its_structure(case):
  extra = case.extra
  for phase in case.system.phases:
    aux = case.losses[phase.name][1][1]
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), (extra, aux.extra))
    assert shapes[0] == shapes[1]


@pytest.mark.usefixtures("gradients")
def test_another_batch_needs_no_other_program(case):
  other = case.make_batch(seed=1)
  case.predict(case.params, case.batch, case.extra)
  case.predict(case.params, other, case.extra)
  for phase in case.system.phases:
    gradient = case.gradients[phase.name]
    (_, aux), grads = gradient(case.params, case.batch, make_key(0), case.extra)
    gradient(step(case.params, grads, 0.01), other, make_key(1), aux.extra)
  assert set(case.traces.values()) == {1}


@pytest.mark.usefixtures("gradients")
def test_steps_along_the_gradient_lower_the_loss(case):
  """On one batch; it also says that the loss depends on the parameters as it claims."""
  phase = case.system.phases[-1]
  gradient, params, values = case.gradients[phase.name], case.params, []
  for _ in range(8):
    (value, _), grads = gradient(params, case.batch, make_key(0), case.extra)
    params = step(params, grads, 0.01)
    values.append(float(value))
  assert values[-1] < values[0]


def test_what_is_not_seen_changes_no_prediction(case):
  """Masks only mark; neither poisoning the unseen values nor erasing them is noticed."""
  drop = {"text": 0.6, "audio": 0.5, "vision": 0.4}
  masked = masking.span(drop)(jax.random.key(3), case.batch)

  def poison(m):
    return m._replace(x=jnp.where(m.seen, m.x, 7 if m.x.ndim == 2 else 1e3).astype(m.x.dtype))

  poisoned = masked._replace(**{n: poison(getattr(masked, n)) for n in types.MODALITIES})
  ours = case.predict(case.params, masked, case.extra)["prediction"]
  for other in (poisoned, masking.erase(masked)):
    theirs = case.predict(case.params, other, case.extra)["prediction"]
    np.testing.assert_array_equal(ours, theirs)
  clean = case.predict(case.params, case.batch, case.extra)["prediction"]
  assert np.abs(ours - clean).max() > 1e-7  # the mask did take something away


@pytest.mark.parametrize("name", types.MODALITIES)
def test_padding_changes_no_prediction(case, name):
  if case.name in READS_PADDING:
    pytest.skip("the published model reads padding")
  m = getattr(case.batch, name)
  valid = m.valid if m.x.ndim == 2 else m.valid[..., None]
  other = m._replace(x=jnp.where(valid, m.x, 7).astype(m.x.dtype))
  if name != "text" and case.name in PACKS_WITH_TEXT:  # which may be longer
    steps = jnp.arange(m.x.shape[1])[None] < case.batch.text.valid.sum(1, keepdims=True)
    other = m._replace(x=jnp.where(steps[..., None], m.x, 7.0))
  ours = case.predict(case.params, case.batch, case.extra)["prediction"]
  theirs = case.predict(case.params, case.batch._replace(**{name: other}), case.extra)
  np.testing.assert_allclose(ours, theirs["prediction"], atol=1e-6)


@pytest.mark.usefixtures("gradients")
def test_randomness_only_with_a_key(case):
  differs = []
  for phase in case.system.phases:
    gradient = case.gradients[phase.name]
    first, again, other = (
      float(gradient(case.params, case.batch, make_key(seed), case.extra)[0][0])
      for seed in (0, 0, 1)
    )
    assert first == again
    differs.append(first != other)
    # what is computed with a key, as it was compiled above, and without one
    traced = gradient.trace(case.params, case.batch, make_key(0), case.extra).jaxpr.jaxpr
    used, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    drawn = ["random_bits" in str(jaxpr) for jaxpr in (used, case.losses[phase.name][0])]
    assert drawn == [differs[-1], False]
  assert any(differs) or (case.name in NO_DROPOUT and not case.spec.text.tokens)


def test_misa_packs_with_the_lengths_that_it_is_told():
  """ "own" reads what lies beyond the text's length, "text" does not."""
  case = make_case("misa", "regression")
  audio = case.batch.audio._replace(valid=jnp.ones((ROWS, AUDIO[0]), bool))
  batch = case.batch._replace(audio=audio)
  beyond = jnp.arange(AUDIO[0])[None, :, None] >= TEXT[0]
  other = batch._replace(audio=audio._replace(x=jnp.where(beyond, 1.0, audio.x)))
  own = models.MODELS["misa"](**SETTINGS["misa"], pack="own")
  for predict, same in ((case.predict, True), (jax.jit(own.predict), False)):
    ours, theirs = (predict(case.params, b, {})["prediction"] for b in (batch, other))
    assert bool((ours == theirs).all()) is same
  with pytest.raises(ValueError, match="pack"):
    models.MODELS["misa"](pack="mine")


@pytest.mark.parametrize(
  ("label", "expected"),
  [
    ([0.0, 0.0, 2.0], 0.8),  # the mean of max(0, 0.3 - 0 + 1) and max(0, 0.3 - 0 + 0)
    ([0, 0, 2], 0.65),  # classes differ by 1: 0.15 in the place of 0.3
    ([0.0, 1.0, 2.0], 0.0),  # nobody has a partner
    ([1.0, 1.0, 1.0], 0.0),  # nobody has an opponent
  ],
)
def test_dmds_margin_grows_with_the_distance_of_labels(label, expected):
  feature = jnp.array([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
  np.testing.assert_allclose(dmd.margin_loss(feature, jnp.array(label)), expected, rtol=1e-6)


def test_cubemlp_composes_and_centres_as_published():
  cube = jnp.arange(24.0).reshape(1, 2, 3, 4)  # an entry is 12 step + 4 modality + channel
  both = cubemlp.compose(cube, "cat", "cat")[0]
  np.testing.assert_array_equal(both[:12], [0, 1, 2, 3, 12, 13, 14, 15, 4, 5, 6, 7])
  np.testing.assert_array_equal(cubemlp.compose(cube, "mean", "cat")[0], np.arange(12) + 6)
  np.testing.assert_array_equal(cubemlp.compose(cube, "mean", "mean")[0], np.arange(4) + 10)
  centred = cubemlp.centred(jnp.array([[[1.0], [2.0]]]), 5)
  np.testing.assert_array_equal(centred[0, :, 0], [0, 1, 2, 0, 0])


def test_cubemlps_cube_has_zeros_for_what_is_missing_as_a_whole():
  case = make_case("cubemlp", "classification")
  for missing, name in enumerate(types.MODALITIES):
    cube = case.predict(case.params, masking.drop(name)(make_key(0), case.batch), {})["cube"]
    empty = np.abs(cube).max((0, 1, 3)) == 0
    assert list(empty) == [n == missing for n in range(3)]


def test_cubemlp_refuses_sizes_that_a_residual_cannot_take():
  sizes = ((5, 3, 4),)
  make = functools.partial(cubemlp.make, steps=7, size=4, hidden_sizes=sizes, out_sizes=sizes)
  with pytest.raises(ValueError, match="only a block that projects"):
    jax.eval_shape(lambda: make(project=(False,)).init(make_key(0), make_spec(False, 0)))
  for settings in (dict(encoder="rnn"), dict(project=(True, True)), dict(pack="mine")):
    with pytest.raises(ValueError, match=next(iter(settings))):
      make(**{"project": (True,), **settings})


@pytest.mark.parametrize("over", ["time", "batch"])
def test_mctn_mixes_the_samples_of_a_batch_only_over_the_batch(over):
  case = make_case("mctn", "regression")
  predict = case.predict
  if over == "batch":
    predict = jax.jit(models.MODELS["mctn"](**SETTINGS["mctn"], over="batch").predict)
  x = case.batch.text.x
  other = case.batch._replace(text=case.batch.text._replace(x=x.at[-1].set(1 - x[-1])))
  one, two = (predict(case.params, batch, {})["prediction"] for batch in (case.batch, other))
  assert one[-1] != two[-1]
  assert bool((one[:-1] == two[:-1]).all()) is (over == "time")


def test_mctn_predicts_from_its_source_alone():
  case = make_case("mctn", "regression")
  batch = masking.drop(("audio", "vision"))(make_key(0), case.batch)
  one, two = (case.predict(case.params, b, {}) for b in (case.batch, batch))
  np.testing.assert_array_equal(one["prediction"], two["prediction"])
  assert np.abs(one["vision"] - two["vision"]).max() > 0  # but its translations read the others
  np.testing.assert_array_equal(two["target_audio"][..., : AUDIO[1]], case.batch.audio.x)


def test_mctn_may_leave_padding_out():
  case = make_case("mctn", "regression")
  system = models.MODELS["mctn"](**SETTINGS["mctn"], mask_padding=True)
  batch = case.batch
  for name in types.MODALITIES:
    m = getattr(batch, name)
    batch = batch._replace(**{name: m._replace(x=jnp.where(m.valid[..., None], m.x, 7.0))})
  loss = jax.jit(system.loss)
  one, two = (loss(case.params, b, None, {})[0] for b in (case.batch, batch))
  np.testing.assert_allclose(one, two, rtol=1e-5)
  assert abs(one - case.system.loss(case.params, case.batch, None, {})[0]) > 1e-4
  with pytest.raises(ValueError, match="no padding"):
    models.MODELS["mctn"](mask_padding=True, over="batch")
