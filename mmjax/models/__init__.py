"""The systems by name: `MODELS[name](**settings) -> System`."""

from mmjax.models import misa, mmim, mmin, self_mm

MODELS = {
  "misa": misa.make,
  "mmim": mmim.make,
  "mmin": mmin.make,
  "self_mm": self_mm.make,
}
