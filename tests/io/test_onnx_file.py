"""ONNX files: initializers of every kind, the DINOv2 layout by its graph, the real file against onnxruntime, and damage."""

import runpy
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf

from sparsejax.io import hub
from sparsejax.io.onnx_file import DTYPES, OnnxFile
from sparsejax.io.onnx_layouts import as_hf
from sparsejax.plugs import ConfigError

GOLDEN = Path(__file__).parent.parent / "golden" / "pretrained"
CODES = {dtype: code for code, (dtype, _) in DTYPES.items()}


def varint(value: int) -> bytes:
    low, rest = value & 0x7F, (value & (2**64 - 1)) >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def field(number: int, value) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def message(*fields) -> bytes:
    return b"".join(field(number, value) for number, value in fields)


def tensor(name: str, array: np.ndarray) -> bytes:
    return message(*((1, size) for size in array.shape), (2, CODES[array.dtype]), (8, name), (9, array.tobytes()))


def node(op: str, inputs, outputs, value: np.ndarray | None = None) -> bytes:
    attribute = [] if value is None else [(5, message((1, "value"), (5, tensor("", value))))]
    return message(*((1, name) for name in inputs), *((2, name) for name in outputs), (4, op), *attribute)


def model(nodes, initializers) -> bytes:
    graph = message(*((1, n) for n in nodes), (2, "main"), *((5, i) for i in initializers))
    return message((1, 7), (2, "pytorch"), (7, graph), (8, message((2, 14))))


def opened(tmp_path: Path, content: bytes, name: str = "m.onnx") -> OnnxFile:
    (tmp_path / name).write_bytes(content)
    return OnnxFile(tmp_path / name)


