"""Top-k of magnitudes: exactly k entries of each token at the input of every linear map, the same share everywhere.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/topk.py:0.5 --out runs/topk
    python -m experiments.compress --model runs/tiny_swiglu --recipe 'configs/recipes/topk.py:0.8,blocks.*.mlp.down' --out DIR

The argument is the sparsity, and where: every map unless said, so that it is the model's. TEAL's score with a static number of
entries and nothing fitted: the baseline for bases, scores and allocators.
"""

from sparsejax.compress.allocators import Uniform
from sparsejax.compress.recipe import Pass
from sparsejax.methods.sparsity.teal import Teal


def get_recipe(arg: str = "") -> list[Pass]:
    sparsity, _, sites = arg.partition(",")
    where = {"sites": sites} if sites else {}
    return [Teal(float(sparsity or 0.5), "topk", Uniform(), **where)]
