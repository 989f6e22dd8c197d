"""HAWQ: more bits to the maps where the loss is curved, under a budget; the argument is BUDGET/FORMAT/FORMAT/.../OPTION/...

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/hawq.py:4.25bits --out runs/hawq
    python -m experiments.compress --model M --recipe configs/recipes/hawq.py:60MB/int4:asym,group=64/int8/fisher/gptq --out DIR

The budget is mean bits per weight or megabytes of the quantized maps, scales and zeros included, or both (4.25bits,60MB); the
formats are the menu (default: 2, 3, 4 and 8 bits in groups of 64). Options: `trace` (HAWQ-V2, default), `fisher` (its trace
from sampled labels: a gradient for a product with the Hessian, never negative), `eigenvalue` (HAWQ), and `gptq` to round by
GPTQ instead of to nearest. The report has the plan by map, the frontier of bits and predicted loss, and each map's loss by
format. Interrupted, it goes on.
"""

from sparsejax.compress.bit_allocation import menu_of
from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.gptq import Gptq
from sparsejax.methods.quant.hawq import CURVATURES, Hawq
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.plugs import check


def get_recipe(arg: str = "") -> list[Pass]:
    budget, *parts = arg.split("/")
    options = [part for part in parts if part in (*CURVATURES, "gptq")]
    chosen = [option for option in options if option != "gptq"]
    check(len(chosen) <= 1, "hawq: options", chosen, "exclude each other; give one")
    curvature = chosen[0] if chosen else "trace"
    plan = Hawq(budget or "4.25bits", menu_of(part for part in parts if part not in options), curvature=curvature)
    return [Gptq(plan) if "gptq" in options else Rtn(plan)]
