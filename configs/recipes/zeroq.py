"""ZeroQ: bits by what each map alone does to the predictions, on text the model writes itself; argument budget/menu/data.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/zeroq.py:4.25bits --out runs/zeroq
    python -m experiments.compress --model M --recipe configs/recipes/zeroq.py:60MB/int4+int8/calibration --out DIR

Budget and menu as in `hawq.py`; data is `generated` (default: nothing is calibrated on) or `calibration`.
"""

from sparsejax.compress.bit_allocation import parse_menu
from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.methods.quant.zeroq import Zeroq


def get_recipe(arg: str = "") -> list[Pass]:
    budget, menu, data = (*arg.split("/", 2), "", "", "")[:3]
    return [Rtn(Zeroq(budget or "4.25bits", parse_menu(menu), data=data or "generated"))]
