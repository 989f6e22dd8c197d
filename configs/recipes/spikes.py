"""Spike-aware mixed precision, W8A8 with static scales but at maps whose inputs spike; the argument is RATIO or RATIO/float.

    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/spikes.py:10 --out runs/spikes
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/spikes.py:10/float --out runs/spikes_float
    python -m experiments.compress --model smollm2-135m --recipe configs/recipes/spikes.py:inf --out runs/static_int8

A map spikes where its largest input is over RATIO times the median of its kind over the layers. It becomes FP8, or stays float.
`inf` is int8 everywhere, for comparison; the report lists the maps that spike. Not measured yet.
"""

from sparsejax.compress.recipe import Pass
from sparsejax.methods.quant.spikes import SpikeAware
from sparsejax.plugs import ConfigError


def get_recipe(arg: str = "") -> list[Pass]:
    ratio, _, spiking = arg.partition("/")
    try:
        return [SpikeAware(float(ratio or "10"), spiking or "fp8_e4m3")]
    except ValueError as error:
        raise ConfigError(f"spikes: ratio = {ratio!r}: expected a number of at least 1, or inf") from error
