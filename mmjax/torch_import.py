"""PyTorch state_dict arrays -> parameters.

A system's rules map every published name to a parameter path; the arrays are transposed by
what they become: PyTorch's Linear keeps [out, in] and Conv1d [out, in, k] where linen keeps
[in, out] and [k, in, out].
"""

import os
import pathlib
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from mmjax import types

Rules = Sequence[tuple[str, str | None]]

# Endings of PyTorch's LSTM parameters -> ours.
LSTM = {"weight_ih_l0": "w_ih", "weight_hh_l0": "w_hh", "bias_ih_l0": "b_ih", "bias_hh_l0": "b_hh"}
_TRANSPOSED = ("w_ih", "w_hh")


class StateDictError(types.UsageError):
  """A state_dict does not fit a model; the message lists every name."""


# Where training scripts keep the state_dict beside an optimizer's state.
_WRAPPERS = ("state_dict", "model_state_dict", "model")


def read_state(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """The arrays of a .pth file, or of all networks "…net_NAME.pth" in a folder as "NAME.…".

  Args:
    path: a state_dict, as `torch.save` writes it, or the pairs of `named_parameters()`; of any
      floating type, on any device. Needs torch.

  Returns:
    Name -> array; types that numpy lacks, such as bfloat16, become float32.

  Raises:
    StateDictError: if it is missing, or holds anything but tensors.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    files = sorted(path.glob("*net_*.pth"))
    if not files:
      raise StateDictError(f"{path}: holds no network, expected files like `30_net_A.pth`.")
    return {
      f"{file.stem.rpartition('net_')[2]}.{name}": value
      for file in files
      for name, value in read_state(file).items()
    }
  try:
    import torch
  except ImportError:
    raise StateDictError("reading PyTorch files needs torch: pip install 'mmjax[parity]'") from None
  try:
    state = torch.load(path, map_location="cpu", weights_only=True)
  except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
    raise StateDictError(
      f"{path}: cannot be read as a state_dict ({str(error).splitlines()[0]}). Save it with"
      " `torch.save(model.state_dict(), path)`."
    ) from None
  return to_arrays(state, os.fspath(path))


def to_arrays(state: Any, where: str = "state_dict") -> dict[str, np.ndarray]:
  """Tensors by name -> arrays by name.

  Args:
    state: a state_dict, a dictionary that holds one, or pairs such as `named_parameters()`.
    where: what it is, for messages.

  Returns:
    Name -> array, without DataParallel's "module.".

  Raises:
    StateDictError: if it holds anything but tensors.
  """
  import torch

  if isinstance(state, Mapping):
    inner = next((state[key] for key in _WRAPPERS if isinstance(state.get(key), Mapping)), None)
    state = state if inner is None else inner
  try:
    tensors = dict(state)
    if not all(isinstance(n, str) and torch.is_tensor(v) for n, v in tensors.items()):
      raise TypeError
  except (TypeError, ValueError):
    raise StateDictError(
      f"{where}: is no state_dict, expected a mapping (or pairs) of names to tensors."
    ) from None
  return {name.removeprefix("module."): _to_array(value) for name, value in tensors.items()}


def _to_array(tensor: Any) -> np.ndarray:
  tensor = tensor.detach().cpu()
  try:
    return tensor.numpy()
  except TypeError:  # numpy has no bfloat16
    return tensor.float().numpy()


def lstm_rules(prefix: str, path: str, *, bidirectional: bool) -> Rules:
  """Rules for an nn.LSTM of one layer at the regex `prefix`: a `BiLSTM` or `LSTM` at `path`."""
  rules = []
  for name, leaf in LSTM.items():
    if bidirectional:
      rules += [
        (rf"{prefix}\.{name}", f"{path}/forward/{leaf}"),
        (rf"{prefix}\.{name}_reverse", f"{path}/backward/{leaf}"),
      ]
    else:
      rules.append((rf"{prefix}\.{name}", f"{path}/{leaf}"))
  return tuple(rules)


def gru_rules(prefix: str, path: str) -> Rules:
  """Rules for a bidirectional nn.GRU at the regex `prefix`: a `BiGRU` at `path`."""
  rules = []
  for name, leaf in LSTM.items():
    name = name.replace("_l0", r"_l(\d+)")
    rules += [
      (rf"{prefix}\.{name}", rf"{path}/forward_\1/{leaf}"),
      (rf"{prefix}\.{name}_reverse", rf"{path}/backward_\1/{leaf}"),
    ]
  return tuple(rules)


def encoder_layer_rules(prefix: str, path: str) -> Rules:
  """Rules for an nn.TransformerEncoderLayer at the regex `prefix`, as `path`."""
  return (
    (prefix + r"\.self_attn\.in_proj_weight", f"{path}/attention/in_kernel"),
    (prefix + r"\.self_attn\.in_proj_bias", f"{path}/attention/in_bias"),
    (prefix + r"\.self_attn\.out_proj\.weight", f"{path}/attention/out_kernel"),
    (prefix + r"\.self_attn\.out_proj\.bias", f"{path}/attention/out_bias"),
    (prefix + r"\.(linear1|linear2|norm1|norm2)\.(weight|bias)", rf"{path}/\1/\2"),
  )


def _targets(path: str) -> list[str]:
  """The linen names that a PyTorch "…/weight" may have; other names are exact."""
  parent, _, leaf = path.rpartition("/")
  if leaf != "weight":
    return [path]
  return [f"{parent}/{name}".lstrip("/") for name in ("kernel", "scale", "embedding")]


def convert(value: np.ndarray, path: str) -> np.ndarray:
  """An array in PyTorch's layout -> in ours, by the name and rank of what it becomes."""
  leaf = path.rpartition("/")[2]
  if (leaf.endswith("kernel") and value.ndim == 2) or leaf in _TRANSPOSED:
    return value.T
  if leaf.endswith("kernel") and value.ndim == 4 and value.shape[1] == 1:
    value = value[:, 0].swapaxes(1, 2)  # Conv2d over (steps, all channels): a Conv1d
  if leaf.endswith("kernel") and value.ndim == 3:
    return value.transpose(2, 1, 0)
  return value


def _target(name: str, rules: Rules) -> str | None:
  """The path that the first matching rule gives a name: "" without a rule, None if ignored."""
  for pattern, target in rules:
    if match := re.fullmatch(pattern, name.removeprefix("Model.")):
      return None if target is None else match.expand(target)
  return ""


def locate(template: types.Params, name: str, rules: Rules) -> str | None:
  """The "a/b/c" path of the parameter that a published name stands for, or None."""
  flat = flax.traverse_util.flatten_dict(template, sep="/")
  return _find(flat, _target(name, rules))


def _find(flat: Mapping, target: str | None) -> str | None:
  return None if target is None else next((p for p in _targets(target) if p in flat), None)


def ignored(names: Iterable[str], rules: Rules) -> list[str]:
  """The names that the rules leave out on purpose: no parameter of ours stands for them."""
  return [name for name in names if _target(name, rules) is None]


def from_torch(
  template: types.Params,
  state: Mapping[str, np.ndarray],
  rules: Rules,
  *,
  required: str = "",
) -> types.Params:
  """Puts the arrays of a state_dict where they belong.

  Args:
    template: parameters (or their shapes) of the model.
    state: names -> arrays; a leading "Model." (MMSA's wrapper) is ignored. Gradients of a
      PyTorch model are mapped in the same way.
    rules: ((regex over a whole name, path or None), …), the first that matches decides. A
      path may refer to groups (`\\\\1`); its ending "weight" stands for linen's "kernel",
      "scale" or "embedding". None ignores a name.
    required: regex searched in each parameter's path; the others keep the template's values
      where the state has none.

  Returns:
    Parameters of the template's structure.

  Raises:
    StateDictError: lists the names that are unknown, missing or misshapen.
  """
  flat: dict[str, Any] = flax.traverse_util.flatten_dict(template, sep="/")
  found, unknown, misshapen = {}, [], {}
  for name, value in state.items():
    target = _target(name, rules)
    if target is None:
      continue
    path = _find(flat, target)
    if path is None:
      unknown.append(f"{name} (no parameter {target})" if target else name)
      continue
    array = convert(np.asarray(value), path)
    if path in found:
      unknown.append(f"{name} (a second value for {path})")
    elif array.shape != flat[path].shape:
      misshapen[path] = f"{name}: gives {array.shape}, but {path} is {flat[path].shape}"
    else:
      found[path] = jnp.asarray(array, flat[path].dtype)
  lacking = flat.keys() - found.keys() - misshapen.keys()
  missing = sorted(path for path in lacking if re.search(required, path))
  problems = [
    f"{title}:\n" + "\n".join(f"  {name}" for name in names)
    for title, names in (
      ("names that the model does not know", unknown),
      ("parameters without a value", missing),
      ("misshapen", misshapen.values()),
    )
    if names
  ]
  if problems:
    raise StateDictError("the state_dict does not fit the model.\n" + "\n".join(problems))
  return flax.traverse_util.unflatten_dict({**flat, **found}, sep="/")


def variables_from_torch(
  params: types.Params,
  extra: types.Extra,
  state: Mapping[str, np.ndarray],
  rules: Rules,
  *,
  required: str = "",
) -> tuple[types.Params, types.Extra]:
  """`from_torch` for a system whose rules also name paths below "batch_stats/", of `extra`.

  Args:
    params, extra: the templates.
    state, rules, required: see `from_torch`.

  Returns:
    Parameters and `extra` with the state's values.
  """
  known = any(target and target.startswith("batch_stats/") for _, target in rules)
  statistics = {"batch_stats": extra["batch_stats"]} if known else {}
  found = from_torch({**params, **statistics}, state, rules, required=required)
  statistics = {name: found.pop(name) for name in statistics}
  return found, {**extra, **statistics}


def to_torch(
  params: types.Params, shapes: Mapping[str, Sequence[int]], rules: Rules
) -> dict[str, np.ndarray]:
  """The inverse of `from_torch`: parameters as the arrays of a state_dict.

  Args:
    params: parameters, or gradients.
    shapes: name -> shape of a PyTorch model's state_dict.
    rules: the system's.

  Returns:
    Name -> array for the names that stand for a parameter; ignored names are left out.

  Raises:
    StateDictError: if a name's shape does not fit.
  """
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  state = {}
  for name, shape in shapes.items():
    path = _find(flat, _target(name, rules))
    if path is None:
      continue
    value, leaf = np.asarray(flat[path]), path.rpartition("/")[2]
    if leaf.endswith("kernel") and value.ndim == 3:
      value = value.transpose(2, 1, 0)
      value = value.swapaxes(1, 2)[:, None] if len(shape) == 4 else value
    elif leaf in _TRANSPOSED or (leaf.endswith("kernel") and value.ndim == 2):
      value = value.T
    if value.shape != tuple(shape):
      raise StateDictError(f"{path} gives {value.shape}, but {name} is {tuple(shape)}.")
    state[name] = np.ascontiguousarray(value)
  return state
