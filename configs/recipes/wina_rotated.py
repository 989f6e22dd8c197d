"""WINA as released: the singular vectors of k and gate as bases, norms counted at k and gate, greedy allocation.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/wina_rotated.py:0.5 --out runs/wina_rotated

The argument is the model sparsity, then how it is shared between sites (`greedy`, `uniform`, ...). On a small model with
grouped queries the rotation hurts: `wina.py` is the score without it.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.sparsity.rotate import Rotate
from sparsejax.methods.sparsity.wina import Wina
from sparsejax.plugs import resolve


def get_recipe(arg: str = "") -> list[Pass]:
    sparsity, _, sharing = (arg or "0.5").partition(",")
    allocator = resolve("allocator", sharing or "greedy", "recipe")
    return [Rotate("wina"), Wina(float(sparsity), weights="released", allocator=allocator)]
