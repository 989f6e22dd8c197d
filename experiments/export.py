"""Write a model as a folder that loads elsewhere.

    python -m experiments.train --config configs/qat_int8_tiny.py --out runs/qat
    python -m experiments.export --model runs/qat --out runs/qat_packed               # ours, weights at their true bits
    python -m experiments.export --model smollm2-135m --format hf --out runs/smollm2  # for Hugging Face transformers
    python -m experiments.export --model runs/int4 --format gptq --out runs/gptq        # quantized maps, as others read them
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments import entry
from sparsejax.plugs import check


@dataclass
class Flags:
    model: str = entry.flag("", "name or path of the model")
    out: str = entry.flag("", "new folder")
    format: str = entry.flag(
        "model", "model (ours), hf (safetensors, config.json, tokenizer and model card), or hf with quantized maps: "
        "compressed-tensors, gptq, gptq_v2, awq"
    )  # fmt: skip
    dtype: str = entry.flag("float32", "float32 or bfloat16: of matrices, embeddings and biases")


def main(call: entry.Call[Flags]) -> dict[str, Any]:
    flags = call.flags
    for name in ("model", "out"):
        check(getattr(flags, name), f"--{name}", "", "give a name or a folder")
    from sparsejax.compress.export_model import export_model

    return export_model(flags.model, flags.out, format=flags.format, dtype=flags.dtype, command=call.command)


if __name__ == "__main__":
    entry.run(main, Flags, config=False)
