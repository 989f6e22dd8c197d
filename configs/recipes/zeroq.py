"""ZeroQ: bits by what each map alone does to the predictions, on text that the model writes itself.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/zeroq.py:4.25bits --out runs/zeroq
    python -m experiments.compress --model M --recipe configs/recipes/zeroq.py:60MB/int4/int8/calibration --out DIR

The argument is BUDGET/FORMAT/... as in `hawq.py`, and `generated` (default: nothing is calibrated on) or `calibration`.
"""

from sparsejax.compress.bit_allocation import menu_of
from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.methods.quant.zeroq import DATA, Zeroq
from sparsejax.plugs import check


def get_recipe(arg: str = "") -> list[Pass]:
    budget, *parts = arg.split("/")
    chosen = [part for part in parts if part in DATA]
    check(len(chosen) <= 1, "zeroq: data", chosen, "exclude each other; give one")
    menu = menu_of(part for part in parts if part not in DATA)
    return [Rtn(Zeroq(budget or "4.25bits", menu, data=chosen[0] if chosen else "generated"))]
