"""What every file format of weights looks like from here: named tensors, read one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np


class TensorInfo(NamedTuple):
    """Shape (row-major) and dtype of a tensor as `read` returns it."""

    shape: tuple[int, ...]
    dtype: np.dtype


class TensorSource(Protocol):
    """Named tensors of a file or folder that was checked when it was opened; nothing is in memory until it is read."""

    @property
    def path(self) -> Path:
        """For messages."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> np.ndarray:
        """The tensor: a memory-mapped view where it is stored plainly, else decoded. Row-major, possibly read-only."""
        ...