def dino(layers: int = 2, d: int = 8, f: int = 12, patch: int = 2, side: int = 3, heads: int = 2, matrix_names=None):
    """Nodes and initializers as PyTorch exports them, with matrices under names that say nothing; and what that model is."""
    random = np.random.RandomState(0)
    nodes, initializers, expected = [], {}, {}
    free_names = iter(matrix_names or (f"onnx::MatMul_{n}" for n in range(100, 900)))

    def add(name: str, *shape: int) -> None:
        expected[name] = random.standard_normal(shape).astype(np.float32)
        initializers[f"backbone.{name}"] = expected[name]

    def linear(name: str, into: int, out: int) -> None:
        add(f"{name}.bias", out)
        expected[f"{name}.weight"] = random.standard_normal((out, into)).astype(np.float32)
        free = next(free_names)
        initializers[free] = np.ascontiguousarray(expected[f"{name}.weight"].T)
        nodes.append(node("MatMul", ["hidden", free], [f"{name}/product"]))
        nodes.append(node("Add", [f"backbone.{name}.bias", f"{name}/product"], [f"{name}/sum"]))

    add("embeddings.cls_token", 1, 1, d)
    add("embeddings.patch_embeddings.projection.weight", d, 3, patch, patch)
    add("embeddings.patch_embeddings.projection.bias", d)
    for index in range(layers):
        layer = f"encoder.layer.{index}"
        for name in ("norm1", "norm2"):
            add(f"{layer}.{name}.weight", d)
            add(f"{layer}.{name}.bias", d)
        for name in ("key", "value", "query"):
            linear(f"{layer}.attention.attention.{name}", d, d)
        for name, size in (("heads", heads), ("head_size", d // heads)):
            nodes.append(node("Constant", [], [f"{layer}/{name}"], np.array([size])))
        nodes.append(node("Concat", ["batch", "length", f"{layer}/heads", f"{layer}/head_size"], [f"{layer}/split"]))
        nodes.append(node("Reshape", [f"{layer}.attention.attention.query/sum", f"{layer}/split"], [f"{layer}/queries"]))
        linear(f"{layer}.attention.output.dense", d, d)
        linear(f"{layer}.mlp.fc1", d, f)
        linear(f"{layer}.mlp.fc2", f, d)
        add(f"{layer}.layer_scale1.lambda1", d)
        add(f"{layer}.layer_scale2.lambda1", d)
    add("layernorm.weight", d)
    add("layernorm.bias", d)
    positions = random.standard_normal((1, side * side + 1, d)).astype(np.float32)
    expected["embeddings.position_embeddings"] = positions
    initializers |= {"onnx::Concat_1": positions[:, :1].copy(), "onnx::Reshape_2": positions[:, 1:].copy()}
    initializers["decoder.upconv1.weight"] = np.zeros((d, 2, 4, 4), np.float32)
    nodes += [node("Concat", ["onnx::Concat_1", "resized"], ["positions"]), node("Reshape", ["onnx::Reshape_2", "grid"], ["g"])]
    return nodes, initializers, expected


def dino_file(nodes, initializers) -> bytes:
    return model(nodes, [tensor(name, array) for name, array in initializers.items()])


def test_the_dinov2_layout_is_read_by_its_graph_and_not_by_its_numbers(tmp_path):
    nodes, initializers, expected = dino(matrix_names=[f"onnx::MatMul_{n}" for n in np.random.RandomState(1).permutation(500)])
    config, source = as_hf(opened(tmp_path, dino_file(nodes, initializers)))
    assert source.tensors.keys() == expected.keys()
    for name, array in expected.items():
        read = source.read(name)
        np.testing.assert_array_equal(read, array, err_msg=name)
        assert source.tensors[name] == (array.shape, array.dtype) and read.flags.c_contiguous
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 1.5, "image_size": 6}
    assert config["model_type"] == "dinov2" and config["patch_size"] == 2 and sizes.items() <= config.items()
    assert config["head"] == ["decoder.upconv1.weight"]
    assert config["preprocessor_config"]["image_mean"] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.pop("backbone.embeddings.patch_embeddings.projection.weight"), "unknown layout"),
        (lambda i: i.pop("backbone.encoder.layer.1.norm2.bias"), "encoder.layer.1.norm2.bias.*missing for 2 layers"),
        (lambda i: i.update({"backbone.encoder.layer.1.extra": np.zeros(3, np.float32)}), "not part of DINOv2"),
        (lambda i: i.update({"nobody_reads_me": np.zeros(3, np.float32)}), "initializer = 'nobody_reads_me'"),
        (lambda i: i.update({"backbone.layernorm.bias": np.zeros(3, np.float32)}), r"layernorm.bias = \(3,\): expected the sh"),
        (lambda i: i.pop("onnx::Concat_1"), "position_embeddings"),
        (lambda i: i.pop("onnx::MatMul_105"), "encoder.layer.0.mlp.fc2.weight"),
        (lambda i: i.pop("onnx::MatMul_104"), "encoder.layer.0.mlp.fc1.weight"),
        (lambda i: i.update({"onnx::Reshape_2": np.zeros((1, 9, 7), np.float32)}), "position_embeddings"),
    ],
)
def test_another_layout_is_refused_by_tensor(tmp_path, change, message):
    nodes, initializers, _ = dino()
    change(initializers)
    with pytest.raises(ConfigError, match=message):
        as_hf(opened(tmp_path, dino_file(nodes, initializers)))


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path):
    nodes, initializers, _ = dino(heads=3)
    with pytest.raises(ConfigError, match="into heads"):
        as_hf(opened(tmp_path, dino_file(nodes, initializers)))


@given(st.sampled_from(sorted(CODES.items(), key=lambda item: item[1])), st.lists(st.integers(0, 3), max_size=3), st.data())
def test_values_are_the_same_from_raw_bytes_and_from_packed_fields(tmp_path_factory, kind, shape, data):
    (dtype, code), own = kind, DTYPES[kind[1]][1]
    raw = data.draw(st.binary(min_size=64 * 8, max_size=64 * 8))
    array = np.frombuffer(raw, np.uint8)[: int(np.prod(shape)) * dtype.itemsize]
    array = (array % 2 if dtype == np.bool_ else array).view(dtype).reshape(shape)
    if own in (4, 10):
        packed = array.tobytes()
    else:
        numbers = array if dtype.kind in "iub" else array.view(f"u{dtype.itemsize}")
        packed = b"".join(varint(int(number)) for number in numbers.ravel())
    dims = b"".join(varint(size) for size in shape)
    by_field = message((8, "x"), (own, packed), (2, code), (1, dims)) if shape else message((8, "x"), (own, packed), (2, code))
    folder = tmp_path_factory.mktemp("values")
    for content in (tensor("x", array), by_field):
        read = opened(folder, model([], [content])).read("x")
        assert (read.shape, read.dtype, read.tobytes()) == (array.shape, array.dtype, array.tobytes())


