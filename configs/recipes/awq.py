"""AWQ: salient channels scaled up and weights clipped, then rounded; the argument is the format, and optionally the rounding.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/awq.py:int4:asym,group=64 --out runs/awq
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/awq.py:int4:asym,group=64/gptq --out DIR

`/gptq` rounds what was scaled and clipped by GPTQ, in order static, not to nearest. Interrupted, it goes on at its block.
Expected: below round to nearest in perplexity; before GPTQ at least as good as either alone. Not measured yet.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.awq import Awq
from sparsejax.methods.quant.gptq import Gptq
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.plugs import check_choice


def get_recipe(arg: str = "") -> list[Pass]:
    text, _, rounding = arg.partition("/")
    text = text or "int4:asym,group=64"
    check_choice("awq: rounding", rounding or "rtn", ("rtn", "gptq"))
    return [Awq(text), Gptq(text, "static") if rounding == "gptq" else Rtn(text)]
