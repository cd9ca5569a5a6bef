"""A network, a loss and a head make a system: `init`, `predict` and `phases`, written once.

The network is a linen module. It is called with a batch, or `(batch, train)` if it behaves
differently in training, and returns a dict: "prediction" (see `layers.prediction`), "feature",
and whatever its loss reads. Its attribute `num_outputs` is set by the data and meant for a
`layers.Dense`: 1, a number of classes, or (K, 2) for K binary problems. An attribute `bert` is a
`bert.Setup`, and all others are settings, with a default and documentation there and nowhere else.
So a whole model of your own is

  class Means(nn.Module):
    num_outputs: int = 1
    size: int = 32  # of the feature

    @nn.compact
    def __call__(self, batch):
      means = [masking.observed(getattr(batch, name)).mean(1) for name in types.MODALITIES]
      feature = nn.relu(nn.Dense(self.size)(jnp.concatenate(means, -1)))
      scores = layers.Dense(self.num_outputs, name="head")(feature)
      return {"feature": feature, "prediction": layers.prediction(scores)}

  def loss(out, batch, extra, scale):
    error = losses.task(out["prediction"], batch.label).mean()
    return scale * error, types.Aux({"error": error}, extra)

  @systems.configurable(Means)
  def make(network, *, scale=1.0):
    return systems.supervised(network, functools.partial(loss, scale=scale), head="head")

and `make(size=8, scale=2.0)` the system; in a config it is "my_package.my_module:make".
"""

import contextvars
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import core
from jax.interpreters import partial_eval

from mmjax import bert as bert_lib
from mmjax import dropout, layers, parallel, registry, types

# What networks compute in, see `in_precision`.
PRECISIONS = ("float32", "bfloat16")
_DTYPE: contextvars.ContextVar[Any] = contextvars.ContextVar("mmjax_network_dtype", default=None)
# Attributes of a network that are no settings: the first is the data's, the others are linen's.
_NOT_SETTINGS = ("num_outputs", "parent", "name")


class OutputLoss(Protocol):
  """A loss of what a network returns."""

  def __call__(
    self, out: dict[str, types.Array], batch: types.Batch, extra: types.Extra
  ) -> tuple[types.Array, types.Aux]:
    """The loss.

    Args:
      out: of the network, in training.
      batch: B samples.
      extra: training arrays that are not parameters.

    Returns:
      [] the loss; and the scalars to log, with the successor of `extra`.
    """
    ...


class Model(NamedTuple):
  """A network as pure functions: what systems of several networks or phases are composed of.

  Attributes:
    init: `(key, spec) -> (params, extra)`; `extra` holds its collections alone.
    apply: `(params, batch, extra, key=None, train=False, **inputs) -> (out, extra)`; dropout is on
      where there is a key, `train` moves the collections and is told to the network, which gets
      the inputs beside the batch.
  """

  init: Callable[[types.PRNGKey, types.Spec], tuple[types.Params, types.Extra]]
  apply: Callable[..., tuple[dict[str, types.Array], types.Extra]]

  def predict(self, params: types.Params, batch: types.Batch, extra: types.Extra):
    """A `System.predict`."""
    return self.apply(params, batch, extra)[0]

  def loss(self, of: OutputLoss) -> types.LossFn:
    """The loss of a phase, from a loss of what the network returns."""

    def loss(params, batch, key, extra):
      out, extra = self.apply(params, batch, extra, key, train=True)
      out, batch = parallel.gather((out, batch))
      return of(out, batch, extra)

    return loss


