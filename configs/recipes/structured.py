"""FFN neurons cut out by what they answer; the argument is their share, or an aim that is cut towards.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/structured.py:0.3 --out DIR
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/structured.py:loss:0.1 --out DIR
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/structured.py:parameters:0.9 --out DIR
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/structured.py:0.3,random --out DIR

Measured at 0.3, fitted to 16 x 512 tokens of stdlib:calibration (8 x 512 tokens of c4_sample:evaluation and stdlib:evaluation,
dense 33.5 and 5.9): 91.4 and 8.6, and 1120 and 466 with neurons drawn at random.
`loss:X`: as many as cost at most X nats on the calibration tokens; `parameters:X`: as many as leave that share of them.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.pruning.structured import Structured
from sparsejax.plugs import ConfigError


def get_recipe(arg: str = "") -> list[Pass]:
    aim, _, importance = arg.partition(",")
    importance = importance or "activation"
    if ":" in aim:
        return [Structured(until=aim, importance=importance)]
    try:
        share = float(aim or "0.3")
    except ValueError as error:
        raise ConfigError(f"structured: {aim!r}: expected a share, 'loss:NATS' or 'parameters:SHARE'") from error
    return [Structured(neurons=share, importance=importance)]
