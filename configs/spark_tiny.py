"""Spark Transformer's FFN (arXiv 2506.06644): a quarter of a token's dimensions predicts which 8 % of the units are computed.

    python -m experiments.train --config configs/spark_tiny.py
    python -m experiments.train --config configs/spark_tiny.py:0.05

The argument is the share of units. Hardware: 2 CPU cores, under 5 minutes. Size: 0.8 M parameters.
Expected: about 92 % zeros at a loss close to tiny_relu2's, of equal size.
Measured not at this size, but with 2 layers of 64, batches of 8 (0.11 M parameters, one seed):
91.7 % zeros at 2.185 +- .020 nats against tiny_relu2's 2.177 with 58.5 %.
"""

from configs import tiny_relu2
from sparsejax.config import ExperimentConfig


def get_config(arg: str = "") -> ExperimentConfig:
    config = tiny_relu2.get_config()
    config.name = "spark_tiny"
    config.model.ffn.activation = "gelu_tanh"
    config.model.feed_pattern = (f"spark:{arg or '0.08'}",)
    return config
