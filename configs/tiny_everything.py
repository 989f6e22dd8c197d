"""Every plug point in one model: trained top-k, int8 quantization-aware training, experts, scheduled L1 on the hidden vector.

    python -m experiments.train --config configs/tiny_everything.py

Hardware: 2 CPU cores, under 6 minutes; any mesh, e.g. --config.mesh.fsdp=2 --config.mesh.expert=2 on 4 devices or more.
Size: 1.1 M parameters, 0.8 M active.
Expected: trains, shards and resumes to the same bits.
Measured: 1.5126 +- .0186 nats (2.182 bits per byte), 76.1 % zeros, against tiny_relu2's 1.5194 and 68.7 %, one seed.
"""

from configs import moe_tiny
from sparsejax.config import ExperimentConfig
from sparsejax.plugs import check


def get_config(arg: str = "") -> ExperimentConfig:
    check(not arg, "tiny_everything", arg, "takes no argument")
    config = moe_tiny.get_config()
    config.name = "tiny_everything"
    config.model.feed_pattern = ("ffn", "moe:experts=4,k=2,hidden=256,balance=sequence")
    config.model.inputs = ("blocks.*.mlp.{down,experts.down}=topk:0.25|int8:start=100", "blocks.**=int8:start=100")
    config.model.weights = ("blocks.**=int8:start=100",)
    config.objectives = (*config.objectives, "l1:weights=0/1e-6/1e-5,ends=50/100/300")
    return config
