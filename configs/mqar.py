"""Multi-query associative recall (Zoology, arXiv 2312.04927): a two-layer decoder learns to look up values by key.

    python -m experiments.train --config configs/mqar.py

Hardware: 2 CPU cores, under 5 minutes. Size: 0.1 M parameters.
Expected: attention solves it (accuracy on the queried positions above 95 %); not measured at full length yet.
"""

from sparsejax.config import ExperimentConfig
from sparsejax.data.config import DataConfig
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig
from sparsejax.plugs import check
from sparsejax.train.config import LogConfig, OptimizerConfig


def get_config(arg: str = "") -> ExperimentConfig:
    check(not arg, "mqar", arg, "takes no argument")
    return ExperimentConfig(
        name="mqar",
        steps=2000,
        batch_size=64,
        model=ModelConfig(num_layers=2, d_model=64, attention=AttentionConfig(num_heads=2), ffn=FFNConfig(activation="relu2")),
        data=DataConfig(source="mqar:pairs=4,symbols=128", sequence_length=64, packing=False),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
        log=LogConfig(every=50, watch_every=500),
    )
