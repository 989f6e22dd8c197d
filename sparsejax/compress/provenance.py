"""What a compressed model's `model.json` says of how it was made: `source["compression"]`.

  recipe, recipe_text, passes: as given, the file's text, and every pass with its options
  tier, calibration: see `recipe.TIERS`, `Calibration.describe`
  request: all that decides the result and its report, so that a rerun is told from another compression
  shingles: hashes of what was calibrated on (base64 of little-endian uint64), also for a model that is compressed again
  before: the recipes of earlier compressions
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsejax.compress.calibration import Calibration, check_disjoint
from sparsejax.io.model import Model
from sparsejax.plugs import ConfigError


def compression(
    model: Model, calibration: Calibration, *, recipe: str, recipe_text: str, passes: Sequence[Any], tier: str, request: Any
) -> dict[str, Any]:
    """The entry for a model that is compressed from `model`, as JSON values."""
    earlier = model.source.get("compression")
    before = [*earlier.get("before", ()), earlier.get("recipe")] if earlier else []
    shingles = np.union1d(calibrated_shingles(model), calibration.shingles)
    return {
        "recipe": recipe,
        "recipe_text": recipe_text,
        "passes": [repr(one) for one in passes],
        "tier": tier,
        "calibration": calibration.describe(),
        "request": request,
        "before": before,
        "shingles": base64.b64encode(shingles.astype("<u8").tobytes()).decode(),
    }


def calibrated_shingles(model: Model) -> np.ndarray:
    """uint64, sorted: hashes of the 64-token shingles that a model was calibrated on; empty for one that was not.

    Raises:
      ConfigError: the model's folder holds something else there.
    """
    text = (model.source.get("compression") or {}).get("shingles", "")
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), "<u8").astype(np.uint64)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ConfigError(f"--model = {model.name!r}: source.compression.shingles is damaged ({error})") from error


def check_overlap(model: Model, tokens: Sequence[np.ndarray], name: str) -> None:
    """Refuse to score a model on what it was calibrated on.

    Args:
      tokens: of each window or row.
      name: of the text.
    Raises:
      ConfigError: as `check_disjoint`.
    """
    shingles = calibrated_shingles(model)
    if len(shingles):
        check_disjoint(shingles, tokens, f"{name} (calibration of {model.name})")
