"""ProAct's bounds at the inputs of the down maps, from calibration; the argument is the margin (1.2). Train them afterwards:

    python -m experiments.compress --model runs/relufied_tiny --recipe configs/recipes/bound_activations.py --out DIR
    python -m experiments.train --config CONFIG.py --config.init=DIR --config.optimizer.train=nonlinearity

Expected: the same perplexity, and an FFN that forgets what a flipped bit made huge.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.sparsity.proact import BoundActivations


def get_recipe(arg: str = "") -> list[Pass]:
    return [BoundActivations(float(arg or 1.2))]