def functional(network: nn.Module, *, head: str, collections: Sequence[str] = ()) -> Model:
  """A network as pure functions.

  Args:
    network: see above.
    head: "a/b/c" path of the layer whose bias, [C] or [K, 2], tells the number of outputs.
    collections: variables beside the parameters, as "batch_stats", which stay in `extra`.

  Returns:
    The functions. Where the network has a BERT, `init` refuses text that it cannot read, and puts
    the weights of its folder in. Within `in_precision`, `apply` casts parameters and features, and
    what it returns to float32.
  """
  takes_train = "train" in inspect.signature(type(network).__call__).parameters

  def told(train) -> dict[str, Any]:
    return {"train": train} if takes_train else {}

  encoder: bert_lib.Setup | None = getattr(network, "bert", None)

  def init(key, spec):
    if encoder is not None:
      encoder.check(spec)
    outputs = (len(spec.problems), 2) if spec.problems else spec.num_classes or 1
    module = network.clone(num_outputs=outputs)
    example = jax.eval_shape(lambda: types.example_batch(spec))
    variables = initial(module, key, example, **told(True))
    params = variables.pop("params")
    if variables.keys() != set(collections):
      raise ValueError(f"the network has collections {[*variables]}, declared are {collections}.")
    return _with_weights(params, encoder), variables

  def apply(params, batch, extra, key=None, train=False, **inputs):
    module = network.clone(num_outputs=_num_outputs(params, head))
    if dtype := _DTYPE.get():
      params = _cast(params, dtype)
      batch = batch._replace(**{m: _cast(getattr(batch, m), dtype) for m in types.MODALITIES})
    variables = {"params": params} | {name: extra[name] for name in collections}
    rngs = None if key is None else {"dropout": dropout.cheap(key)}
    mutable = list(collections) if train else []
    inputs |= told(train)
    out, changed = module.apply(variables, batch, rngs=rngs, mutable=mutable, **inputs)
    if dtype:
      out = jax.tree.map(layers.wide, out)
    return out, {**extra, **changed}

  return Model(init, apply)


def initial(module: nn.Module, key: types.PRNGKey, *shapes: Any, **told: Any) -> dict[str, Any]:
  """A module's variables, of which nothing but what they depend on is compiled or run.

  As `lazy_init`, which runs a program, often an empty one, for every operation with an argument
  that it knows: most of the time that a start took.

  Args:
    module: a module.
    key: of its parameters.
    *shapes: its arguments, as trees of `jax.ShapeDtypeStruct`.
    **told: arguments that are no arrays.

  Returns:
    Its collections, among them "params".

  Raises:
    ValueError: if one depends on values of the arguments.
  """

  def init(key, *args):
    return dict(module.init(key, *args, **told))

  traced, out = jax.make_jaxpr(init, return_shape=True)(key, *shapes)
  needed = [True] * len(traced.jaxpr.outvars)
  rest = len(traced.jaxpr.invars) - 1
  jaxpr, _ = partial_eval.dce_jaxpr(traced.jaxpr, needed, instantiate=[True, *[False] * rest])
  if len(jaxpr.invars) > 1:
    raise ValueError(f"variables of {type(module).__name__} depend on values of its arguments.")
  leaves = core.eval_jaxpr(jaxpr, traced.consts, key)
  return jax.tree.unflatten(jax.tree.structure(out), leaves)


def in_precision(system: types.System, precision: str) -> types.System:
  """The same system, whose networks compute in a precision of `PRECISIONS`.

  Matrix products and activations are of that precision; statistics inside of layers, what a loss
  computes of the network's outputs, parameters, gradients and optimizer stay in float32. A step
  that moves parameters by less than bfloat16's 2⁻⁹ of themselves, as the inner steps of M³S with a
  small rate do, is kept by the parameters, though the network hardly sees it.

  Args:
    system: of networks by `functional` or `supervised`, which it acts on.
    precision: of `PRECISIONS`.

  Returns:
    The system.

  Raises:
    UsageError: on an unknown precision.
  """
  if precision not in PRECISIONS:
    hint = registry.nearest(precision, PRECISIONS)
    raise types.UsageError(
      f"precision is {precision!r}{hint}; expected one of {', '.join(PRECISIONS)}."
    )
  if precision == "float32":
    return system

  def at(function):
    @functools.wraps(function)
    def run(*args):
      token = _DTYPE.set(jnp.dtype(precision))
      try:
        return function(*args)
      finally:
        _DTYPE.reset(token)

    return run

  phases = tuple(phase._replace(loss=at(phase.loss)) for phase in system.phases)
  return system._replace(predict=at(system.predict), phases=phases)


