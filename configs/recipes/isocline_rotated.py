"""Isocline in the basis of principal components: fewer entries hold more, at the price of dense maps on the skip paths.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/isocline_rotated.py:0.65 --out runs/isocline

The argument is the model sparsity. La RoSA's basis under Isocline's thresholds (`isocline.py`): the better at equal sparsity
where much is dropped; at equal bytes per token its maps (15 % of SmolLM2) cost more than they bring.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.sparsity.rotate import Rotate
from sparsejax.plugs import resolve


def get_recipe(arg: str = "") -> list[Pass]:
    return [Rotate("pca"), resolve("pass", f"isocline:{arg}", "recipe")]
