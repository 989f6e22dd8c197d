"""Wanda on every map; the argument is the share of zeros, or n:m.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/wanda.py:0.5 --out DIR
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/wanda.py:2:4 --out DIR

Measured, fitted to 16 x 512 tokens of stdlib:calibration (8 x 512 tokens of c4_sample:evaluation and stdlib:evaluation, dense
33.5 and 5.9): 77.2 and 11.7 at 0.5, 242 and 33.5 at 2:4.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.pruning.wanda import Wanda


def get_recipe(arg: str = "") -> list[Pass]:
    return [Wanda(arg or "0.5")]
