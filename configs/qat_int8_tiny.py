"""`tiny_relu2` with int8 quantization-aware training of every linear map in the blocks, from a quarter of the steps on.

    python -m experiments.train --config configs/qat_int8_tiny.py

Hardware: 2 CPU cores, under 6 minutes. Size: 0.8 M parameters.
Expected: a loss within .02 nats of tiny_relu2's. Measured: 1.520 against 1.519, one seed.
"""

from configs import tiny_relu2
from sparsejax.config import ExperimentConfig
from sparsejax.plugs import check


def get_config(arg: str = "") -> ExperimentConfig:
    check(not arg, "qat_int8_tiny", arg, "takes no argument")
    config = tiny_relu2.get_config()
    config.name = "qat_int8_tiny"
    config.model.inputs = ("blocks.**=int8:start=100",)
    config.model.weights = ("blocks.**=int8:start=100",)
    return config
