"""QuaRot: Hadamard rotations, then weights and activations in 4 bits; `WEIGHTS/SOLVER/INPUTS/ROTATIONS`, each may be left out.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/quarot.py:int4/gptq --out runs/quarot
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/quarot.py:int4/rtn/int4/r1+r2 --out DIR

ROTATIONS are joined by `+`: r1 (residual stream), r2 (heads between v and o), r4 (online, in front of down); `none` for the
comparison without any. INPUTS `none` leaves activations as they are.
Expected (published, 7 billion parameters): W4A4 within .6 of the dense perplexity where plain rounding destroys the model; r4
matters most. Not measured here yet.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.inputs import rounding
from sparsejax.methods.quant.quarot import OnlineRotate, RotateValues
from sparsejax.methods.sparsity.rotate import Rotate
from sparsejax.plugs import check_choice

ROTATIONS = {"r1": Rotate("hadamard"), "r2": RotateValues(), "r4": OnlineRotate()}


def get_recipe(arg: str = "") -> list[Pass]:
    parts = arg.split("/")
    chosen = ("/".join(parts[3:]) or "r1+r2+r4").split("+")
    for name in chosen:
        check_choice("quarot: rotations", name, (*ROTATIONS, "none"))
    rotations: list[Pass] = [one for name, one in ROTATIONS.items() if name in chosen]
    return [*rotations, *rounding("/".join(parts[:3]))]
