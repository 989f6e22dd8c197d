"""SCAP: entries of the FFN's inputs that lie near the mode of their tensor are replaced by it.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/scap.py:0.5 --out runs/scap

The argument is the share of entries at each input, and other fields of `Scap` by name: `0.5,sites=blocks.*.mlp.down`.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.plugs import resolve


def get_recipe(arg: str = "") -> list[Pass]:
    return [resolve("pass", f"scap:{arg}", "recipe")]
