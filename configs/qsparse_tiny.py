"""Q-Sparse (arXiv 2407.10969): half of every linear map's input kept by top-k, straight-through gradient, ReLU^2 GLU.

    python -m experiments.train --config configs/qsparse_tiny.py
    python -m experiments.train --config configs/qsparse_tiny.py:masked     no gradient where an input was dropped
    python -m experiments.train --config configs/qsparse_tiny.py:dense      all inputs kept: compare with this

Hardware: 2 CPU cores, under 6 minutes. Size: 0.8 M parameters.
Expected: a loss within 2 % of the dense one; the masked gradient's gap to it at least twice as large.
Measured not at this size, but with 2 layers of 64, batches of 8 (0.11 M parameters, four seeds): dense 2.201 nats, +.097 (+.053
to +.121), masked +.110 (+.097 to +.125): gaps of 4.4 and 5.0 %, a ratio of 1.1. Seed 0 alone gives 1.8.
"""

from configs import tiny_relu2
from sparsejax.config import ExperimentConfig
from sparsejax.plugs import check_choice


def get_config(arg: str = "") -> ExperimentConfig:
    check_choice("qsparse_tiny", arg, ("", "masked", "dense"))
    config = tiny_relu2.get_config()
    config.name = "qsparse_tiny" + (f"_{arg}" if arg else "")
    config.model.ffn.activation = "relu2glu"
    if arg != "dense":
        gradient = "masked" if arg == "masked" else "straight_through"
        config.model.inputs = (f"blocks.**=topk:0.5,gradient={gradient},rescale=true",)
    return config
