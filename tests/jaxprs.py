"""What a traced program is made of."""

import jax


def equations(jaxpr):
  """All equations of a jaxpr, those inside of loops, calls and rules too."""
  for equation in jaxpr.eqns:
    yield equation
    inside = lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")  # noqa: E731
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=inside):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from equations(inner)


def named(jaxpr, name):
  """The equations of one primitive."""
  return [equation for equation in equations(jaxpr) if equation.primitive.name == name]
