"""ProSparse (arXiv 2402.13516) end to end: a relufied start, L1 that rises in sine steps, a raised threshold after training.

    python -m experiments.train --config configs/tiny_swiglu.py
    python -m experiments.train --config configs/relufied_tiny.py
    python -m experiments.train --config configs/prosparse_tiny.py
    python -m experiments.train --config configs/prosparse_tiny.py:control      ReLU alone on the same tokens: compare with this
    python -m experiments.compress --model runs/prosparse_tiny --recipe configs/recipes/fatrelu.py:0.01 --out runs/prosparse_fat

The argument is the last peak of lambda (.002), or `control`.
Hardware: 2 CPU cores, under 4 minutes. Size: 0.8 M parameters.
Expected: at least 80 % zeros at a loss within 2 % of the control's.
Measured: not measured at this size.
"""

from configs import tiny_relu2
from sparsejax.config import ExperimentConfig
from sparsejax.models.config import ModelConfig
from sparsejax.train.config import OptimizerConfig

ENDS = (20, 50, 130, 160, 240, 300)
SHARES = (0, 0.05, 0.4, 0.4, 1, 1)  # of the last peak: ramps and holds in turn, as published


def get_config(arg: str = "") -> ExperimentConfig:
    config = tiny_relu2.get_config()
    config.name = "prosparse_tiny" + ("_control" if arg == "control" else "")
    config.init, config.steps = "runs/relufied_tiny", ENDS[-1]
    config.optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=20, arguments="b2=0.98")
    config.model = ModelConfig()
    if arg != "control":
        peaks = "/".join(f"{share * float(arg or 0.002):g}" for share in SHARES)
        config.objectives = ("cross_entropy", f"l1:weights={peaks},ends={'/'.join(map(str, ENDS))}")
    return config
