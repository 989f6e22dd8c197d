"""TEAL: entries of small magnitude are dropped at the input of every linear map.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/teal.py:0.4 --out runs/teal
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/teal.py:0.5,topk,uniform --out runs/topk

The argument is the model sparsity, then by what entries are selected, `threshold` or `topk`, then how the sparsity is shared
between sites: `greedy` (per block, as published; `greedy:step=0.025`), `uniform`, `fixed_ratio`, or `equal_marginal` (over the
whole model, from error curves).
Expect about 6 % more perplexity at 25 %, and about twice the dense perplexity at 50 %, of a model of 135M parameters.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.sparsity.teal import Teal
from sparsejax.plugs import resolve


def get_recipe(arg: str = "") -> list[Pass]:
    sparsity, select, sharing = (*arg.split(",", 2), "", "", "")[:3]
    return [Teal(float(sparsity or 0.5), select or "threshold", resolve("allocator", sharing or "greedy", "teal: sharing"))]
