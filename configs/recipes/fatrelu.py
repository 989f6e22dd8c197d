"""FATReLU: the threshold of a ReLU model raised after training, ProSparse's last step; the argument is the threshold (.01).

    python -m experiments.compress --model runs/prosparse_tiny --recipe configs/recipes/fatrelu.py:0.01 --out DIR

Expected: a point or so more zeros, the same perplexity.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.sparsity.fatrelu import FatRelu


def get_recipe(arg: str = "") -> list[Pass]:
    return [FatRelu(float(arg or 0.01))]
