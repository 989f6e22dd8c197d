"""A Llama of a few thousand random parameters as a Hugging Face folder."""

import json

import numpy as np

from sparsejax.io.safetensors_file import write_safetensors

CONFIG = {
    "model_type": "llama", "vocab_size": 264, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "tie_word_embeddings": True, "rope_theta": 1e4,
}  # fmt: skip


def tensors(seed=0, layers=3):
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (264, 16), "model.norm.weight": (16,)}
    for layer in range(layers):
        within = {
            "input_layernorm": (16,), "post_attention_layernorm": (16,), "self_attn.q_proj": (16, 16),
            "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16), "self_attn.o_proj": (16, 16), "mlp.gate_proj": (24, 16),
            "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
        }  # fmt: skip
        shapes.update({f"model.layers.{layer}.{name}.weight": shape for name, shape in within.items()})
    return {name: rng.normal(size=shape).astype(np.float32) * shape[-1] ** -0.5 for name, shape in shapes.items()}


def write(folder, arrays=None, **config):
    arrays = tensors() if arrays is None else arrays
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    write_safetensors(folder, [(name, a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()])
    return folder
