"""A 350 M parameter decoder with squared ReLU on one GPU: bf16 compute, recomputed activations, statistics on.

    python -m experiments.train --config configs/lm_350m.py:text:corpus.txt

Hardware: one GPU with 80 GB (less with a smaller microbatch: raise --config.accumulate). Size: 354 M parameters.
Expected: at least 40 % MFU on an H100, and a loss within .01 nats of float32's after 500 steps; not measured yet.
"""

from configs import lm_30m
from sparsejax.config import ExperimentConfig


def get_config(arg: str = "") -> ExperimentConfig:
    config = lm_30m.get_config(arg)
    config.name = "lm_350m"
    config.steps, config.batch_size = 20_000, 256
    config.accumulate = 8
    config.model.num_layers, config.model.d_model, config.model.attention.num_heads = 24, 1024, 16
    config.model.remat = "dots_no_batch"
    config.data.tokenizer = "bpe:50304"
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 5e-4, 1000
    config.log.watch_every = 20
    return config
