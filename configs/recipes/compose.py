"""Several recipes as one, in order; the argument joins them by `+`.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/compose.py:rtn:int8+teal:0.5 --out runs/both
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/compose.py:gptq:int4+isocline:0.5 --out DIR

Each part is a recipe of this folder with its own argument; a `+` that belongs to an argument cannot be passed on. What one part
would spoil of another (a rotation behind thresholds, say) is refused before any work.
"""

import runpy
from pathlib import Path

from sparsejax.compress.recipe import Pass
from sparsejax.plugs import check, check_choice

RECIPES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.py")) if path.stem != "compose"}


def get_recipe(arg: str = "") -> list[Pass]:
    check(arg, "compose: recipes", arg, "expected recipes joined by +, e.g. rtn:int8+teal:0.5")
    passes: list[Pass] = []
    for part in arg.split("+"):
        name, _, argument = part.strip().partition(":")
        check_choice("compose: recipe", name, RECIPES)
        passes += runpy.run_path(str(RECIPES[name]))["get_recipe"](argument)
    return passes
