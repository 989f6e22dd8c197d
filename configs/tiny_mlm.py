"""A bidirectional encoder on masked language modelling (BERT's blocks: LayerNorm after the add, learned positions, GELU).

    python -m experiments.train --config configs/tiny_mlm.py

Hardware: 2 CPU cores, under 5 minutes. Size: 0.8 M parameters.
Expected: the loss falls well below that of guessing by frequency, and still falls at the end.
Measured: 2.7630 +- .0221 nats at the masked bytes of 512 held-out rows, accuracy .346, one seed.
"""

from sparsejax.config import ExperimentConfig
from sparsejax.data.config import DataConfig
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig, NormConfig, PositionConfig
from sparsejax.plugs import check
from sparsejax.train.config import LogConfig, OptimizerConfig


def get_config(arg: str = "") -> ExperimentConfig:
    check(not arg, "tiny_mlm", arg, "takes no argument")
    return ExperimentConfig(
        name="tiny_mlm",
        steps=400,
        batch_size=32,
        model=ModelConfig(
            kind="encoder",
            num_layers=4,
            d_model=128,
            block="post",
            norm=NormConfig(kind="layer", bias=True),
            attention=AttentionConfig(num_heads=4, bias=True, out_bias=True),
            ffn=FFNConfig(activation="gelu", bias=True),
            positions=PositionConfig(kind="learned"),
        ),
        data=DataConfig(task="masked_lm", sequence_length=128),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=80),
        log=LogConfig(every=10, watch_every=50),
    )
