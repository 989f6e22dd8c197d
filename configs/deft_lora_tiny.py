"""DEFT (arXiv 2402.01911) beside LoRA (arXiv 2106.09685): adapters alone are trained, and the density of the FFNs falls.

    python -m experiments.train --config configs/tiny_swiglu.py
    python -m experiments.train --config configs/relufied_tiny.py
    python -m experiments.train --config configs/deft_lora_tiny.py
    python -m experiments.train --config configs/deft_lora_tiny.py:0        without the density loss: compare with this
    python -m experiments.compress --model runs/deft_lora_tiny --recipe configs/recipes/merge_adapters.py --out runs/deft_merged

The argument is the weight of the density loss, 1 as published; epsilon is 1e-2 here, since the published 1e-7 has no gradient
but within .0003 of zero and small models are trained for few steps.
Hardware: 2 CPU cores, under 3 minutes. Size: 0.8 M parameters, 0.1 M of them trained.
Expected: the share of non-zeros 30 % or more below that of weight 0, at a loss less than 1 % above it.
Measured not at this size, but with 2 layers of 64, batches of 8 (0.11 M parameters, one seed):
43.5 % non-zeros at 1.895 +- .020 nats with weight 0, 31.9 % at 1.902 (+.4 %) with .3, 16.5 % at 1.945 (+2.6 %) with 1.
"""

from configs import tiny_relu2
from sparsejax.config import ExperimentConfig
from sparsejax.models.config import ModelConfig
from sparsejax.train.config import OptimizerConfig


def get_config(arg: str = "") -> ExperimentConfig:
    config = tiny_relu2.get_config()
    config.name = "deft_lora_tiny"
    config.init, config.steps = "runs/relufied_tiny", 200
    config.model = ModelConfig(weights=("blocks.**=lora:8",))
    config.optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=20, weight_decay=0.0, train=("adapter",))
    config.objectives = ("cross_entropy", f"deft:weight={arg or '1'},epsilon=1e-2")
    return config
