"""CoreInfer: the prompt's tokens vote for the hidden units of the middle layers; the second half of each window is sparse.

python -m experiments.compress --model smollm2-135m --recipe configs/recipes/coreinfer.py:0.5 --out runs/coreinfer

The argument is the share of hidden units left out, and other fields of `CoreInfer` by name: 0.5,signed=true or 0.5,clusters=4
(similarity mode).
"""

from sparsejax.compress.recipe import Pass
from sparsejax.plugs import resolve


def get_recipe(arg: str = "") -> list[Pass]:
    return [resolve("pass", f"coreinfer:{arg}", "recipe")]
