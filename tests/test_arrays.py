import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import arrays
from sparsejax.arrays import (
    EXECUTORS,
    LowRank,
    QTensor,
    QuantizedActivation,
    Residual,
    SparseActivation,
    Sum,
    dense,
    expert_of_rows,
    kind,
    matmul,
)
from sparsejax.ops.formats.scales import QParams
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.quantized_arrays import packed

N, K, OUT, E = 7, 9, 5, 3
GROUPS = (3, 0, 2)


def rng(seed=0):
    return np.random.default_rng(seed)


def codes(seed, shape, greatest=127):
    return jnp.asarray(rng(seed).integers(-greatest, greatest + 1, shape), jnp.int8)


def scales(seed, shape):
    return jnp.asarray(rng(seed).uniform(0.5, 2, shape), jnp.float32)


def left(name, lead=(N,), surrogate=False):
    """An operand of each kind; with a surrogate, as in training."""
    x = jnp.asarray(rng(1).normal(size=(*lead, K)), jnp.float32)
    quantized = QuantizedActivation(codes(2, (*lead, K)), scales(3, (*lead, 1)), x if surrogate else None, jnp.float32)
    mask = jnp.asarray(rng(4).random((*lead, K)) < 0.5)
    return {
        "Array": x,
        "QuantizedActivation": quantized,
        "SparseActivation": SparseActivation(x, mask),
        "SparseActivation[QuantizedActivation]": SparseActivation(quantized, mask),
    }[name]


def right(name, lead=(), surrogate=False):
    w = jnp.asarray(rng(5).normal(size=(*lead, K, OUT)), jnp.float32)
    if name == "Array":
        return w
    bits = int(name[-1])
    integers = codes(6, (*lead, K, OUT), 2 ** (bits - 1) - 1)
    spec = FormatSpec(f"int{bits}")
    tensor = packed(integers, QParams(scales(7, (*lead, 1, OUT))), spec, (K, OUT), jnp.float32)
    return dataclasses.replace(tensor, surrogate=w if surrogate else None)


LEFT = ("Array", "QuantizedActivation", "SparseActivation", "SparseActivation[QuantizedActivation]")
RIGHT = ("Array", "QTensor8", "QTensor4")


def as_float64(operand):
    return np.asarray(dense(operand), np.float64)


