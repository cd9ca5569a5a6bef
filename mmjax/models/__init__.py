"""The systems by name: `MODELS[name](**settings) -> System`."""

from mmjax.models import misa

MODELS = {
  "misa": misa.make,
}
