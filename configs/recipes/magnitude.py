"""Magnitude pruning of every map; the argument is the share of zeros, or n:m, and optionally among which weights they compete.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/magnitude.py:0.5 --out DIR
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/magnitude.py:0.5,global --out DIR

Expected: at half the weights a model of no use (perplexity more than five times dense); the baseline of the other methods.
Measured (8 x 512 tokens of c4_sample:evaluation and stdlib:evaluation, dense 33.5 and 5.9): 408 and 201 at 0.5, 1768 and 2290
at 2:4.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.pruning.magnitude import Magnitude


def get_recipe(arg: str = "") -> list[Pass]:
    pattern, _, comparison = arg.partition(",")
    return [Magnitude(pattern or "0.5", comparison or "layer")]