@pytest.mark.parametrize("w_name", RIGHT)
@pytest.mark.parametrize("x_name", LEFT)
def test_every_pair_of_operands_is_the_product_of_what_they_stand_for(x_name, w_name):
    x, w = left(x_name), right(w_name)
    assert kind(x) == x_name and kind(w) == w_name.rstrip("84")
    np.testing.assert_allclose(matmul(x, w), as_float64(x) @ as_float64(w), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("w_name", RIGHT)
@pytest.mark.parametrize("x_name", LEFT)
def test_grouped_and_batched_experts_are_each_experts_own_product(x_name, w_name):
    w = right(w_name, (E,))
    batched = matmul(left(x_name, (E, N)), w)
    np.testing.assert_allclose(batched, as_float64(left(x_name, (E, N))) @ as_float64(w), rtol=1e-4, atol=1e-3)
    grouped = matmul(left(x_name), w, groups=jnp.asarray(GROUPS))
    expected = np.zeros((N, OUT))
    for row, expert in enumerate(np.repeat(np.arange(E), GROUPS)):
        expected[row] = as_float64(left(x_name))[row] @ as_float64(w)[expert]
    np.testing.assert_allclose(grouped, expected, rtol=1e-4, atol=1e-3)


def test_integer_products_are_exact_where_float32_sums_are_not():
    width = 20000
    x = QuantizedActivation(codes(0, (3, width)), jnp.ones((3, 1)), None, jnp.float32)
    w = QTensor(codes(1, (width, 4)), jnp.ones((1, 4)), FormatSpec("int8"), (width, 4), jnp.float32)
    exact = np.asarray(x.codes, np.int64) @ np.asarray(w.codes, np.int64)
    np.testing.assert_array_equal(matmul(x, w), exact.astype(np.float32))


@pytest.mark.parametrize("gradient", ["masked", "straight_through"])
def test_dropped_entries_receive_a_gradient_only_when_straight_through(gradient):
    x, w, r = left("Array"), right("Array"), jnp.asarray(rng(8).normal(size=(N, OUT)), jnp.float32)
    mask = left("SparseActivation").mask

    def loss(x, w):
        return jnp.sum(r * matmul(SparseActivation(x, mask, gradient), w))

    dx, dw = jax.grad(loss, (0, 1))(x, w)
    full = np.asarray(r) @ np.asarray(w).T
    np.testing.assert_allclose(dx, full if gradient == "straight_through" else full * np.asarray(mask), atol=1e-5)
    np.testing.assert_allclose(dw, np.where(mask, x, 0).T @ np.asarray(r), atol=1e-5)


@pytest.mark.parametrize("gradient", ["masked", "straight_through"])
@pytest.mark.parametrize("w", ["Array", "QTensor8", "LowRank", "Sum", "Residual"])
def test_gathered_is_masked_in_values_and_gradients_whatever_the_weight(w, gradient):
    x = jnp.asarray(rng(1).normal(size=(1, 2, K)), jnp.float32)
    mask = left("SparseActivation", (1, 2)).mask
    base = right("Array")
    made = {"LowRank": low_rank(), "Sum": Sum(base, low_rank()), "Residual": Residual(base, low_rank(), None)}
    weight = made[w] if w in made else right(w)

    def loss(x, executor):
        return jnp.sum(matmul(SparseActivation(x, mask, gradient, executor=executor), weight) ** 2)

    (masked, dx), (gathered, gathered_dx) = (jax.value_and_grad(loss)(x, executor) for executor in EXECUTORS)
    np.testing.assert_allclose(gathered, masked, rtol=1e-5)
    np.testing.assert_allclose(gathered_dx, dx, rtol=1e-4, atol=1e-5)


def test_few_rows_are_gathered_and_many_multiplied_with_their_zeros(monkeypatch):
    asked = []

    def noted(x, mask, w, *, most, preferred_element_type):
        asked.append((x.shape, most))
        return x[..., :OUT]

    monkeypatch.setattr(arrays, "sparse_gemv", noted)
    for rows, executor in ((1, "gathered"), (1, "masked"), (arrays.FEW_ROWS, "gathered"), (N, "gathered")):
        matmul(dataclasses.replace(left("SparseActivation", (rows,)), executor=executor, most=6), right("Array"))
    assert asked == [((1, K), 6), ((arrays.FEW_ROWS, K), 6)]


@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("x_name", ["QuantizedActivation", "SparseActivation[QuantizedActivation]"])
def test_surrogates_receive_the_gradient_of_the_dequantized_product(x_name, groups):
    lead = () if groups is None else (E,)
    groups = None if groups is None else jnp.asarray(groups)
    x, w = left(x_name, surrogate=True), right("QTensor8", lead, surrogate=True)
    inner = x.values if isinstance(x, SparseActivation) else x
    mask = x.mask if isinstance(x, SparseActivation) else jnp.ones(x.shape, bool)

    def ours(x_float, w_float):
        values = dataclasses.replace(inner, surrogate=x_float)
        operand = dataclasses.replace(x, values=values) if isinstance(x, SparseActivation) else values
        return jnp.sum(matmul(operand, dataclasses.replace(w, surrogate=w_float), groups=groups) ** 2)

    def formula(x_float, w_float):
        x_hat = jnp.where(mask, x_float + jax.lax.stop_gradient(dense(inner) - x_float), 0)
        w_hat = w_float + jax.lax.stop_gradient(dense(w) - w_float)
        return jnp.sum(matmul(x_hat, w_hat, groups=groups) ** 2)

    floats = (inner.surrogate, w.surrogate)
    for got, expected in zip(jax.grad(ours, (0, 1))(*floats), jax.grad(formula, (0, 1))(*floats), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3)


def test_a_surrogate_changes_no_bit_of_the_forward_product():
    for x_name in LEFT[1::2]:
        trained = jax.jit(matmul)(left(x_name, surrogate=True), right("QTensor4", surrogate=True))
        np.testing.assert_array_equal(trained, jax.jit(matmul)(left(x_name), right("QTensor4")))


def test_one_surrogate_alone_is_enough_for_straight_through():
    x, w = left("Array"), right("QTensor8", surrogate=True)
    dx, dw = jax.grad(lambda x, v: jnp.sum(matmul(x, dataclasses.replace(w, surrogate=v))), (0, 1))(x, w.surrogate)
    np.testing.assert_allclose(dx, np.ones((N, OUT)) @ as_float64(w).T, rtol=1e-4)
    np.testing.assert_allclose(dw, as_float64(x).T @ np.ones((N, OUT)), rtol=1e-4, atol=1e-4)


def test_bfloat16_operands_give_bfloat16_and_float32_on_request():
    x, w = left("Array").astype(jnp.bfloat16), right("Array")
    assert matmul(x, w).dtype == jnp.bfloat16
    assert matmul(x, w, out_dtype=jnp.float32).dtype == jnp.float32
    quantized = dataclasses.replace(left("QuantizedActivation"), dtype=jnp.bfloat16)
    assert matmul(quantized, right("QTensor8")).dtype == jnp.bfloat16


@pytest.mark.parametrize("lead", [(), (1,), (1, 1)])
@pytest.mark.parametrize("out_dtype", [None, jnp.float32])
def test_one_row_in_bfloat16_is_multiplied_as_among_others(lead, out_dtype):
    rows, w = left("Array").astype(jnp.bfloat16), right("Array").astype(jnp.bfloat16)
    x = rows[0].reshape(*lead, K)
    found, pull = jax.vjp(lambda x, w: matmul(x, w, out_dtype=out_dtype), x, w)
    among = matmul(rows, w, out_dtype=out_dtype)
    assert found.shape == (*lead, OUT) and found.dtype == among.dtype
    tolerance = 1e-5 if out_dtype else 2**-7
    np.testing.assert_allclose(as_float64(found).reshape(-1), as_float64(among)[0], rtol=tolerance, atol=tolerance)
    dx, dw = pull(jnp.ones_like(found))
    assert dx.shape == x.shape
    np.testing.assert_allclose(as_float64(dw), np.outer(as_float64(rows[0]), np.ones(OUT)), rtol=2**-7)


def test_operands_cross_jit_scan_and_checkpointing_of_residuals():
    w = right("QTensor4", (2,))

    def body(h, layer):
        return jnp.tanh(matmul(left("QuantizedActivation"), layer)) + h, None

    got, _ = jax.lax.scan(jax.checkpoint(body), jnp.zeros((N, OUT)), w)
    by_hand = sum(jnp.tanh(matmul(left("QuantizedActivation"), jax.tree.map(lambda a, i=i: a[i], w))) for i in range(2))
    np.testing.assert_allclose(got, by_hand, atol=1e-6)


def test_rows_beyond_the_groups_belong_to_no_expert():
    assert expert_of_rows(jnp.asarray(GROUPS), N).tolist() == [0, 0, 0, 2, 2, 3, 3]


def low_rank(seed=20, rank=2):
    a, b = (jnp.asarray(rng(seed + i).normal(size=shape), jnp.float32) for i, shape in enumerate(((K, rank), (rank, OUT))))
    return LowRank(a, b)


@pytest.mark.parametrize("x_kind", ["Array", "QuantizedActivation", "SparseActivation[QuantizedActivation]"])
@pytest.mark.parametrize("base_kind", ["Array", "QTensor8", "QTensor4"])
def test_a_weight_made_of_others_multiplies_as_the_dense_one_it_stands_for(x_kind, base_kind):
    x, base, update = left(x_kind), right(base_kind), low_rank()
    for w in (update, Sum(base, update), Sum(Sum(base, update), low_rank(30))):
        wide = [np.asarray(dense(operand), np.float64) for operand in (x, w)]
        terms = np.abs(dense(x)) @ (np.abs(dense(base)) + 2 * (np.abs(update.a) @ np.abs(update.b)))
        bound = 2 * K * np.finfo(np.float32).eps * np.max(terms)
        np.testing.assert_allclose(matmul(x, w), wide[0] @ wide[1], rtol=0, atol=bound)


@pytest.mark.parametrize("with_mean", [False, True])
@pytest.mark.parametrize("with_dropped", [False, True])
def test_a_residual_gives_the_dropped_entries_their_own_weight(with_mean, with_dropped):
    x, w = left("SparseActivation"), right("Array")
    mean = jnp.asarray(rng(40).normal(size=K), jnp.float32) if with_mean else None
    dropped = low_rank() if with_dropped else None
    centred = np.asarray(x.values, np.float64) - (0 if mean is None else np.asarray(mean))
    expected = np.where(x.mask, centred, 0) @ np.asarray(w)
    if with_mean:
        expected = expected + np.asarray(mean) @ np.asarray(w)
    if with_dropped:
        expected = expected + np.where(x.mask, 0, centred) @ np.asarray(dense(dropped))
    np.testing.assert_allclose(matmul(x, Residual(w, dropped, mean)), expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(matmul(x.values, Residual(w, dropped, mean)), matmul(x.values, w))


def test_a_full_rank_residual_is_the_dense_product_whatever_is_dropped():
    x, w = left("SparseActivation"), right("Array")
    whole = LowRank(w, jnp.eye(OUT))
    np.testing.assert_allclose(matmul(x, Residual(w, whole, None)), x.values @ w, rtol=2e-5, atol=2e-5)


def test_unwanted_outputs_are_zero_and_pass_no_gradient():
    x, w = left("Array"), right("Array")
    wanted = jnp.asarray(rng(41).random((N, OUT)) < 0.5)
    np.testing.assert_array_equal(matmul(x, w, outputs=wanted), jnp.where(wanted, x @ w, 0))
    gradient = jax.grad(lambda w: jnp.sum(matmul(x, w, outputs=wanted)))(w)
    np.testing.assert_allclose(gradient, x.T @ wanted.astype(jnp.float32), rtol=1e-5, atol=1e-5)


def test_gradients_go_through_the_adapter_and_the_quantized_base():
    x, update = left("Array"), low_rank()
    base = right("QTensor8", surrogate=True)
    found = jax.grad(lambda u: jnp.sum(jnp.square(matmul(x, Sum(base, u)))), allow_int=True)(update)
    float_base = dense(base)
    expected = jax.grad(lambda u: jnp.sum(jnp.square(x @ (float_base + u.a @ u.b))))(update)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)
