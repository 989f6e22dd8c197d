"""LoRA and DoRA adapters folded into the weights they act on, before an export or another recipe.

    python -m experiments.compress --model runs/finetune_smollm2 --recipe configs/recipes/merge_adapters.py --out DIR

Expected: the same perplexity to rounding, and no adapter left to read.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.peft.merge import MergeAdapters
from sparsejax.plugs import check


def get_recipe(arg: str = "") -> list[Pass]:
    check(not arg, "merge_adapters", arg, "takes no argument")
    return [MergeAdapters()]
