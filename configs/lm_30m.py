"""A 30 M parameter decoder with squared ReLU; the argument is a data source, by default Python's own text.

    python -m experiments.train --config configs/lm_30m.py
    python -m experiments.train --config configs/lm_30m.py:text:corpus.txt

Hardware: one GPU, about 15 minutes. Size: 29 M parameters.
Expected: not measured yet.
"""

from sparsejax.config import ExperimentConfig
from sparsejax.data.config import DataConfig
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig
from sparsejax.train.config import CheckpointConfig, EvaluateConfig, LogConfig, OptimizerConfig


def get_config(arg: str = "") -> ExperimentConfig:
    return ExperimentConfig(
        name="lm_30m",
        steps=5000,
        batch_size=64,
        objectives=("cross_entropy", "z_loss:1e-4"),
        model=ModelConfig(
            num_layers=8,
            d_model=512,
            dtype="bfloat16",
            attention=AttentionConfig(num_heads=8, qk_norm=True),
            ffn=FFNConfig(activation="relu2"),
        ),
        data=DataConfig(source=arg or "stdlib", tokenizer="bpe:8192", sequence_length=1024),
        optimizer=OptimizerConfig(
            learning_rate=1.5e-3, schedule="wsd", warmup_steps=250, final_fraction=0.0, weight_decay=0.1, arguments="b2=0.95"
        ),
        checkpoint=CheckpointConfig(every=1000),
        log=LogConfig(every=20, watch_every=100),
        evaluate=EvaluateConfig(every=1000, batches=32, sample_tokens=200),
    )
