"""PTQ1.61: a fifth of the inputs in 4 bits, signs of all others, scales learned block by block; the argument is SALIENT/EPOCHS.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/ptq161.py:0.2 --out runs/ptq161
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/ptq161.py:0.4/5 --out runs/ptq_24

SALIENT is the share of inputs in 4 bits. Interrupted, it goes on at its block.
Expected: a model of 135M parameters collapses at 1.6 bits; more salient inputs help. Not measured yet.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.ptq161 import Ptq161
from sparsejax.plugs import ConfigError, parse_int


def get_recipe(arg: str = "") -> list[Pass]:
    salient, _, epochs = arg.partition("/")
    try:
        return [Ptq161(float(salient or "0.2"), parse_int(epochs or "20"))]
    except ValueError as error:
        raise ConfigError(f"ptq161: {arg!r}: expected SALIENT/EPOCHS, e.g. 0.2/20") from error
