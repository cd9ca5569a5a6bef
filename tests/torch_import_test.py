"""state_dict arrays -> parameters: where they go, how they are laid out, what is refused."""

import numpy as np
import pytest

from mmjax import torch_import

SHAPES = {
  "dense": {"kernel": (3, 2), "bias": (2,)},
  "norm": {"scale": (2,), "bias": (2,)},
  "conv": {"kernel": (5, 3, 4)},
  "words": {"embedding": (6, 3)},
  "lstm": {"w_ih": (3, 8), "w_hh": (2, 8), "b_ih": (8,), "b_hh": (8,)},
}
TEMPLATE = {
  name: {leaf: np.zeros(shape, np.float32) for leaf, shape in leaves.items()}
  for name, leaves in SHAPES.items()
}
RULES = (
  (r"unused\..*", None),
  *torch_import.lstm_rules("rnn", "lstm", bidirectional=False),
  (r"(dense|norm|conv|words)\.(weight|bias)", r"\1/\2"),
)


@pytest.fixture
def state():
  shapes = {
    "dense.weight": (2, 3),
    "dense.bias": (2,),
    "norm.weight": (2,),
    "norm.bias": (2,),
    "conv.weight": (4, 3, 5),
    "words.weight": (6, 3),
    "unused.weight": (7, 7),
    "rnn.weight_ih_l0": (8, 3),
    "rnn.weight_hh_l0": (8, 2),
    "rnn.bias_ih_l0": (8,),
    "rnn.bias_hh_l0": (8,),
  }
  random = np.random.default_rng(0)
  return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_layouts(state):
  params = torch_import.from_torch(TEMPLATE, state, RULES)
  np.testing.assert_array_equal(params["dense"]["kernel"], state["dense.weight"].T)
  np.testing.assert_array_equal(params["norm"]["scale"], state["norm.weight"])
  np.testing.assert_array_equal(params["words"]["embedding"], state["words.weight"])
  np.testing.assert_array_equal(params["lstm"]["w_hh"], state["rnn.weight_hh_l0"].T)
  np.testing.assert_array_equal(params["lstm"]["b_ih"], state["rnn.bias_ih_l0"])
  assert params["conv"]["kernel"][4, 2, 1] == state["conv.weight"][1, 2, 4]


def test_the_wrappers_prefix_is_dropped(state):
  wrapped = {f"Model.{name}": value for name, value in state.items()}
  ours = torch_import.from_torch(TEMPLATE, wrapped, RULES)
  np.testing.assert_array_equal(ours["dense"]["bias"], state["dense.bias"])
  assert torch_import.ignored(wrapped, RULES) == ["Model.unused.weight"]


def test_every_problem_stands_in_one_error(state):
  del state["norm.bias"]
  state["dense.weight"] = state["dense.weight"].T
  state["stranger.weight"] = np.zeros(3)
  state["Model.conv.weight"] = state["conv.weight"]
  with pytest.raises(torch_import.StateDictError) as error:
    torch_import.from_torch(TEMPLATE, state, RULES)
  unknown, rest = str(error.value).split("parameters without a value")
  missing, misshapen = rest.split("misshapen")
  assert "stranger.weight" in unknown
  assert "a second value for conv/kernel" in unknown
  assert missing.split() == [":", "norm/bias"]
  assert "dense.weight: gives (2, 3), but dense/kernel is (3, 2)" in misshapen


def test_a_rule_without_its_parameter_is_named(state):
  with pytest.raises(torch_import.StateDictError, match="no parameter nowhere/weight"):
    torch_import.from_torch(
      TEMPLATE, {**state, "lost.weight": np.zeros(2)}, (*RULES, ("lost.*", "nowhere/weight"))
    )


def test_there_and_back(state):
  params = torch_import.from_torch(TEMPLATE, state, RULES)
  shapes = {name: value.shape for name, value in state.items()}
  back = torch_import.to_torch(params, shapes, RULES)
  assert back.keys() == state.keys() - {"unused.weight"}
  for name, value in back.items():
    np.testing.assert_array_equal(value, state[name])
  with pytest.raises(torch_import.StateDictError, match="dense.weight"):
    torch_import.to_torch(params, {"dense.weight": (5, 5)}, RULES)


class Net:
  """What a file may hold of one network, by the way it was written."""

  WAYS = {
    "a state_dict": lambda net: net.state_dict(),
    "named_parameters": lambda net: list(net.named_parameters()),
    "a dictionary of parameters": lambda net: dict(net.named_parameters()),
    "a training checkpoint": lambda net: {"epoch": 3, "model_state_dict": net.state_dict()},
    "DataParallel": lambda net: {f"module.{k}": v for k, v in net.state_dict().items()},
  }


@pytest.mark.parametrize("way", Net.WAYS)
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "float64"])
def test_files_of_every_kind_are_read(tmp_path, way, kind):
  torch = pytest.importorskip("torch")
  net = torch.nn.Linear(3, 2).to(getattr(torch, kind))
  torch.save(Net.WAYS[way](net), tmp_path / "net.pth")
  state = torch_import.read_state(tmp_path / "net.pth")
  assert state.keys() == {"weight", "bias"}
  for name, value in net.state_dict().items():
    np.testing.assert_array_equal(state[name].astype(np.float64), value.double().numpy())


def test_pairs_are_read_as_they_come():
  torch = pytest.importorskip("torch")
  net = torch.nn.Linear(3, 2)
  found = torch_import.to_arrays(net.named_parameters())
  np.testing.assert_array_equal(found["weight"], net.weight.detach().numpy())


def test_files_that_hold_no_state_dict(tmp_path):
  torch = pytest.importorskip("torch")
  for content in ({"epoch": 3}, [1, 2], torch.zeros(3), {"a": [1.0]}, [("a", 1)]):
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(torch_import.StateDictError, match=r"net\.pth: is no state_dict"):
      torch_import.read_state(tmp_path / "net.pth")
  (tmp_path / "net.pth").write_bytes(b"cut off")
  with pytest.raises(torch_import.StateDictError, match=r"net\.pth: cannot be read"):
    torch_import.read_state(tmp_path / "net.pth")
  with pytest.raises(torch_import.StateDictError, match="holds no network"):
    torch_import.read_state(tmp_path)
