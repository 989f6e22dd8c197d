"""LLM.int8(): W8A8 with outlying channels of the activations left as floats; the argument is the threshold.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/llm_int8.py:6.0 --out runs/llm-int8
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/smoothquant.py:off --out runs/w8a8

The second is the same without outliers, for comparison. Expected: within 1 % of dense in perplexity. Not measured yet.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.llm_int8 import LlmInt8
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.plugs import ConfigError


def get_recipe(arg: str = "") -> list[Pass]:
    try:
        return [Rtn("int8"), LlmInt8(float(arg or "6"))]
    except ValueError as error:
        raise ConfigError(f"llm_int8: threshold = {arg!r}: expected a number") from error
