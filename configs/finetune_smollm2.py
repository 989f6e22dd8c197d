"""LoRA fine-tuning of a published model on Python's own library and documentation; `init` may name any decoder.

    python -m experiments.train --config configs/finetune_smollm2.py
    python -m experiments.train --config configs/finetune_smollm2.py --config.init=DIR --config.steps=1000
    python -m experiments.evaluate --model runs/finetune_smollm2

Hardware: 2 CPU cores, 4 GB, or one GPU. Size: 135 M parameters, 2.4 M of them trained.
Expected: a held-out loss below the published model's on the same text.
Measured: not measured.
"""

from sparsejax.config import ExperimentConfig
from sparsejax.data.config import DataConfig
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import check
from sparsejax.train.config import CheckpointConfig, EvaluateConfig, OptimizerConfig


def get_config(arg: str = "") -> ExperimentConfig:
    check(not arg, "finetune_smollm2", arg, "takes no argument")
    return ExperimentConfig(
        name="finetune_smollm2",
        init="smollm2-135m",
        steps=200,
        batch_size=4,
        model=ModelConfig(weights=("blocks.**=lora:rank=8,alpha=16",), remat="full"),
        data=DataConfig(sequence_length=256),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=10, weight_decay=0.0, train=("adapter",)),
        checkpoint=CheckpointConfig(every=50),
        evaluate=EvaluateConfig(every=100, batches=4),
    )
