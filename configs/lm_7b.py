"""A 7 B parameter decoder of Llama's shape (untied head, SwiGLU) with fully sharded state.

    python -m experiments.train --config configs/lm_7b.py:tfds:c4/en

Hardware: 64 or more GPUs with 80 GB or TPU chips with 95 GB; add --config.mesh.tensor=4 where a chip holds less.
Size: 6.8 B parameters. Expected: not measured yet.
"""

from configs import lm_1b
from sparsejax.config import ExperimentConfig
from sparsejax.models.config import AttentionConfig


def get_config(arg: str = "") -> ExperimentConfig:
    config = lm_1b.get_config(arg)
    config.name = "lm_7b"
    config.steps, config.batch_size = 250_000, 1024
    config.model.num_layers, config.model.d_model = 32, 4096
    config.model.attention = AttentionConfig(num_heads=32, qk_norm=True)
    config.model.tied_embeddings = False
    config.model.remat = "full"
    config.data.sequence_length = 4096
    config.optimizer.learning_rate = 3e-4
    return config
