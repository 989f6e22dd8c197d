"""Relufication (arXiv 2310.04564): `tiny_swiglu` goes on with ReLU in its gate; the argument is the stage, or `control`.

    python -m experiments.train --config configs/tiny_swiglu.py
    python -m experiments.train --config configs/relufied_tiny.py        stage 1: swiglu to reglu
    python -m experiments.train --config configs/relufied_tiny.py:2      stage 2: ReLU behind the norms too
    python -m experiments.train --config configs/relufied_tiny.py:control      the dense model on the same tokens

Hardware: 2 CPU cores, under 3 minutes. Size: 0.8 M parameters.
Expected: a loss close to the control's, a hidden vector mostly zero.
Measured not at this size, but with 2 layers of 64, batches of 8 (0.11 M parameters, one seed):
stage 1 56.6 % zeros at 1.923 +- .020 nats, the control 1.918, stage 2 2.033 with 50 % zeros, all from 2.020.
"""

from configs import tiny_relu2
from sparsejax.config import ExperimentConfig
from sparsejax.models.config import FFNConfig, ModelConfig
from sparsejax.plugs import check_choice
from sparsejax.train.config import OptimizerConfig


def get_config(arg: str = "") -> ExperimentConfig:
    check_choice("relufied_tiny", arg, ("", "1", "2", "control"))
    config = tiny_relu2.get_config()
    config.name = "relufied_tiny" + (f"_{arg}" if arg in ("2", "control") else "")
    config.init, config.steps = "runs/tiny_swiglu", 200
    config.optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=20, arguments="b2=0.98")
    config.model = ModelConfig(ffn=FFNConfig(activation="swiglu" if arg == "control" else "reglu"))
    if arg == "2":
        config.model.inputs = ("blocks.*.attn.{q,k,v}=relu", "blocks.*.mlp.{gate,up}=relu")
    return config