def supervised(
  network: nn.Module,
  loss: OutputLoss,
  *,
  head: str,
  collections: Sequence[str] = (),
  extra: Callable[[types.Spec], types.Extra] = lambda spec: {},
  on_epoch: Callable | None = None,
  trains: str = "",
  hessian: str = "reverse",
) -> types.System:
  """A system of one network and one phase, "main".

  Args:
    network: see above.
    loss: of what it returns.
    head: "a/b/c" path of the layer whose bias, [C] or [K, 2], tells the number of outputs.
    collections: variables beside the parameters, as "batch_stats", which stay in `extra`.
    extra: `spec -> extra`, what the loss keeps beside them.
    on_epoch, trains, hessian: of the phase, see `types.Phase`.

  Returns:
    The system.
  """
  model = functional(network, head=head, collections=collections)

  def init(key, spec):
    params, variables = model.init(key, spec)
    return params, {**variables, **extra(spec)}

  phase = types.Phase("main", model.loss(loss), trains, on_epoch=on_epoch, hessian=hessian)
  return types.System(init, model.predict, (phase,))


def count_epochs(params, extra, epoch, train):
  """A `Phase.on_epoch` for losses that read `extra["epoch"]`, an int32 (if it is there)."""
  del train
  if "epoch" in extra:
    extra = {**extra, "epoch": jnp.full_like(extra["epoch"], epoch)}
  return params, extra


def settings_of(network: type[nn.Module]) -> dict[str, Any]:
  """The attributes of a network that are settings, with their defaults, as `registry`'s has it."""
  found = {f.name: f.default for f in dataclasses.fields(network) if f.name not in _NOT_SETTINGS}
  empty = inspect.Parameter.empty
  return {name: empty if d is dataclasses.MISSING else d for name, d in found.items()}


def configurable(
  network: type[nn.Module],
) -> Callable[[Callable[..., types.System]], Callable[..., types.System]]:
  """Decorates `make(network, *, …)`: it then takes the network's settings beside its own.

  Its signature shows all of them with their defaults. Lists, as JSON has them, become tuples, and
  "bert" is read by `bert.setup`.

  Args:
    network: whose attributes are the settings.

  Returns:
    The decorator. What it makes raises TypeError for a setting that there is not.
  """
  defaults = settings_of(network)
  if "bert" in defaults:
    defaults["bert"] = None

  def decorate(make):
    _, *own = inspect.signature(make).parameters.values()
    of_network = [
      inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
      for name, default in defaults.items()
    ]
    signature = inspect.Signature([*of_network, *own])

    @functools.wraps(make)
    def configured(**settings):
      for name in settings:
        if name not in signature.parameters:
          hint = registry.nearest(name, signature.parameters)
          raise TypeError(f"{network.__name__} has no setting {name!r}{hint}.")
      given = {name: _freeze(settings.pop(name)) for name in defaults if name in settings}
      if "bert" in defaults:
        given["bert"] = bert_lib.setup(given.get("bert"))
      return make(network(**given), **settings)

    configured.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
    return configured

  return decorate


def _freeze(setting: Any) -> Any:
  """Hashable, as linen wants its attributes."""
  if isinstance(setting, (list, tuple)):
    return tuple(map(_freeze, setting))
  return flax.core.freeze(dict(setting)) if isinstance(setting, Mapping) else setting


def _num_outputs(params: types.Params, head: str) -> int | tuple[int, ...]:
  layer = functools.reduce(lambda tree, name: tree[name], head.split("/"), params)
  shape = layer["bias"].shape
  return shape if len(shape) == 2 and shape[0] > 1 else shape[-1]  # some biases are [1, C]


def _cast(tree: Any, dtype: Any) -> Any:
  """The floats of a tree in another dtype."""
  return jax.tree.map(
    lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree
  )


def _with_weights(params: types.Params, encoder: bert_lib.Setup | None) -> types.Params:
  """Pretrained weights wherever a "bert" is, if there are any."""
  if encoder is None or encoder.folder is None:
    return params
  return {
    name: _with_weights(part, encoder) if isinstance(part, dict) and name != "bert" else part
    for name, part in encoder.with_weights(params).items()
  }
