"""La RoSA: principal components as the basis of the residual stream, then the k largest entries of every input.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/larosa.py:0.5 --out runs/larosa
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/larosa.py:0.5,uniform --out runs/uniform

The argument is the model sparsity, then how it is shared: `ratio` (.8 and 1.2, scaled to meet it), `uniform`, or `released`
(those ratios as they are, and one basis per layer as in the authors' code).
"""

from sparsejax.compress.allocators import FixedRatio, Uniform
from sparsejax.compress.recipe import Pass
from sparsejax.methods.sparsity.larosa import AsPublished, LaRosa
from sparsejax.methods.sparsity.rotate import Rotate
from sparsejax.plugs import check_choice

SHARING = {"ratio": FixedRatio(), "uniform": Uniform(), "released": AsPublished()}


def get_recipe(arg: str = "") -> list[Pass]:
    sparsity, _, sharing = (arg or "0.5").partition(",")
    check_choice("larosa", sharing or "ratio", SHARING)
    rotate = Rotate("pca", per="layer" if sharing == "released" else "segment")
    return [rotate, LaRosa(float(sparsity), allocator=SHARING[sharing or "ratio"])]
