"""Every registered non-linearity: its moments, its derivatives in float64, and the identities of its paper."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax.ops.activations  # noqa: F401  registers what is tested
from sparsejax.ops.learned_activations import JumpRelu, PolyNorm, PolyRelu, ProAct, SeriesInformed, XIelu
from sparsejax.plugs import ConfigError, names, resolve

NAMES = names("nonlinearity")
# On z ~ N(0, 1), from the cards: E h^2 within 1 %.
PUBLISHED_MOMENTS = {
    "relu": 0.5, "leaky_relu": 0.5, "gelu": 0.4255, "gelu_tanh": 0.4255, "silu": 0.356, "relu2": 1.5, "mish": 0.453,
    "hard_swish": 0.332, "softplus": 0.921, "fatrelu:0.5": 0.485, "glu": 0.293, "bilinear": 1.0, "reglu": 0.5, "geglu": 0.425,
    "swiglu": 0.355, "drelu": 0.249, "relu2glu": 1.5, "polyrelu": 2.26, "crrelu": 0.504, "xielu": 1.74, "polynorm": 0.712**2,
}  # fmt: skip


def spec(name):
    return resolve("nonlinearity", name)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def apply(name, *inputs, **changed):
    """The spec's value at float32 inputs, with some of its parameters replaced."""
    s = spec(name)
    inputs = [jnp.asarray(x, jnp.float32) for x in inputs]
    width = inputs[0].shape[-1] // (2 if s.halves else 1)
    parameters = s.parameters(width) | {key: jnp.asarray(value, jnp.float32) for key, value in changed.items()}
    return np.asarray(jax.jit(s)(parameters, *inputs))


def example(s, rows, width, seed=0):
    """Inputs of the right arity, none closer than 1e-4 to a kink of the function."""
    z = [normal(rows, width * (2 if s.halves else 1), seed=seed + i) for i in range(2 if s.gated else 1)]
    return [np.where(np.abs(x) < 0.02, 0.1, x) for x in z]


@pytest.mark.parametrize("name", sorted(PUBLISHED_MOMENTS))
def test_second_moment_is_the_published_one(name):
    assert spec(name).second_moment == pytest.approx(PUBLISHED_MOMENTS[name], rel=0.01)


@pytest.mark.parametrize("name", [n for n in NAMES if not spec(n).rowwise])
def test_second_moment_agrees_with_gaussian_quadrature(name):
    """By summing over a grid in float64: Gauss-Hermite nodes miss the kinks."""
    s = spec(name)
    grid = np.linspace(-9, 9, 6001)
    weights = np.exp(-grid * grid / 2) / np.exp(-grid * grid / 2).sum()
    other = np.full_like(grid, 1.0)
    with jax.enable_x64(True):
        if s.halves:
            z = jnp.asarray(np.stack([grid, other], -1))
            h = s({}, z)[:, 0]
        else:
            z = jnp.asarray(grid[:, None])
            h = jax.jit(s)(s.parameters(1), z, *([jnp.asarray(other[:, None])] if s.gated else []))[:, 0]
    # The factor of the second input, which was held at 1, is E u^2 = 1, or E max(u, 0)^2 = 1/2 where it is rectified.
    factor = 0.5 if name == "drelu" else 1.0
    assert s.second_moment == pytest.approx(float(np.sum(weights * np.asarray(h) ** 2)) * factor, rel=2e-3)


