"""Inter-layer Hessian: as many maps as possible in the low of two formats while the loss rises by no more than this.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/interlayer.py:0.05 --out runs/interlayer
    python -m experiments.compress --model M --recipe configs/recipes/interlayer.py:0.1/int2:asym,group=64/int8 --out DIR

The argument is the rise of the mean loss in nats, on calibration text, then /LOW/HIGH (default int3 and int8 in groups of 64).
A product with the Hessian for each group of maps, then about nine evaluations. Interrupted, it goes on.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.interlayer import Interlayer
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.plugs import ConfigError


def get_recipe(arg: str = "") -> list[Pass]:
    rise, low, high = (*arg.split("/", 2), "", "")[:3]
    try:
        number = float(rise or 0.1)
    except ValueError as error:
        raise ConfigError(f"interlayer: rise = {rise!r}: expected a number of nats, such as 0.05") from error
    return [Rtn(Interlayer(number, low or Interlayer.low, high or Interlayer.high))]
