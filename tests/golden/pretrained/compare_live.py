"""Loads what we exported with `transformers` and compares logits; see export_live.py for the two commands.

Prints per model the largest difference in float32 (bar: 1e-5), and of our bfloat16 logits the KL divergence per token from the
reference's float32 ones and how often the most likely token agrees. Exit status 1 if a bar is missed.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

FLOAT32_BAR, KL_BAR = 1e-5, 1e-3


def compare(folder: Path) -> bool:
    """Print the comparison of one model; whether it holds."""
    ours = np.load(folder / "ours.npz")
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    unclean = {kind: list(names) for kind, names in loading.items() if names}
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(ours["tokens"]).long(), use_cache=False).logits
    error = np.abs(expected.numpy() - ours["float32"]).max()
    exact, half = (torch.log_softmax(logits.double(), -1) for logits in (expected, torch.from_numpy(ours["bfloat16"])))
    divergence = (exact.exp() * (exact - half)).sum(-1).mean().item()
    agreement = (exact.argmax(-1) == half.argmax(-1)).double().mean().item()
    half_text = f"bfloat16 KL {divergence:.1e} nats per token, argmax {agreement:.1%}"
    print(f"{folder.name}: float32 {error:.1e}; {half_text} {unclean or ''}")
    return error <= FLOAT32_BAR and divergence <= KL_BAR and not unclean


if __name__ == "__main__":
    torch.set_num_threads(1)
    folders = sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir())
    sys.exit(0 if all([compare(folder) for folder in folders]) else 1)
