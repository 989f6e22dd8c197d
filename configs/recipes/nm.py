"""n:m sparsity of every map by SparseGPT, stored by what is kept; the argument is n:m, or METHOD,n:m.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/nm.py:2:4 --out DIR
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/nm.py:wanda,2:4 --out DIR

METHOD: sparsegpt | wanda | magnitude | stored; `stored` packs what a training with `sr_ste` left.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.pruning.magnitude import Magnitude
from sparsejax.methods.pruning.pack_n_of_m import PackNofM
from sparsejax.methods.pruning.sparsegpt import SparseGPT
from sparsejax.methods.pruning.wanda import Wanda
from sparsejax.plugs import check_choice

METHODS = {"sparsegpt": SparseGPT, "wanda": Wanda, "magnitude": Magnitude}


def get_recipe(arg: str = "") -> list[Pass]:
    method, _, pattern = ("sparsegpt," + arg if "," not in arg else arg).partition(",")
    check_choice("method", method, (*METHODS, "stored"))
    pattern = pattern or "2:4"
    pruning = [METHODS[method](pattern)] if method in METHODS else []
    return [*pruning, PackNofM(pattern)]
