"""Q-BERT: more bits where the loss is curved, or where parts of the data do not agree on how much; argument as `hawq.py`.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/qbert.py:4.25bits --out runs/qbert
    python -m experiments.compress --model M --recipe configs/recipes/qbert.py:60MB/int4:asym,group=64/int8 --out DIR

The argument is BUDGET/FORMAT/... Ten power iterations for each group of maps are far more work than its 32 products: for small
models or accelerators. Interrupted, it goes on.
"""

from sparsejax.compress.bit_allocation import menu_of
from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.qbert import Qbert
from sparsejax.methods.quant.rtn import Rtn


def get_recipe(arg: str = "") -> list[Pass]:
    budget, *formats = arg.split("/")
    return [Rtn(Qbert(budget or "4.25bits", menu_of(formats)))]
