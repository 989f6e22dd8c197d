"""A 1 B parameter decoder (grouped-query attention, SwiGLU) with its state sharded over all devices of a pod slice.

    python -m experiments.train --config configs/lm_1b.py:tfds:c4/en

Hardware: 8 or more GPUs or TPU chips with 32 GB; one process per host, started alike (Slurm, TPU pod, or a coordinator).
Size: 1.0 B parameters. Expected: not measured yet.
"""

from configs import lm_30m
from sparsejax.config import ExperimentConfig
from sparsejax.models.config import AttentionConfig, FFNConfig
from sparsejax.parallel.config import MeshConfig


def get_config(arg: str = "") -> ExperimentConfig:
    config = lm_30m.get_config(arg)
    config.name = "lm_1b"
    config.steps, config.batch_size = 50_000, 512
    config.model.num_layers, config.model.d_model = 20, 2048
    config.model.attention = AttentionConfig(num_heads=16, num_kv_heads=8, qk_norm=True)
    config.model.ffn = FFNConfig(activation="swiglu")
    config.model.remat = "dots_no_batch"
    config.data.tokenizer, config.data.sequence_length = "bpe:50304", 2048
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 4e-4, 2000
    config.mesh = MeshConfig(data=1, fsdp=-1)
    config.checkpoint.on_nan, config.checkpoint.keep = "rollback", 3
    config.log.watch_every = 200
    return config
