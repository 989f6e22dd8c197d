"""CHESS: CATS with a threshold for each channel, by how large the up activation is there (He et al., 2024, arXiv 2409.01366).

"CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective Sparsification". Acts behind the gate's activation
a [.., F]; with `attention` also on the inputs of q and o (k and v, small and sensitive, stay dense). Dropping unit i costs
|a_i u_i| ||W_down[i]||; u is not computed yet, so its moment over calibration tokens stands for it, and the norm is left out:

    r_i = sqrt(E u_i^2)  (moment 2, the paper's code) or E|u_i|  (moment 1, the refactored code)
    tau = sparsity-quantile of |a_i| r_i over tokens and channels;   keep iff |a_i| > t_i = tau / r_i

`w_down` puts the norm back (r_i ||W_down[i]||): the score is then invariant to rescaling a unit. A channel whose u is always 0
gets the finite threshold of r = 1e-6 max(r).
Published: sparsity .5, C4 64 x 2048. Not here: averaging the thresholds of 16 groups of samples (one quantile over all).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from sparsejax import plugs
from sparsejax.compress.statistics import Quantiles
from sparsejax.compress.surgery import sites_of
from sparsejax.methods.sparsity.gate_threshold import GatePass
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import check_choice

DEAD = 1e-6  # of the largest r: what a smaller one counts as


@plugs.register("pass", "chess")
@dataclass
class Chess(GatePass):
    """Channel-wise thresholds.

    moment: 2 or 1, of u. w_down: multiply by the norms of the down map's rows. attention: thresholds at q and o too.
    """

    moment: int = 2
    w_down: bool = False
    attention: bool = False
    channels: ClassVar[bool] = True

    def check(self, config: ModelConfig) -> None:
        super().check(config)
        check_choice("moment", self.moment, (2, 1))
        for name in self.attention_sites():
            sites_of(config, "inputs", f"blocks.*.{name}")

    @property
    def reads_down(self) -> bool:
        return self.w_down

    def threshold(self, a: Float[np.ndarray, "N F"], u: Float[np.ndarray, "N F"], down: Any) -> np.ndarray:
        """tau / r, [F]."""
        r = np.sqrt(np.mean(np.square(u), axis=0, dtype=np.float64)) if self.moment == 2 else np.mean(np.abs(u), axis=0)
        if down is not None:
            r = r * np.linalg.norm(np.asarray(down, np.float64), axis=1)
        r = np.maximum(r, DEAD * r.max() or 1.0).astype(np.float32)
        return Quantiles(np.abs(a) * r[None])(self.sparsity) / r

    def attention_sites(self) -> tuple[str, ...]:
        return ("attn.q", "attn.o") if self.attention else ()