RAW4 = bytes(4)
FLOAT = [(1, 1), (2, 1), (8, "x")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x08", "truncated"),
        (b"\xff" * 20, "does not end"),
        (b"\x0b", "wire type 3"),
        (message((1, 7)), "holds 0 graphs"),
        (message((7, b""), (7, b"")), "holds 2 graphs"),
        (varint(7 << 3 | 2) + varint(2**62) + b"abc", "claims 4611686018427387904 bytes where 3 are left"),
        (model([], [message(*FLOAT, (9, bytes(3)))]), "x: shape"),
        (model([], [message((1, 10**9), (2, 1), (8, "x"), (9, RAW4))]), "1000000000 values of float32, but 1 are there"),
        (model([], [message((1, 2**63), (1, 2**63), (2, 1), (8, "x"), (9, RAW4))]), "x: shape"),
        (model([], [message((1, 2**62), (1, 0), (2, 1), (8, "x"))]), "x: shape"),
        (model([], [message(*[(1, 1)] * 40, (2, 1), (8, "x"), (9, RAW4))]), "x: shape"),
        (model([], [message((1, 2), (2, 7), (8, "x"), (7, b"\x80\x80\x01"))]), "2 values of int64, but 1 are there"),
        (model([], [message((1, 1), (2, 8), (8, "x"), (6, b"text"))]), "data type 8"),
        (model([], [message(*FLOAT, (4, RAW4), (9, RAW4))]), "x: fields"),
        (model([], [message(*FLOAT, (5, RAW4))]), "x: fields"),
        (model([], [message(*FLOAT, (4, 1))]), "one by one"),
        (model([], [message(*FLOAT, (9, RAW4), (9, RAW4))]), "one by one"),
        (model([], [message(*FLOAT, (13, message((1, "location"), (2, "/etc/passwd"))), (14, 1))]), "another file"),
        (model([], [message((1, 1), (2, 1), (9, RAW4))]), "has no name"),
        (model([], [message(*FLOAT, (9, RAW4))] * 2), "has no name, or another's"),
        (model([], [message((1, 1), (2, 1), (8, b"\xff"), (9, RAW4))]), "not UTF-8"),
        (model([], [message((1, 1), (2, 1), (8, 5), (9, RAW4))]), "a name is stored as a number"),
        (message((7, message((15, b"")))), "sparse"),
    ],
)
def test_a_bad_file_is_refused_by_file_and_tensor(tmp_path, content, message):
    tracemalloc.start()
    with pytest.raises(ConfigError) as error:
        opened(tmp_path, content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in str(error.value) and "m.onnx" in str(error.value)
    assert peak < 2**20


def test_a_missing_and_an_empty_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        OnnxFile(tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match="is empty"):
        opened(tmp_path, b"")


def test_an_unknown_name_gets_the_nearest(tmp_path):
    file = opened(tmp_path, model([], [tensor("weight", np.zeros(2, np.float32))]))
    with pytest.raises(ConfigError, match="Did you mean 'weight'"):
        file.read("wieght")


def read_everything(folder: Path, content: bytes) -> None:
    try:
        file = opened(folder, content)
        for name in file.tensors:
            file.read(name)
        _, source = as_hf(file)
        for name in source.tensors:
            source.read(name)
    except ConfigError as error:
        assert "m.onnx" in str(error)


def test_every_truncation_of_the_graph_is_refused(tmp_path):
    whole = dino_file(*dino(layers=1, d=4, f=4)[:2])
    end = whole.rindex(message((8, message((2, 14)))))  # behind the graph any field may be missing
    for length in range(0, end, 11):
        with pytest.raises(ConfigError, match=r"m\.onnx"):
            opened(tmp_path, whole[:length])


@settings(max_examples=150)
@given(st.data())
def test_flipped_bits_are_survived(tmp_path_factory, data):
    whole = bytearray(dino_file(*dino(layers=1, d=2, f=2, heads=1)[:2]))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    read_everything(tmp_path_factory.getbasetemp(), bytes(whole))


@given(st.binary(max_size=80))
def test_any_bytes_are_survived(tmp_path_factory, content):
    for wrapped in (content, message((7, content)), model([], [content]), model([content], [])):
        read_everything(tmp_path_factory.getbasetemp(), wrapped)


def cubic_resizing(size: int, out: int) -> np.ndarray:
    """float64[out, size]: bicubic, a = -0.75, half-pixel centres, edges repeated."""
    a, matrix = -0.75, np.zeros((out, size))
    for row in range(out):
        centre = (row + 0.5) * size / out - 0.5
        first = int(np.floor(centre))
        for column in range(first - 1, first + 3):
            x = abs(centre - column)
            near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            matrix[row, min(max(column, 0), size - 1)] += near if x <= 1 else far
    return matrix


def dinov2(config, read, images: np.ndarray) -> np.ndarray:
    """Last hidden state behind the final norm, float32[B, T, D]: the slow and plain forward pass."""
    batch, channels, height, width = images.shape
    d, patch, heads = config["hidden_size"], config["patch_size"], config["num_attention_heads"]
    rows, columns = height // patch, width // patch

    def linear(x, name):
        return x @ read(f"{name}.weight").T + read(f"{name}.bias")

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + config["layer_norm_eps"])
        return x * read(f"{name}.weight") + read(f"{name}.bias")

    def split(x):
        return x.reshape(batch, -1, heads, d // heads).swapaxes(1, 2)

    patches = images.reshape(batch, channels, rows, patch, columns, patch).transpose(0, 2, 4, 1, 3, 5)
    kernel = read("embeddings.patch_embeddings.projection.weight").reshape(d, -1)
    x = patches.reshape(batch, rows * columns, -1) @ kernel.T + read("embeddings.patch_embeddings.projection.bias")
    positions = read("embeddings.position_embeddings")[0]
    side = config["image_size"] // patch
    grid = np.einsum("ri,cj,ijd->rcd", cubic_resizing(side, rows), cubic_resizing(side, columns),
                     positions[1:].reshape(side, side, d)).astype(np.float32)  # fmt: skip
    first = np.broadcast_to(read("embeddings.cls_token") + positions[0], (batch, 1, d))
    x = np.concatenate([first, x + grid.reshape(-1, d)], 1)
    for index in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{index}"
        h = norm(x, f"{layer}.norm1")
        q, k, v = (split(linear(h, f"{layer}.attention.attention.{name}")) for name in ("query", "key", "value"))
        scores = q @ k.swapaxes(2, 3) / np.sqrt(np.float32(d // heads))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(batch, -1, d)
        x = x + read(f"{layer}.layer_scale1.lambda1") * linear(mixed, f"{layer}.attention.output.dense")
        h = linear(norm(x, f"{layer}.norm2"), f"{layer}.mlp.fc1")
        h = h * (1 + erf(h / np.sqrt(np.float32(2)))) / 2
        x = x + read(f"{layer}.layer_scale2.lambda1") * linear(h, f"{layer}.mlp.fc2")
    return norm(x, "layernorm")


def test_the_real_file_gives_what_onnxruntime_gives():
    try:
        located = hub.resolve("dinov2-vits14-focus")
    except ConfigError as error:
        pytest.skip(str(error))
    config, source = as_hf(OnnxFile(located.path))
    golden = np.load(GOLDEN / "dinov2_focus.npz")
    images = runpy.run_path(str(GOLDEN / "record_dinov2.py"))["images"](int(golden["seed"]))
    features = dinov2(config, source.read, images)
    assert np.abs(features[:, golden["tokens"]] - golden["features"]).max() <= 1e-4
    assert np.abs(features.mean(1) - golden["mean"]).max() <= 1e-5


def test_a_bfloat16_weight_is_a_view_of_the_file(tmp_path):
    array = np.ones((64, 1024), ml_dtypes.bfloat16)
    content = model([], [tensor("x", array)])
    (tmp_path / "m.onnx").write_bytes(content)
    tracemalloc.start()
    read = OnnxFile(tmp_path / "m.onnx").read("x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (read == array).all() and not read.flags.writeable and peak < array.nbytes / 2
