"""Weights pruned by the share that they contribute to their output; the argument is the share of zeros, or n:m, and how they
compete: output | layer | global.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/relative_importance.py:0.5 --out DIR
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/relative_importance.py:0.5,global --out DIR
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.pruning.relative_importance import RelativeImportance


def get_recipe(arg: str = "") -> list[Pass]:
    pattern, _, comparison = arg.partition(",")
    return [RelativeImportance(pattern or "0.5", comparison or "output")]
