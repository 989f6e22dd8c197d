"""Formats by map, chosen by hand: each map gets that of the first glob that names it; the argument is GLOB=FORMAT/...

    python -m experiments.compress --model smollm2-135m --out runs/mixed \
        --recipe "configs/recipes/mixed.py:blocks.*.mlp.down=int8/**=int4:asym,group=64"
    python -m experiments.compress --model M --out DIR --recipe "configs/recipes/mixed.py:blocks.0.**=int8/**=int3/gptq"

A last `/gptq` rounds by GPTQ instead of to nearest. What a budget and the loss would choose is `hawq.py`.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.gptq import Gptq
from sparsejax.methods.quant.rtn import Rtn
from sparsejax.plugs import check


def get_recipe(arg: str = "") -> list[Pass]:
    text = arg or "blocks.*.mlp.down=int8/**=int4:asym,group=64"
    parts = text.removesuffix("/gptq").split("/")
    pairs = [part.partition("=")[::2] for part in parts]
    for part, (glob, name) in zip(parts, pairs, strict=True):
        check(glob and name, "mixed: part", part, "expected GLOB=FORMAT, such as blocks.*.mlp.down=int8")
    twice = len(pairs) - len(dict(pairs))
    check(not twice, "mixed: globs", [glob for glob, _ in pairs], "are not all different")
    return [Gptq(dict(pairs)) if text.endswith("/gptq") else Rtn(dict(pairs))]
