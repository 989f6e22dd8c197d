"""The shape at which the training benchmark meets a hand-written trainer: width 256, 6 layers, 8 x 256 bytes, float32.

    python -m experiments.bench train --config configs/bench_floor.py

Hardware: 2 CPU cores, 4 minutes. Size: 4.8 M parameters.
Expected: faster than the hand-written floor of the same shape in the same run; measured in results/.
"""

from sparsejax.config import ExperimentConfig
from sparsejax.data.config import DataConfig
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig
from sparsejax.plugs import check
from sparsejax.train.config import LogConfig, OptimizerConfig


def get_config(arg: str = "") -> ExperimentConfig:
    check(not arg, "bench_floor", arg, "takes no argument")
    return ExperimentConfig(
        name="bench_floor",
        steps=100,
        batch_size=8,
        model=ModelConfig(
            num_layers=6,
            d_model=256,
            attention=AttentionConfig(num_heads=8),
            ffn=FFNConfig(hidden=1024, activation="gelu_tanh"),
        ),
        data=DataConfig(sequence_length=256),
        optimizer=OptimizerConfig(schedule="constant"),
        log=LogConfig(watch_every=20),
    )
