"""Records what tiny random decoders of the `transformers` library compute, for tests/models/families/test_decoder_families.py.

    python -m venv reference && reference/bin/pip install transformers==5.23.0 torch==2.13.0
    reference/bin/python tests/golden/pretrained/record_decoders.py [NAME ...]

Each folder of decoders/ is a checkpoint as the library saves it (config.json, model.safetensors) with reference.npz: tokens
int32[B, T] and float32 logits of eager attention on CPU. Norms, biases and all other weights are far from their initial values.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

FOLDER = Path(__file__).parent / "decoders"
BATCH, LENGTH = 2, 24

_TINY = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=48)
_GEMMA = dict(_TINY, head_dim=8, num_hidden_layers=3, vocab_size=64, pad_token_id=0)
_NEOX = dict(vocab_size=64, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
             max_position_embeddings=48)
_OPT = dict(vocab_size=64, hidden_size=16, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=40)
_LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=16, rope_theta=500.0)

# name -> (class of the config, arguments)
CASES = {
    "llama": ("LlamaConfig", dict(_TINY, rms_norm_eps=1e-5)),
    "llama_scaled_biased": ("LlamaConfig", dict(_TINY, rope_parameters=_LLAMA3, attention_bias=True, mlp_bias=True,
                                                tie_word_embeddings=True, head_dim=8)),
    "arcee": ("ArceeConfig", dict(_TINY, num_key_value_heads=4, rope_parameters=dict(rope_type="default", rope_theta=1e4))),
    "mistral": ("MistralConfig", dict(_TINY, sliding_window=7)),
    "qwen2": ("Qwen2Config", dict(_TINY, rope_parameters=dict(rope_type="default", rope_theta=1e6), tie_word_embeddings=True)),
    "qwen2_window": ("Qwen2Config", dict(_TINY, num_hidden_layers=3, use_sliding_window=True, sliding_window=5,
                                         max_window_layers=1)),
    "qwen3": ("Qwen3Config", dict(_TINY, head_dim=8)),
    "gemma2": ("Gemma2Config", dict(_GEMMA, query_pre_attn_scalar=11, sliding_window=6, attn_logit_softcapping=2.0,
                                    final_logit_softcapping=3.0)),
    "gemma3_text": ("Gemma3TextConfig", dict(
        _GEMMA, query_pre_attn_scalar=13, sliding_window=6, layer_types=["sliding_attention"] * 2 + ["full_attention"],
        rope_parameters=dict(full_attention=dict(rope_type="linear", factor=4.0, rope_theta=700.0),
                             sliding_attention=dict(rope_type="default", rope_theta=90.0)))),
    "gpt2": ("GPT2Config", dict(vocab_size=64, n_embd=16, n_inner=40, n_layer=2, n_head=4, n_positions=40)),
    "opt": ("OPTConfig", _OPT),
    "opt_post_norm": ("OPTConfig", dict(_OPT, do_layer_norm_before=False, enable_bias=False)),
    "gpt_neox": ("GPTNeoXConfig", dict(_NEOX, rope_parameters=dict(rope_theta=300.0, partial_rotary_factor=0.5))),
    "gpt_neox_sequential": ("GPTNeoXConfig", dict(_NEOX, use_parallel_residual=False, attention_bias=False,
                                                  tie_word_embeddings=True)),
}


def record(name: str) -> None:
    """Write one folder."""
    class_name, arguments = CASES[name]
    torch.manual_seed(sorted(CASES).index(name))
    config = getattr(transformers, class_name)(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    draw(model)
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, config.vocab_size, (BATCH, LENGTH), dtype=np.int32)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens).long(), use_cache=False).logits
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    model.save_pretrained(FOLDER / name)
    (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
    (FOLDER / name / "model.safetensors").chmod(0o644)
    np.savez_compressed(FOLDER / name / "reference.npz", tokens=tokens, logits=logits.numpy().astype(np.float32))
    largest = max(path.stat().st_size for path in (FOLDER / name).iterdir())
    print(f"{name}: logits std {logits.std():.2f}, largest file {largest} bytes")


@torch.no_grad()
def draw(model: torch.nn.Module) -> None:
    """Weights that make every part matter: maps keep the size of what passes them, norms and biases are not 1 and 0."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
            parameter.normal_(0, min(parameter.shape) ** -0.5)
        elif parameter.ndim == 2:
            parameter.normal_(0, 0.5)
        else:
            parameter.add_(0.3 * torch.randn_like(parameter))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for wanted in sys.argv[1:] or CASES:
        record(wanted)
    total = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
    print(f"{total} bytes in all")
