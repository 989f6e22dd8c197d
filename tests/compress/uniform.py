"""A small real pass, the same quantile of |x| at every site, and a byte-reading Llama in a folder for it."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sparsejax.compress.blocks import INPUTS, Blocks
from sparsejax.compress.recipe import ACTIVATIONS, Pass, check_sparsity
from sparsejax.compress.statistics import Quantiles
from sparsejax.compress.surgery import Placed, place, sites_of
from sparsejax.data.tokenizers import Bytes
from sparsejax.io import model_folder
from sparsejax.io.load import load
from tests.io import tiny_llama

RECIPE = """from tests.compress.uniform import Uniform


def get_recipe(arg=""):
    sparsity, _, sites = arg.partition("@")
    return [Uniform(float(sparsity or 0.5), sites or "blocks.*.{attn,mlp}.*")]
"""
LAYERS = 3


@dataclass
class Uniform(Pass):
    sparsity: float = 0.5
    sites: str = "blocks.*.{attn,mlp}.*"
    stage: ClassVar[str] = ACTIVATIONS
    computed: ClassVar[list[int]] = []
    dies_at: ClassVar[int] = -1

    def check(self, config):
        check_sparsity(self.sparsity)
        sites_of(config, "inputs", self.sites)

    def cost(self, config, tier):
        return f"{config.num_layers} block forwards"

    def apply(self, model, work):
        chosen = set(sites_of(model.config, "inputs", self.sites))
        if self.sparsity == 0:
            return model
        plan, blocks = {}, Blocks(model)
        h = blocks.embed(work.calibration.tokens)
        for layer in work.layers("quantiles", len(blocks)):
            found = work.piece(f"block-{layer}", lambda layer=layer, h=h: self._fit(blocks, layer, h))
            h = found.pop("h")
            placed = {f"blocks.{layer}.{site}": Placed("threshold", {"threshold": t}) for site, t in found.items()}
            plan.update({site: one for site, one in placed.items() if site in chosen})
        work.note("uniform", layers=len(blocks))
        return place(model, "inputs", plan)

    def _fit(self, blocks, layer, h):
        if layer == Uniform.dies_at:
            raise KeyboardInterrupt
        Uniform.computed.append(layer)
        h, tensors = blocks.tensors(layer, h, *INPUTS)
        thresholds = {tap: Quantiles(np.abs(np.asarray(tensors[tap])))(self.sparsity) for tap in INPUTS}
        return {"h": h, **{site: np.float32(thresholds[tap]) for tap, sites in INPUTS.items() for site in sites}}


def dense_model(folder):
    """The tiny Llama with a byte tokenizer, and room for 128 positions."""
    loaded = load(str(tiny_llama.write(folder, max_position_embeddings=128)))
    return dataclasses.replace(loaded, tokenizer=Bytes().build(None, 0, ()))


def write_dense(folder):
    """The same as a model folder, beside a recipe file; their paths."""
    model_folder.save(dense_model(folder / "published"), folder / "dense")
    (folder / "uniform.py").write_text(RECIPE)
    return folder / "dense", folder / "uniform.py"
