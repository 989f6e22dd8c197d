"""R-Sparse: important channels meet the weight, all others a low-rank copy of it, within one budget of bytes.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/rsparse.py:0.5 --out runs/rsparse
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/rsparse.py:0.5,rho=0.9 --out runs/rsparse
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/rsparse.py:0.5,search=true --out runs/rsparse

The argument is the sparsity, then other fields of `RSparse` by name. Of a model of 135M parameters every byte given to the
low-rank part costs more than it brings: rho = 1 < .95 < .9 << .5 in perplexity.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.plugs import resolve


def get_recipe(arg: str = "") -> list[Pass]:
    return [resolve("pass", f"rsparse:{arg}", "recipe")]
