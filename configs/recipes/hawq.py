"""HAWQ: more bits to the maps where the loss is curved, under a budget; the argument is budget/menu/options.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/hawq.py:4.25bits --out runs/hawq
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/hawq.py:60MB/int4+int8/fisher,gptq --out DIR

The budget is mean bits per weight or megabytes of the quantized maps, scales and zeros included, or both (4.25bits+60MB); the
menu is formats joined by `+` (default: 2, 3, 4 and 8 bits in groups of 64). Options: `trace` (HAWQ-V2, default), `fisher` (its
trace from sampled labels: faster, never negative), `eigenvalue` (HAWQ), and `gptq` to round by GPTQ instead of to nearest.
The report has the plan by map, the frontier of bits and predicted loss, and each map's loss by format. Interrupted, it goes on.
"""

from sparsejax.compress.bit_allocation import parse_menu
from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.gptq import Gptq
from sparsejax.methods.quant.hawq import CURVATURES, Hawq
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.plugs import check_choice


def get_recipe(arg: str = "") -> list[Pass]:
    budget, menu, options = (*arg.split("/", 2), "", "", "")[:3]
    given = [option for option in options.split(",") if option]
    for option in given:
        check_choice("hawq: option", option, (*CURVATURES, "gptq", "rtn"))
    curvature = next((option for option in given if option in CURVATURES), "trace")
    plan = Hawq(budget or "4.25bits", parse_menu(menu), curvature=curvature)
    return [Gptq(plan) if "gptq" in given else Rtn(plan)]
