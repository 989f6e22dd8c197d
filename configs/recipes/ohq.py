"""OHQ: bits under a budget of time that was measured on this device; argument BUDGET/FORMAT/...@TABLE.

    python -m experiments.bench formats --model smollm2-135m --rounds 20 --json results/bench_formats.json
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/ohq.py:9ms --out runs/ohq
    python -m experiments.compress --model M --recipe configs/recipes/ohq.py:9ms,4.25bits/int4/int8@TABLE.json --out DIR

Milliseconds are the sum over the maps of one product each, as the table has them (default: results/bench_formats.json), of one
row unless it was measured with more. Other budgets and the menu of formats as in `hawq.py`; their times must be in the table.
"""

from sparsejax.compress.bit_allocation import menu_of
from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.ohq import Ohq
from sparsejax.methods.quant.rtn import Rtn


def get_recipe(arg: str = "") -> list[Pass]:
    allowed, _, table = arg.partition("@")
    budget, *formats = allowed.split("/")
    return [Rtn(Ohq(budget or Ohq.budget, menu_of(formats), table=table or Ohq.table))]
