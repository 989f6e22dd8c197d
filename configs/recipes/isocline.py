"""Isocline, a method of this project: WINA's score, TEAL's thresholds, and every site at the same slope of the model's loss.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/isocline.py:0.5 --out runs/isocline

The argument is the model sparsity. Entries of the input of every linear map are dropped where |x_j| ||W[j, :]|| is below the
map's threshold, so that hard tokens keep more; the thresholds are those at which one more dropped parameter costs the same
KL from the dense model everywhere (`compress.marginal_loss`). No basis is changed and no factor added: nothing more is read.
"""

from sparsejax.compress.marginal_loss import MarginalLoss
from sparsejax.compress.recipe import Pass
from sparsejax.methods.sparsity.wina import Wina


def get_recipe(arg: str = "") -> list[Pass]:
    return [Wina(float(arg or "0.5"), select="threshold", allocator=MarginalLoss())]
