"""Numbers that others computed: bytes and sums of reference implementations, casts of ml_dtypes, the table of format errors."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sparsejax.ops.formats import tables
from sparsejax.ops.formats.grids import grid_of
from sparsejax.ops.formats.quantize import decode, encode, qparams, quantize
from sparsejax.ops.formats.scales import shared_exponent
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.quantized_arrays import qtensor


def column(numbers):
    return jnp.asarray(np.asarray(numbers, np.float32)[:, None])


def quantized(text, numbers):
    """(codes, scales, zeros, what they stand for) of one column."""
    spec = FormatSpec.parse(text)

    @jax.jit
    def both(x):
        codes, found = quantize(x, spec)
        return codes, found, decode(codes, found, spec)

    codes, found, numbers = both(column(numbers))
    numbers = np.asarray(numbers, np.float64)[:, 0]
    return np.asarray(codes)[:, 0], np.asarray(found.scale)[:, 0], found.zero, numbers


def rounded_to(grid, numbers):
    """Numbers as those of a grid."""
    both = jax.jit(lambda x: grid.decode(grid.encode(x, "even", None)))
    return np.asarray(both(jnp.asarray(numbers, jnp.float32)))


# V: x_i = ((37 i + 11) mod 64 - 32) / 16, and what ggml's C code makes of it.
V = np.array([((37 * i + 11) % 64 - 32) / 16 for i in range(64)])
GGML = {
    "q4_0": ("0034730c953fc851ea841da63fd962fb842e", -2, -42, 0.1875),
    "q4_1": ("113400c0730c952ec851ea731da63fc862fb841d", -3.0039062, -61.763672, 0.1596632),
    "q5_0": ("00305aad546ae6083b5d80a2d5f72a4c7f91c4e6193b", -2, -43, 0.0625),
    "q5_1": ("df2f00c05aad546ae6083b5d80a2d5f72a4c7f91c4e6193b", -2.9990234, -59.322754, 0.042446911),
    "q8_0": ("0824ad40d467fc9124b94be073089d30c457ec8114a93cd063f88d20b547dc6f0499", -2.9919434, -59.004272, 6.6745e-4),
}


@pytest.mark.parametrize("name", GGML)
def test_ggml_s_blocks_have_its_bytes(name):
    text, total, weighted, error = GGML[name]
    codes, scale, minimum, numbers = quantized(name, V[:32])
    bits = FormatSpec.parse(name).bits
    written = scale.tobytes() + (b"" if minimum is None else np.asarray(minimum).tobytes())
    if bits < 8:
        offset = codes.astype(np.uint8) + np.uint8(2 ** (bits - 1) if minimum is None else 0)
        fifth = np.packbits(offset >> 4, bitorder="little").tobytes() if bits == 5 else b""
        written += fifth + ((offset[:16] & 15) | (offset[16:] & 15) << 4).tobytes()
    else:
        written += codes.tobytes()
    assert written.hex() == text
    sums = numbers.sum(), (np.arange(1, 33) * numbers).sum(), ((numbers - V[:32]) ** 2).sum()
    np.testing.assert_allclose(sums, (total, weighted, error), rtol=1e-5)


def test_mxfp4_is_that_of_the_standard_and_of_ggml_but_for_ties():
    codes, scale, _, numbers = quantized("mxfp4", V[:32])
    assert scale.tolist() == [126]
    assert codes[:16].tolist() == [13, 4, 11, 5, 8, 14, 2, 12, 4, 10, 6, 0, 13, 3, 12, 5]
    golden = np.frombuffer(bytes.fromhex("9de41bd540bd520ce42ac640ad530cd5"), np.uint8)
    theirs = tables.FP4_E2M1[np.concatenate([golden & 15, golden >> 4])]
    ours = numbers * 2  # the scale is 1/2
    tie = np.abs(V[:32] * 2 - ours) == np.abs(V[:32] * 2 - theirs)
    assert tie.all() and (ours != theirs).sum() == 2  # ggml takes the lower magnitude of two that are as near


def test_nvfp4_with_its_global_scale():
    codes, scale, _, numbers = quantized("nvfp4", V[:16])
    found = jax.jit(lambda x: qparams(x, FormatSpec.parse("nvfp4")))(column(V[:16]))
    assert found.second[0, 0] == np.float32(1483.0344828) and scale.tolist() == [448]
    assert codes.tolist() == [14, 5, 12, 7, 8, 15, 4, 14, 6, 11, 7, 1, 15, 4, 13, 6]
    np.testing.assert_allclose(numbers[:6], [-1.2083333, 0.90625, -0.6041667, 1.8125, 0, -1.8125], rtol=1e-6)


def test_nvfp4_of_ggml_has_fp8_scales_alone():
    _, scale, _, numbers = quantized("fp4_e2m1:group=16,scale=e4m3", V)
    assert scale.tobytes().hex() == "2a2b2a2a"
    golden = np.frombuffer(bytes.fromhex("6eb57c17e04fd46efa3fd25eb57c06e9d46d96fa37e25ec517e05fd46da6fb27"), np.uint8)
    nibbles = golden.reshape(4, 8)
    theirs = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).reshape(-1)
    np.testing.assert_array_equal(numbers, tables.FP4_E2M1[theirs] * np.repeat(scale.astype(np.float64), 16))
    sums = numbers.sum(), (np.arange(1, 65) * numbers).sum(), ((numbers - V) ** 2).sum()
    np.testing.assert_allclose(sums, (-1.390625, -33.484375, 0.94506836), rtol=1e-6)


def test_an_affine_code_of_four_bits():
    codes, scale, zero, _ = quantized("int4:asym", [-1, 0, 0.3, 2])
    np.testing.assert_allclose(scale, 0.2, rtol=1e-6)
    assert zero.tolist() == [[5]] and codes.tolist() == [0, 5, 6, 15]


def test_a_logarithm_by_halves_of_four_bits():
    codes, *_ = quantized("logsqrt2_4", [1, 0.8, 0.5, 0.3, 0.1, 0.02, 0.004])
    assert codes.tolist() == [0, 1, 2, 3, 7, 11, 15]
    assert quantized("log2_4", [1, 0.8, 0.7, 0.5, 0.3, 1e-9])[0].tolist() == [0, 0, 1, 1, 2, 15]


@pytest.mark.parametrize(
    ("symmetric", "scale", "codes"),
    [("narrow", 1.875 / 7, [-4, 4, 7, -7]), ("full15", 0.25, [-4, 4, 7, -8]), ("signed_max", 1.875 / 8, [-4, 4, 7, -8])],
)
def test_the_three_symmetric_conventions_are_kept_apart(symmetric, scale, codes):
    found, scales, _, numbers = quantized(f"int4:{symmetric}", [-1, 1, 1.875, -1.875] if symmetric == "full15" else
                                          [-1, 1, 1.75, -1.875])  # fmt: skip
    np.testing.assert_allclose(scales, scale, rtol=1e-6)
    assert found.tolist() == codes
    assert quantized("int4:signed_max", [1.0, 3.0])[1].tolist() == [-3 / 8]


def test_e4m3_rounds_to_even_and_saturates():
    grid = grid_of("fp8_e4m3", "narrow")
    given = [0.1, 1.0625, 1.1875, 3.3, 17, 300, 2**-9, 2**-10, 464, 465, 1e30, -1e30, np.inf]
    wanted = [0.1015625, 1.0, 1.25, 3.25, 16, 288, 2**-9, 0, 448, 448, 448, -448, 448]
    assert rounded_to(grid, [*given, np.nan])[:-1].tolist() == wanted
    assert np.isnan(rounded_to(grid, [np.nan])).all()


SMALL = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}


@pytest.mark.parametrize("name", SMALL)
def test_small_floats_are_those_of_ml_dtypes(name):
    grid, dtype = grid_of(name, "narrow"), SMALL[name]
    every = np.arange(2**grid.bits, dtype=np.uint8)
    values = every.view(dtype).astype(np.float32)
    finite = np.isfinite(values)
    stored = every.view(grid.native) if grid.native else every
    np.testing.assert_array_equal(np.asarray(jax.jit(grid.decode)(stored))[finite], values[finite])
    np.testing.assert_array_equal(grid.values[finite], values[finite])
    ordered = np.unique(values[finite])
    halves = (ordered[1:] + ordered[:-1]) / 2
    noise = np.random.default_rng(0).normal(size=4000) * ordered[-1] / 3
    x = np.concatenate([ordered, halves, np.nextafter(halves, -9e9, dtype=np.float32), noise]).astype(np.float32)
    x = np.clip(x, ordered[0], ordered[-1])
    np.testing.assert_array_equal(rounded_to(grid, x), x.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("name", ["nf4", "fp4_bnb", "iq4_nl"])
def test_a_table_s_numbers_are_their_own_codes_and_others_take_the_nearest(name):
    grid = grid_of(name, "narrow")
    values = np.asarray(grid.values, np.float32)
    np.testing.assert_array_equal(rounded_to(grid, values), values)
    x = np.random.default_rng(0).uniform(-1.2, 1.2, 500).astype(np.float32) * grid.greatest
    found = rounded_to(grid, x)
    np.testing.assert_allclose(np.abs(found - x), np.abs(values[:, None] - x).min(0), rtol=1e-5, atol=1e-6)


def test_published_tables():
    np.testing.assert_allclose(
        tables.NF4[[1, 2, 8, 14]], [-0.6961928, -0.52507305, 0.0795803, 0.72295684], rtol=1e-6
    )
    assert sorted(set(np.abs(tables.NF4).tolist()) & set((-tables.NF4).tolist()) & set(tables.NF4.tolist())) == [0, 1]
    assert tables.FP4_E2M1.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    dynamic = tables.DYNAMIC_8
    assert len(set(dynamic.tolist())) == 256 and dynamic[-1] == 1 and 0 in dynamic
    np.testing.assert_allclose(dynamic[[0, 254]], [-0.99296875, 0.99296875], rtol=1e-6)


@pytest.mark.parametrize("rule", ["floor", "round175", "ceil", "rne"])
@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1"])
def test_shared_exponents_by_their_rules(name, rule):
    greatest = grid_of(name, "narrow").greatest
    powers = 2.0 ** np.arange(-20, 20)
    noise = np.random.default_rng(0).uniform(0.5, 1, 40)
    magnitudes = np.concatenate([noise * powers, powers, 1.5 * powers, 1.75 * powers, greatest * powers])
    wanted = []
    for x in magnitudes.astype(np.float32).tolist():
        top = math.floor(math.log2(x))
        mantissa, emax = x / 2.0**top, math.floor(math.log2(greatest))
        up = {"floor": False, "round175": mantissa >= 1.75, "rne": mantissa > 1.5 or (mantissa == 1.5 and top % 2 == 0)}
        wanted.append(math.ceil(math.log2(x / greatest)) if rule == "ceil" else top - emax + up[rule])
    exponent = jax.jit(lambda x: shared_exponent(x, greatest, rule))
    found = exponent(jnp.asarray(magnitudes, jnp.float32))
    np.testing.assert_array_equal(np.asarray(found, np.int32) - 127, wanted)
    edges = exponent(jnp.asarray([0, np.nan, np.inf, 1e-38, 3e38]))
    assert edges[:3].tolist() == [0, 255, 255] and edges[3] <= 3 and edges[4] < 255


def test_the_largest_of_a_block_saturates_under_the_floor_rule_alone():
    for rule, largest in (("floor", 6), ("ceil", 8), ("round175", 8)):
        assert set(quantized(f"mxfp4:rule={rule}", [7.9] * 32)[3].tolist()) == {largest}


# Bits per weight, and sum (x - x_hat)^2 / sum x^2 of Gaussian, Laplace and Student-t (4) numbers.
ERRORS = {
    "int8:group=128": (8.125, 4.19e-5, 8.0e-5, 1.2e-4),
    "q8_0": (8.5, 2.87e-5, 4.5e-5, 5.4e-5),
    "mxfp8_e4m3": (8.25, 8.62e-4, 1.00e-3, 1.03e-3),
    "int4:group=128": (4.125, 1.38e-2, 2.57e-2, 3.70e-2),
    "int4:asym,group=128": (4.156, 1.01e-2, 1.70e-2, 2.10e-2),
    "int4:asym,group=64": (4.3125, 8.29e-3, 1.26e-2, 1.41e-2),
    "int4:asym,group=32": (4.625, 6.52e-3, 8.9e-3, 9.3e-3),
    "q4_0": (4.5, 7.39e-3, 1.14e-2, 1.33e-2),
    "q4_1": (5.0, 6.11e-3, 8.4e-3, 8.8e-3),
    "nf4:group=64": (4.5, 8.45e-3, 1.08e-2, 1.23e-2),
    "nf4:group=64,double": (4.127, 8.45e-3, 1.08e-2, 1.23e-2),
    "mxfp4": (4.25, 1.32e-2, 1.61e-2, 1.72e-2),
    "mxfp4:rule=round175": (4.25, 1.25e-2, 1.54e-2, 1.66e-2),
    "mxfp4:rule=ceil": (4.25, 1.33e-2, 1.75e-2, 1.92e-2),
    "nvfp4": (4.5, 9.03e-3, 8.60e-3, 8.38e-3),
    "int3:asym,group=128": (3.148, 4.65e-2),
    "int2:asym,group=128": (2.14, 0.254),
    "int2:asym,group=64": (2.28, 0.209),
}


@functools.cache
def drawn():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=2**20), rng.laplace(size=2**20), rng.standard_t(4, size=2**20)
    return jnp.asarray(np.stack(draws).reshape(3, -1, 256), jnp.float32)


@pytest.mark.parametrize("text", ERRORS)
def test_errors_of_formats_on_three_distributions(text):
    bits, *wanted = ERRORS[text]
    spec, x = FormatSpec.parse(text), drawn()[: len(wanted)]

    @jax.jit
    def measured(x):
        packed = qtensor(x, spec)
        return packed, jnp.sum(jnp.square(packed.dequantize() - x), axis=(1, 2)) / jnp.sum(jnp.square(x), axis=(1, 2))

    packed, errors = measured(x)
    assert abs(packed.bits_per_weight / bits - 1) < 1e-3
    np.testing.assert_allclose(errors, wanted, rtol=0.03)


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("q5_0", 5.5), ("q5_1", 6), ("int4:asym,group=64,zero=float", 4.5), ("mxfp6_e2m3", 6.25), ("mxfp6_e3m2", 6.25),
        ("mxfp8_e5m2", 8.25), ("mxint8", 8.25), ("ternary:tensor", 1.6), ("binary:tensor", 1), ("int3:tensor", 3),
        ("int8", 8 + 32 / 3200), ("int4", 4 + 32 / 3200), ("fp8_e4m3:block=128x128", 8 + 16 / 128**2),
    ],
)  # fmt: skip
def test_bits_per_weight_of_other_stores(text, bits):
    shapes = jax.eval_shape(lambda w: qtensor(w, FormatSpec.parse(text)), jax.ShapeDtypeStruct((3200, 640), jnp.float32))
    assert abs(shapes.bits_per_weight / bits - 1) < 1e-4


def test_codes_are_chosen_by_the_scale_that_is_stored_unless_the_format_says_otherwise():
    x = column(np.random.default_rng(0).normal(size=32))
    spec = FormatSpec.parse("int8:group=32")
    found = jax.jit(lambda x: qparams(x, spec))(x)
    np.testing.assert_array_equal(
        jax.jit(lambda x: encode(x, found, spec))(x), np.clip(np.round(np.asarray(x) / np.float32(found.scale)), -127, 127)
    )
