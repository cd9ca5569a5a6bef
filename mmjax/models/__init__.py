"""The systems by name: `MODELS[name](**settings) -> System`."""

from mmjax.models import misa, mmim, self_mm

MODELS = {
  "misa": misa.make,
  "mmim": mmim.make,
  "self_mm": self_mm.make,
}
