"""A 125 M parameter decoder of GPT-2 small's shape with squared ReLU; the argument is a data source.

    python -m experiments.train --config configs/lm_125m.py:text:corpus.txt

Hardware: one GPU with 24 GB or more. Size: 124 M parameters.
Expected: not measured yet.
"""

from configs import lm_30m
from sparsejax.config import ExperimentConfig


def get_config(arg: str = "") -> ExperimentConfig:
    config = lm_30m.get_config(arg)
    config.name = "lm_125m"
    config.steps, config.batch_size = 20_000, 256
    config.accumulate = 4
    config.model.num_layers, config.model.d_model, config.model.attention.num_heads = 12, 768, 12
    config.data.tokenizer = "bpe:50304"
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 8e-4, 1000
    return config
