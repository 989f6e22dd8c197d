"""The numbers that low-bit codes stand for, as numpy arrays indexed by code: what formats, decoders and exporters share."""

from __future__ import annotations

import numpy as np


def float_values(exponent_bits: int, mantissa_bits: int, bias: int) -> np.ndarray:
    """float32[2 ** (1 + E + M)]: every code s|e|m of a small float as a finite number, subnormals included.

    Codes that a format gives to infinities and NaN get the number that they would be without that.
    """
    codes = np.arange(2 ** (exponent_bits + mantissa_bits))
    exponents, mantissas = codes >> mantissa_bits, codes & (2**mantissa_bits - 1)
    normal = exponents > 0
    magnitudes = np.ldexp((mantissas + normal * 2.0**mantissa_bits), np.maximum(exponents, 1) - bias - mantissa_bits)
    return np.concatenate([magnitudes, -magnitudes]).astype(np.float32)


# OCP Microscaling 1.0: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives.
FP4_E2M1 = float_values(2, 1, 1)

# QLoRA (2305.14314), as bitsandbytes has it: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
NF4 = np.array(
    [-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1], np.float32)  # fmt: skip

# The "fp4" of bitsandbytes, which is not E2M1: magnitudes by code in twelfths, the sign in bit 3.
FP4_BNB = (np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12).astype(np.float32)

# ggml's non-linear 4-bit table.
IQ4_NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def dynamic_map() -> np.ndarray:
    """float32[256], ascending: the signed dynamic 8-bit map (Dettmers, 1511.04561, as in bitsandbytes).

    Seven decades from 1e-6 to 1, the decade i with 2^i midpoints of equal steps in [.1, 1] and their negatives; 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2**decade + 1, dtype=np.float32)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [*means, *-means]
    return np.sort(np.array(values, np.float32))


DYNAMIC_8 = dynamic_map()
