"""LoRC: weights rounded, and their error added back as a product of low rank; FORMAT/RANK/HOW, HOW of plain, weighted, gptq.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/lorc.py:int3:asym --out runs/lorc
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/lorc.py:int3:asym/32/plain --out runs/plain
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/lorc.py:int3:asym/8/gptq --out runs/lorc_gptq

plain: the nearest product, without calibration; weighted: that with the least error of the outputs; gptq: the same behind GPTQ,
not round to nearest. Interrupted, it goes on at its block.
Expected at 3 bits per channel: plain a small gain over rtn, weighted clearly more; next to nothing at 4 bits in groups of 64.
Not measured yet.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.gptq import Gptq
from sparsejax.methods.quant.lorc import Lorc
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.plugs import ConfigError, check_choice, parse_int


def get_recipe(arg: str = "") -> list[Pass]:
    text, _, rest = arg.partition("/")
    rank, _, how = rest.partition("/")
    text, how = text or "int3:asym", how or "weighted"
    check_choice("lorc: how", how, ("plain", "weighted", "gptq"))
    try:
        number = parse_int(rank or "8")
    except ValueError as error:
        raise ConfigError(f"lorc: rank = {rank!r}: expected a whole number") from error
    return [Lorc(Gptq(text) if how == "gptq" else Rtn(text), number, how != "plain")]
