"""Refit: the weights of another recipe's model make up for what is dropped.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/refit.py:isocline:0.5 --out runs/refit
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/refit.py:teal:0.5,topk,uniform --out runs/topk

The argument is a recipe of this folder with its own argument. Nothing more is read per token.
"""

import runpy
from pathlib import Path

from sparsejax.compress.recipe import Pass
from sparsejax.methods.sparsity.refit import Refit
from sparsejax.plugs import check_choice

RECIPES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.py")) if path.stem != "refit"}


def get_recipe(arg: str = "") -> list[Pass]:
    name, _, argument = (arg or "isocline").partition(":")
    check_choice("refit: recipe", name, RECIPES)
    return [*runpy.run_path(str(RECIPES[name]))["get_recipe"](argument), Refit()]
