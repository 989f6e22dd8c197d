"""At which tokens activation sparsity acts, a field of every report: published numbers differ silently by it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsejax.plugs import ConfigError, check


@dataclass(frozen=True)
class Scope:
    """`all` | `from:FRACTION` (the tokens after that share of a window are sparse) | `decode` (those after half of it, as if it
    were a prompt and the rest decoded token by token); `keep_first`: so many first tokens are dense in any case.

    For any scope but `all` only targets predicted from sparse positions count.
    """

    tokens: str = "all"
    keep_first: int = 0

    def __post_init__(self) -> None:
        check(self.keep_first >= 0, "--keep-first", self.keep_first, "must be 0 or more")
        self._fraction()

    def _fraction(self) -> float:
        kind, colon, text = self.tokens.partition(":")
        if kind in ("all", "decode") and not colon:
            return 0.0 if kind == "all" else 0.5
        try:
            fraction = float(text)
        except ValueError:
            fraction = -1.0
        if kind != "from" or not 0 <= fraction < 1:
            raise ConfigError(f"--scope = {self.tokens!r}: allowed are 'all', 'from:FRACTION' with 0 <= FRACTION < 1, 'decode'")
        return fraction

    def first_sparse(self, length: int) -> int:
        """The first sparse position of a window of `length` tokens."""
        return max(int(self._fraction() * length), self.keep_first)

    def first_scored(self, length: int) -> int:
        """The first position whose prediction counts: 0, or the first sparse one."""
        return 0 if self.tokens == "all" else self.first_sparse(length)

    def sparse(self, length: int) -> np.ndarray | None:
        """bool[length], see `Context.sparsify`; None: all."""
        first = self.first_sparse(length)
        return None if first == 0 else np.arange(length) >= first
