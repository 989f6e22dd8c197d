"""WINA's score without its rotation: top-k of |x_j| times the norm of the weights that x_j meets, at every linear map.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/wina.py:0.5 --out runs/wina
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/wina.py:0.5,uniform --out runs/wina_uniform

The argument is the model sparsity, then how it is shared between sites (`greedy`, `uniform`, `sensitivity`).
`wina_rotated.py` is the paper's method with its rotation.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.sparsity.wina import Wina
from sparsejax.plugs import resolve


def get_recipe(arg: str = "") -> list[Pass]:
    sparsity, _, sharing = (arg or "0.5").partition(",")
    return [Wina(float(sparsity), allocator=resolve("allocator", sharing or "greedy", "wina: sharing"))]
