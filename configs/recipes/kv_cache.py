"""The key-value cache in few bits; the argument is int2, int3, int4 or int8, or a number format.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/kv_cache.py:int8 --out runs/kv8
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/kv_cache.py:int4:token --out runs/kv4-symmetric

`int4` alone is asymmetric with a scale and a minimum per token and head (4.5 bits per number of a head of 64). Loss is measured
through the rounded keys and values. Expected: int8 as good as dense, int4 nearly. Not measured yet.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.kv_cache import FORMATS, KvCache


def get_recipe(arg: str = "") -> list[Pass]:
    short = {f"int{bits}": text for bits, text in FORMATS.items()}
    return [KvCache(short.get(arg or "int4", arg))]
