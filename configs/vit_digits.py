"""A small ViT on scikit-learn's 8 x 8 digits.

    python -m experiments.train --config configs/vit_digits.py

Hardware: 2 CPU cores, about 2 minutes. Size: 0.2 M parameters.
Expected: held-out accuracy above 95 %. Measured: 95.5 +- 1.1 % of 359 images.
"""

from sparsejax.config import ExperimentConfig
from sparsejax.data.config import DataConfig
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig, NormConfig, PositionConfig, VisionConfig
from sparsejax.plugs import check
from sparsejax.train.config import EvaluateConfig, LogConfig, OptimizerConfig


def get_config(arg: str = "") -> ExperimentConfig:
    check(not arg, "vit_digits", arg, "takes no argument")
    return ExperimentConfig(
        name="vit_digits",
        steps=600,
        batch_size=64,
        model=ModelConfig(
            kind="vit",
            num_layers=4,
            d_model=64,
            num_classes=10,
            pool="class",
            norm=NormConfig(kind="layer", bias=True),
            attention=AttentionConfig(num_heads=4),
            ffn=FFNConfig(activation="relu2"),
            positions=PositionConfig(kind="learned"),
            vision=VisionConfig(image_size=8, channels=1, patch_size=2),
        ),
        data=DataConfig(source="digits", task="classification"),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=60, weight_decay=0.05),
        log=LogConfig(every=20, watch_every=100),
        evaluate=EvaluateConfig(batches=8),
    )
