"""LLM-FP4: 4-bit floats for weights and inputs, formats and ranges searched map by map; the argument is WEIGHTS/INPUTS in bits.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/llm_fp4.py:4/4 --out runs/fp4
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/llm_fp4.py:4/4/plain --out runs/fp4_plain
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/llm_fp4.py:4/16 --out runs/fp4_weights

Bits are 4, 6 or 8, of inputs also 16, which stay as they are. `plain` leaves out the exponent biases by channel, to compare.
Maps of one kind may end in other formats from layer to layer, and are then no longer scanned as one stack. Interrupted, it
goes on at its block. Expected: biases by channel far better than plain, where channels of the inputs differ. Not measured yet.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.llm_fp4 import LlmFp4
from sparsejax.plugs import ConfigError, check_choice, parse_int


def get_recipe(arg: str = "") -> list[Pass]:
    bits, _, rest = arg.partition("/")
    input_bits, _, how = rest.partition("/")
    check_choice("llm_fp4: exponent biases", how or "shifted", ("shifted", "plain"))
    try:
        return [LlmFp4(parse_int(bits or "4"), parse_int(input_bits or "4"), how != "plain")]
    except ValueError as error:
        raise ConfigError(f"llm_fp4: {arg!r}: expected bits as WEIGHTS/INPUTS, e.g. 4/4") from error
