"""OmniQuant's learned weight clipping: ranges of groups fitted block by block; the argument is the format, optionally /EPOCHS.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/omniquant.py:int3:asym,group=64 --out runs/lwc
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/omniquant.py:int2:asym,group=64/40 --out DIR

Published: 20 epochs over the calibration, 40 at 2 bits. Interrupted, it goes on at its block.
Expected: far below rounding to nearest at 3 and 2 bits; near GPTQ at 3, below it at 2. Not measured yet.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.omniquant import OmniQuant
from sparsejax.plugs import ConfigError, parse_int


def get_recipe(arg: str = "") -> list[Pass]:
    text, _, epochs = arg.partition("/")
    try:
        return [OmniQuant(text or "int3:asym,group=64", parse_int(epochs or "20"))]
    except ValueError as error:
        raise ConfigError(f"omniquant: epochs = {epochs!r}: expected a whole number") from error
