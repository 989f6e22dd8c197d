"""CHESS: CATS with channel-wise thresholds.

python -m experiments.compress --model smollm2-135m --recipe configs/recipes/chess.py:0.5 --out runs/chess

The argument is the share of hidden units left out, and other fields of `Chess` by name: 0.5,attention=true or 0.5,moment=1.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.plugs import resolve


def get_recipe(arg: str = "") -> list[Pass]:
    return [resolve("pass", f"chess:{arg}", "recipe")]