@pytest.mark.parametrize("name", ["topk:0.1", "block_topk", "stat_topk", "stat_topk_geglu", "polynorm"])
def test_second_moment_of_rowwise_forms_agrees_with_long_random_rows(name):
    inputs = [normal(200, 4096, seed=i) for i in range(1 + spec(name).gated)]
    assert spec(name).second_moment == pytest.approx(float(np.mean(apply(name, *inputs) ** 2)), rel=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_match_finite_differences_in_float64(name):
    s = dataclasses.replace(spec(name), fraction=0.5) if hasattr(spec(name), "fraction") else spec(name)
    width = 16
    with jax.enable_x64(True):
        inputs = [jnp.asarray(x) for x in example(s, 3, width)]
        parameters = jax.tree.map(lambda p: p.astype(jnp.float64), s.parameters(width))
        # The derivative by a JumpReLU threshold is a pseudo-derivative by definition.
        moved = jax.tree.map(lambda p: jnp.ones_like(p) * (name != "jumprelu"), parameters)
        directions = [jnp.asarray(normal(*x.shape, seed=7 + i)) for i, x in enumerate(inputs)]
        value = jax.jit(lambda p, z: s(p, *z))
        point, direction = jax.tree.map(np.asarray, ((parameters, inputs), (moved, directions)))
        above, below = (jax.tree.map(lambda x, d, e=e: x + e * d, point, direction) for e in (1e-5, -1e-5))
        numeric = (np.asarray(value(*above)) - np.asarray(value(*below))) / 2e-5
        weights = normal(3, width, seed=11)
        total = jax.jit(jax.value_and_grad(lambda p, z: jnp.sum(weights * s(p, *z)), argnums=(0, 1)))
        gradient = jax.tree.leaves(total(parameters, inputs)[1])
    pulled = sum(float(np.sum(np.asarray(g) * d)) for g, d in zip(gradient, jax.tree.leaves(direction), strict=True))
    assert pulled == pytest.approx(float(np.sum(weights * numeric)), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_output_keeps_shape_and_dtype_and_bfloat16_is_the_rounded_float32(name):
    s = spec(name)
    exact = [jnp.asarray(x, jnp.bfloat16) for x in example(s, 6, 32)]
    parameters = s.parameters(32)
    assert all(p.dtype == jnp.float32 and p.shape in ((), (32,)) for p in parameters.values())
    rounded = jax.jit(s)(parameters, *(x.reshape(2, 3, -1) for x in exact))
    assert rounded.shape == (2, 3, 32) and rounded.dtype == jnp.bfloat16
    wide = apply(name, *exact).reshape(2, 3, 32)
    np.testing.assert_allclose(np.asarray(rounded).astype(np.float32), wide, rtol=0.03, atol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_exact_zeros_are_declared(name):
    """At parameters off their initial values: PolyReLU has zeros only while a_0 = 0."""
    s = spec(name)
    moved = {key: value + 0.01 for key, value in s.parameters(64).items()}
    zeros = np.mean(apply(name, *(2 * x for x in example(s, 60, 64)), **moved) == 0)
    assert (zeros > 0.02) == s.exact_zeros


@pytest.mark.parametrize("name", ["relu", "relu2", "reglu", "drelu", "fatrelu", "topk", "proact", "crrelu:0"])
def test_derivative_at_zero_is_zero(name):
    s = spec(name)
    slope = jax.grad(lambda z: s(s.parameters(4), z, *([jnp.ones(4)] if s.gated else [])).sum())(jnp.zeros(4))
    np.testing.assert_array_equal(slope, 0)


def test_z_times_a_sigmoid_like_function_has_odd_part_half_z():
    z = normal(50, 1)
    for name in ("relu", "gelu", "gelu_tanh", "quick_gelu", "silu"):
        np.testing.assert_allclose(apply(name, z) - apply(name, -z), z, atol=1e-6)


def test_the_tanh_form_of_gelu_is_near_the_exact_one_and_quick_gelu_is_not():
    z = np.linspace(-6, 6, 4001)[:, None]
    assert 4e-4 < np.abs(apply("gelu", z) - apply("gelu_tanh", z)).max() < 5e-4
    assert np.abs(apply("gelu", z) - apply("quick_gelu", z)).max() > 0.01
    erf = np.array([math.erf(v / math.sqrt(2)) for v in z[:, 0]])[:, None]
    np.testing.assert_allclose(apply("gelu", z), z * (1 + erf) / 2, atol=2e-6)


def test_fatrelu_keeps_the_value_at_its_threshold_and_is_relu_at_zero():
    z = np.array([-1.0, 0.0, 0.25, 0.5, 2.0])
    np.testing.assert_array_equal(apply("fatrelu:0.5", z), [0, 0, 0, 0.5, 2])
    np.testing.assert_array_equal(apply("fatrelu:0", z), apply("relu", z))


def test_shifted_relu_is_zero_up_to_its_shift():
    np.testing.assert_array_equal(apply("shifted_relu", [0.5, 1.0, 3.0]), [0, 0, 2])


def test_relu2_is_homogeneous_of_degree_two_and_a_relu_gated_by_itself():
    z = normal(4, 8)
    np.testing.assert_allclose(apply("relu2", 3 * z), 9 * apply("relu2", z), rtol=1e-6)
    np.testing.assert_allclose(apply("relu2", z), apply("reglu", z, np.maximum(z, 0)), rtol=1e-6)


def test_glu_forms_are_their_function_times_the_up_branch():
    g, u = normal(5, 8), normal(5, 8, seed=1)
    plain = {"glu": "sigmoid", "bilinear": "identity", "reglu": "relu", "geglu": "gelu", "geglu_tanh": "gelu_tanh",
             "swiglu": "silu", "relu2glu": "relu2"}  # fmt: skip
    for gated, function in plain.items():
        np.testing.assert_allclose(apply(gated, g, u), apply(function, g) * u.astype(np.float32), rtol=1e-6)


def test_drelu_fires_for_a_quarter_and_is_relu2_of_equal_branches():
    g, u = normal(100, 1000), normal(100, 1000, seed=1)
    h = apply("drelu", g, u)
    assert abs(np.mean(h == 0) - 0.75) < 0.01 and h.min() >= 0
    np.testing.assert_array_equal(h == 0, (g <= 0) | (u <= 0))
    np.testing.assert_allclose(apply("drelu", g, g), apply("relu2", g), rtol=1e-6)
    slope = jax.grad(lambda v: spec("drelu")({}, jnp.asarray(g[0]), v).sum())(jnp.asarray(u[0]))
    np.testing.assert_array_equal(np.asarray(slope) != 0, (g[0] > 0) & (u[0] > 0))


def test_simple_gate_is_a_quadratic_form_that_is_linear_in_a_half():
    z, direction = normal(2, 12), normal(2, 12, seed=1)
    np.testing.assert_allclose(apply("simple_gate", 2 * z), 4 * apply("simple_gate", z), rtol=1e-6)
    z[:, 6:] = 1
    np.testing.assert_array_equal(apply("simple_gate", z), z[:, :6].astype(np.float32))
    third = sum(c * apply("simple_gate", z + i * direction) for i, c in enumerate((-1, 3, -3, 1)))
    np.testing.assert_allclose(third, 0, atol=1e-4)
    np.testing.assert_allclose(apply("simple_gate", np.concatenate([z, z], -1)), apply("bilinear", z, z), rtol=1e-6)


def test_polyrelu_reduces_to_relu_and_relu2_and_equals_the_naive_sum():
    z, rectified = normal(4, 8), np.maximum(normal(4, 8), 0)
    np.testing.assert_array_equal(apply("polyrelu", z, a_1=1, a_2=0, a_3=0), apply("relu", z))
    np.testing.assert_allclose(apply("polyrelu", z, a_1=0, a_2=1, a_3=0), apply("relu2", z), rtol=1e-6)
    naive = 0.1 + 0.2 * rectified - 0.3 * rectified**2 + 0.4 * rectified**3
    np.testing.assert_allclose(apply("polyrelu", z, a_0=0.1, a_1=0.2, a_2=-0.3, a_3=0.4), naive, rtol=1e-5, atol=1e-6)
    assert set(PolyRelu(order=1).parameters(8)) == {"a_0", "a_1"}


def test_polynorm_ignores_scale_and_its_linear_term_is_rms_norm():
    z = normal(4, 64)
    np.testing.assert_allclose(apply("polynorm", 7 * z), apply("polynorm", z), atol=2e-5)
    rms = z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(apply("polynorm", z, a_1=1, a_2=0, a_3=0), rms, rtol=1e-5)
    y = apply("polynorm", normal(50, 2048))
    assert np.sqrt((y**2).mean()) == pytest.approx(0.712, rel=0.01) and y.mean() == pytest.approx(0.192, rel=0.02)


def test_polynorm_over_a_sharded_width_normalises_the_whole_row():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "tensor"))
    z, norm = jnp.asarray(normal(4, 64), jnp.float32), PolyNorm()
    sharded = jax.jit(norm)(norm.parameters(64), jax.device_put(z, sharding))
    np.testing.assert_allclose(sharded, norm(norm.parameters(64), z), atol=1e-6)


def test_polynorm_in_bfloat16_survives_powers_beyond_float16():
    assert np.isfinite(spec("polynorm")(spec("polynorm").parameters(8), jnp.full((1, 8), 300.0, jnp.bfloat16))).all()


def test_polynorm_keeps_one_copy_of_the_row_for_the_backward_pass():
    norm, z = PolyNorm(), jnp.ones((4, 32))
    _, pull = jax.vjp(lambda v: norm(norm.parameters(32), v), z)
    assert sum(leaf.size for leaf in jax.tree.leaves(pull) if leaf.size >= z.size) == z.size


def test_crrelu_is_relu_at_epsilon_zero_and_dips_to_its_published_minimum():
    z = np.linspace(-5, 5, 10_001)[:, None]
    np.testing.assert_array_equal(apply("crrelu", z, epsilon=0), apply("relu", z))
    h = apply("crrelu", z)
    assert h.min() == pytest.approx(-0.00607, abs=1e-5) and z[h.argmin(), 0] == pytest.approx(-1, abs=2e-3)


def test_the_crrelu_bump_lowers_the_entropy_of_the_output_of_the_identity():
    """G[y] = -int q ln q with q(x) = p(y(x)) y'(x): along eta = x phi(x) its change is negative, on a truncated domain."""
    x = np.linspace(0, 4, 40_001)
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    eta = x * density

    def entropy(t):
        y, slope = x + t * eta, 1 + t * (1 - x * x) * density
        q = np.exp(-y * y / 2) / math.sqrt(2 * math.pi) * slope
        return -np.sum(q * np.log(q)) * (x[1] - x[0])

    assert entropy(0.02) < entropy(0.01) < entropy(0)


def test_xielu_has_slope_beta_on_both_sides_of_zero_and_its_published_minimum():
    h = lambda z: spec("xielu")(spec("xielu").parameters(1), jnp.asarray(z, jnp.float32)[None])[0]  # noqa: E731
    for z in (-1e-4, 0.0, 1e-4):
        assert float(jax.grad(h)(z)) == pytest.approx(0.5, abs=1e-3)
    assert float(jax.grad(h)(-20.0)) == pytest.approx(-0.3, abs=1e-4)
    grid = np.linspace(-3, 1, 8001)[:, None]
    values = apply("xielu", grid)
    assert values.min() == pytest.approx(-0.206, abs=1e-3) and grid[values.argmin(), 0] == pytest.approx(-0.98, abs=0.01)


def test_xielu_starts_at_its_published_alphas_and_reduces_to_relu2():
    parameters = XIelu().parameters(8)
    assert float(jax.nn.softplus(parameters["a_p"])) == pytest.approx(0.8, rel=1e-6)
    assert 0.5 + float(jax.nn.softplus(parameters["a_n"])) == pytest.approx(0.8, rel=1e-6)
    z = jnp.asarray(normal(4, 8), jnp.float32)
    alone = XIelu(beta=0.0)({"a_p": jnp.log(jnp.expm1(jnp.float32(1))), "a_n": jnp.float32(-200)}, z)
    np.testing.assert_allclose(alone, apply("relu2", z), rtol=1e-5, atol=1e-6)


def test_jumprelu_at_threshold_zero_is_relu_and_keeps_values_above_it():
    z = normal(4, 8)
    np.testing.assert_array_equal(apply("jumprelu", z, log_threshold=np.full(8, -np.inf)), apply("relu", z))
    h = apply("jumprelu", [-1.0, 0.4, 0.5, 0.6], log_threshold=np.full(4, np.log(0.5)))
    np.testing.assert_array_equal(h[[0, 1, 3]], np.array([0, 0, 0.6], np.float32))


def test_jumprelu_threshold_gradient_estimates_that_of_the_expectation():
    """d/dtheta E[z 1[z > theta]] = -theta phi(theta) for z ~ N(0, 1)."""
    z = jnp.asarray(normal(500, 2000), jnp.float32)
    jump, log_threshold = JumpRelu(threshold=0.5, bandwidth=0.1), jnp.full((2000,), math.log(0.5))
    slope = jax.grad(lambda p: jump({"log_threshold": p}, z).mean(0).sum())(log_threshold)
    exact = -0.5 * math.exp(-0.125) / math.sqrt(2 * math.pi) * 0.5  # the last factor is d theta / d log theta
    assert float(slope.mean()) == pytest.approx(exact, rel=0.02)


def test_jumprelu_gradient_by_z_is_the_gate_alone():
    z = jnp.asarray([0.4999, 0.5001, 1.0, -1.0])
    slope = jax.grad(lambda v: JumpRelu(threshold=0.5, bandwidth=0.1)({"log_threshold": jnp.log(jnp.float32(0.5))}, v).sum())(z)
    np.testing.assert_array_equal(slope, [0, 1, 1, 0])


def test_series_informed_starts_as_its_base_and_moves_in_every_term():
    z = normal(4, 8)
    for base in ("silu", "gelu", "relu"):
        np.testing.assert_allclose(apply(f"siaf:2,{base}", z), apply(base, z), rtol=1e-6)
    s = SeriesInformed(terms=3)
    assert len(s.parameters(8)) == 9
    gradient = jax.grad(lambda p: jnp.sum(s(p, jnp.asarray(z, jnp.float32)) ** 2))(s.parameters(8))
    assert all(gradient[f"c_{i}"] != 0 for i in (1, 2, 3))


def test_series_of_two_relus_can_be_the_absolute_value_or_the_identity():
    z = normal(4, 8)
    np.testing.assert_allclose(apply("siaf:2,relu", z, c_1=1, c_2=1), np.abs(z), rtol=1e-6)
    np.testing.assert_allclose(apply("siaf:2,relu", z, c_1=1, c_2=-1), z, rtol=1e-6)


@pytest.mark.parametrize("base", ["xielu", "swiglu", "topk", "siluu"])
def test_a_series_refuses_a_base_that_is_not_elementwise(base):
    with pytest.raises(ConfigError, match="siaf: base"):
        spec(f"siaf:2,{base}")


def test_proact_is_relu_for_a_large_bound_half_at_the_bound_and_zero_far_above():
    z = normal(4, 8)
    np.testing.assert_array_equal(apply("proact", z, bound=1e6), apply("relu", z))
    np.testing.assert_allclose(apply("proact", [6.0]), [3.0], rtol=1e-6)
    np.testing.assert_array_equal(apply("proact", [20.0, 3e38, -5.0]), [0, 0, 0])
    below = np.linspace(0.1, 5, 50)
    np.testing.assert_allclose(apply("proact", below), below, rtol=1e-6)


def test_proact_bound_gradient_is_never_negative_and_may_be_per_unit():
    z, act = jnp.asarray(5 + normal(40, 6), jnp.float32), ProAct(per_unit=True)
    assert act.parameters(6)["bound"].shape == (6,)
    slope = jax.grad(lambda p: act(p, z).sum())(act.parameters(6))["bound"]
    assert (slope >= 0).all() and (slope > 0).any()


def test_proact_bounds_a_flipped_exponent_bit():
    z = normal(1, 64).astype(np.float32)
    z.view(np.uint32)[0, 5] ^= 1 << 30
    assert np.abs(apply("proact", z)).max() <= 6 and np.isfinite(apply("proact", z)).all()


def test_topk_of_everything_is_relu_bit_for_bit():
    z = jnp.asarray(normal(4, 32), jnp.float32)
    for name in ("topk:1.0", "topk:k=32", "block_topk:1.0"):
        np.testing.assert_array_equal(jax.jit(lambda v, s=spec(name): s({}, v))(z), jax.jit(jax.nn.relu)(z))
    np.testing.assert_array_equal(spec("stat_topk:1.0")({}, z), z)


def test_topk_keeps_k_of_the_positive_entries_and_gives_no_gradient_to_the_others():
    z = jnp.asarray(normal(20, 64), jnp.float32)

    def summed(v):
        h = spec("topk:k=8")({}, v)
        return h.sum(), h

    slope, h = jax.jit(jax.grad(summed, has_aux=True))(z)
    assert ((np.asarray(h) > 0).sum(-1) == 8).all()
    np.testing.assert_array_equal(slope, h > 0)
    few = np.asarray(z) - 2
    np.testing.assert_array_equal(apply("topk:k=8", few)[(few > 0).sum(-1) <= 8], np.maximum(few, 0)[(few > 0).sum(-1) <= 8])


def test_half_of_the_units_fire_at_a_symmetric_start_and_topk_fires_its_fraction():
    z = normal(100, 1000)
    assert abs(np.mean(apply("relu", z) != 0) - 0.5) < 0.01
    assert np.mean(apply("topk:0.05", z) != 0) == 0.05


def test_a_dense_gradient_at_random_init_pushes_active_units_down():
    """Why sparsity emerges (lazy neuron): E_V[d loss / d a_i] = C v a_i for loss |V a - y|^2 / 2, V[C, F] iid of variance v."""
    rng = np.random.default_rng(0)
    a, y = np.maximum(rng.standard_normal(24), 0), rng.standard_normal(16)
    draws = rng.standard_normal((4000, 16, 24)) * 0.5
    gradients = np.einsum("nci,nc->ni", draws, draws @ a - y)
    error = gradients.std(0) / math.sqrt(len(draws))
    assert (np.abs(gradients.mean(0) - 16 * 0.25 * a) < 5 * error).all()


def test_block_topk_keeps_whole_blocks_of_the_largest_energy():
    z = np.zeros((1, 8), np.float32)
    z[0] = [1, 1, 0, -9, 2, 0, 0, 0.5]
    np.testing.assert_array_equal(apply("block_topk:0.25,2", z), [[0, 0, 0, 0, 2, 0, 0, 0]])
    np.testing.assert_array_equal(apply("block_topk:0.5,2", z), [[1, 1, 0, 0, 2, 0, 0, 0]])


def test_widths_that_do_not_fit_are_refused_before_any_device_work():
    spec("topk:k=8").validate(8, "model.ffn.activation")
    with pytest.raises(ConfigError, match="model.ffn.activation.*9.*8"):
        spec("topk:k=9").validate(8, "model.ffn.activation")
    with pytest.raises(ConfigError, match="model.ffn.activation.*block.*24"):
        spec("block_topk:0.5,16").validate(24, "model.ffn.activation")


OUT_OF_RANGE = [
    "topk:0", "topk:1.5", "topk:k=-1", "stat_topk:-0.1", "block_topk:0.5,0", "fatrelu:-1", "jumprelu:0", "jumprelu:0.1,0",
    "xielu:0", "xielu:0.8,0.5", "polyrelu:0", "polynorm:0", "siaf:0", "proact:0", "proact:6,0",
]  # fmt: skip


@pytest.mark.parametrize("text", OUT_OF_RANGE)
def test_values_outside_their_range_are_refused_by_name(text):
    with pytest.raises(ConfigError, match=text.split(":")[0]):
        spec(text)
