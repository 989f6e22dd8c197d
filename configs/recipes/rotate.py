"""Another basis of the residual stream and nothing else: the model computes what it did.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/rotate.py:hadamard --out runs/hadamard

The argument is the basis, pca | wina | weights | hadamard | random, and other fields of `Rotate`: `pca,per=model`.
Expected: the dense perplexity; a control for every recipe that begins with a rotation.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.plugs import resolve


def get_recipe(arg: str = "") -> list[Pass]:
    return [resolve("pass", f"rotate:{arg}", "recipe")]
