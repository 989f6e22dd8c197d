"""What a rule calls a kernel that is stored in a format of its own: it keeps layers of different formats apart.

Layers with the same rules are scanned as one stack, whose arrays must agree in format. `blocks.3.mlp.down=stored:int8` gives
layer 3 a stack of its own; the kernel is multiplied as it lies.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from sparsejax.context import Context
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import register


@register("weight_op", "stored")
@dataclasses.dataclass(frozen=True)
class Stored:
    """format: of the QTensor at this site."""

    format: str
    takes_path: ClassVar[bool] = True  # the whole argument is the format, commas and all

    def __post_init__(self) -> None:
        FormatSpec.parse(self.format, "stored")

    def __call__(self, w: Any, ctx: Context) -> Any:
        return w
