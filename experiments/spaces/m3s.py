"""The rates of M³S around any system: the outer one, the inner one, and the inner steps.

python -m experiments.tune --config=misa:mosi --data_dir=data --out=runs/tune \\
    --space=experiments/spaces/m3s.py --trials=50
"""

from optuna.distributions import FloatDistribution, IntDistribution

SPACE = {
  "optimizer.learning_rate": FloatDistribution(1e-5, 1e-2, log=True),
  "method.optimizer.learning_rate": FloatDistribution(1e-5, 1e-2, log=True),
  "method.inner_steps": IntDistribution(1, 5),
}
