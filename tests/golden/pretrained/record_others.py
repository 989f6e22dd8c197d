"""Records what tiny random models of the `transformers` library compute, for tests/models/families/test_other_families.py.

    python -m venv reference && reference/bin/pip install transformers==5.23.0 torch==2.13.0
    reference/bin/python tests/golden/pretrained/record_others.py [NAME ...]
    reference/bin/python tests/golden/pretrained/record_others.py minilm FOLDER

Each folder of others/ is a checkpoint as the library saves it (config.json, model.safetensors) with reference.npz: inputs and
what the model gives for them, float32, eager attention on CPU (`gemma3n_ffn`: the feed-forward networks alone). Norms, biases
and all other weights are far from their initial values. `minilm` records minilm.npz for the all-MiniLM-L6-v2 in FOLDER.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "others"
BATCH, LENGTH, VOCAB = 2, 20, 64
SENTENCES = ("Sparse models do less work.", "The cat sat on the mat, and it would not be moved by anyone.")

_TINY = dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=48)
_EXPERTS = dict(_TINY, num_experts=4, num_experts_per_tok=2)
_BERT = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=32)
_VIT = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4)
_T5 = dict(vocab_size=VOCAB, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=2, relative_attention_num_buckets=8,
           relative_attention_max_distance=12)

# name -> (class, arguments of its config)
CASES = {
    "mixtral": ("MixtralForCausalLM", dict(_TINY, intermediate_size=24, num_local_experts=4)),
    "mixtral_window": ("MixtralForCausalLM", dict(_TINY, intermediate_size=24, num_local_experts=3, sliding_window=6,
                                                  num_hidden_layers=1, rope_theta=500.0)),
    "qwen2_moe": ("Qwen2MoeForCausalLM", dict(_EXPERTS, intermediate_size=40, moe_intermediate_size=8, num_hidden_layers=3,
                                              shared_expert_intermediate_size=16, mlp_only_layers=[1])),
    "qwen2_moe_renormalised": ("Qwen2MoeForCausalLM", dict(
        _EXPERTS, intermediate_size=40, moe_intermediate_size=8, shared_expert_intermediate_size=8, norm_topk_prob=True,
        qkv_bias=False, use_sliding_window=True, sliding_window=5,
        layer_types=["full_attention", "sliding_attention"])),
    "qwen3_moe": ("Qwen3MoeForCausalLM", dict(_EXPERTS, intermediate_size=40, moe_intermediate_size=8, head_dim=8,
                                              norm_topk_prob=True, decoder_sparse_step=2, num_hidden_layers=4)),
    "olmoe": ("OlmoeForCausalLM", dict(_EXPERTS, intermediate_size=24)),
    "bert_masked_lm": ("BertForMaskedLM", _BERT),
    "bert_model": ("BertModel", dict(_BERT, hidden_act="gelu_new", layer_norm_eps=1e-5)),
    "vit": ("ViTForImageClassification", dict(_VIT, intermediate_size=24, num_labels=5, num_channels=1)),
    "vit_model": ("ViTModel", dict(_VIT, intermediate_size=24, qkv_bias=False)),
    "dinov2": ("Dinov2Model", dict(_VIT, mlp_ratio=2)),
    "dinov2_swiglu": ("Dinov2Model", dict(_VIT, mlp_ratio=4, use_swiglu_ffn=True, num_hidden_layers=1)),
    "t5": ("T5ForConditionalGeneration", dict(_T5, num_decoder_layers=3)),
    "t5_v1_1": ("T5ForConditionalGeneration", dict(_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
}  # fmt: skip
LAYERS_OF_GEMMA3N, SPARSITY = 3, [0.95, 0.8, 0.0]


def record(name: str) -> None:
    """Write one folder."""
    class_name, arguments = CASES[name]
    torch.manual_seed(sorted(CASES).index(name))
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**arguments)
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    draw(model)
    if name == "t5_v1_1":  # published files have a head of their own, which this class would tie
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    inputs = INPUTS[config.model_type](np.random.default_rng(0), config)
    outputs = run(model, inputs)
    if config.model_type in ("vit", "dinov2"):
        interpolated = np.random.default_rng(1).standard_normal((1, config.num_channels, 20, 16), np.float32)
        inputs["interpolated_values"] = interpolated
        also = {"interpolate_pos_encoding": True} if config.model_type == "vit" else {}
        outputs["interpolated"] = run(model, {"pixel_values": interpolated}, **also)["output"]
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    model.save_pretrained(FOLDER / name)
    (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
    if name == "t5_v1_1":
        as_published(model, FOLDER / name)
    write(name, {**inputs, **outputs})


@torch.no_grad()
def run(model: torch.nn.Module, inputs: dict[str, np.ndarray], **also: bool) -> dict[str, np.ndarray]:
    """`output`: the logits, or the last hidden state where the model has no head."""
    tensors = {key: torch.from_numpy(value.astype(np.int64) if value.dtype == np.int32 else value)
               for key, value in inputs.items()}  # fmt: skip
    found = model(**tensors, **also)
    output = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return {"output": output.numpy().astype(np.float32)}


def _tokens(generator: np.random.Generator, config: transformers.PreTrainedConfig) -> dict[str, np.ndarray]:
    return {"input_ids": generator.integers(1, VOCAB, (BATCH, LENGTH), dtype=np.int32)}


def _padded(generator: np.random.Generator, length: int = LENGTH) -> np.ndarray:
    """1 at tokens, 0 at the padding behind the second row's."""
    mask = np.ones((BATCH, length), np.int32)
    mask[1, length - 6 :] = 0
    return mask


def _bert(generator: np.random.Generator, config: transformers.PreTrainedConfig) -> dict[str, np.ndarray]:
    types = (np.arange(LENGTH) >= 9).astype(np.int32)
    inputs = {**_tokens(generator, config), "token_type_ids": np.stack([types, types])}
    return {**inputs, "attention_mask": _padded(generator)}


def _pixels(generator: np.random.Generator, config: transformers.PreTrainedConfig) -> dict[str, np.ndarray]:
    size = (BATCH, config.num_channels, config.image_size, config.image_size)
    return {"pixel_values": generator.standard_normal(size, np.float32)}


def _pair(generator: np.random.Generator, config: transformers.PreTrainedConfig) -> dict[str, np.ndarray]:
    target = generator.integers(1, VOCAB, (BATCH, 15), dtype=np.int32)
    return {**_tokens(generator, config), "attention_mask": _padded(generator), "decoder_input_ids": target}


INPUTS = {"bert": _bert, "vit": _pixels, "dinov2": _pixels, "t5": _pair, **dict.fromkeys(
    ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"), _tokens)}  # fmt: skip


@torch.no_grad()
def draw(model: torch.nn.Module) -> None:
    """Weights that make every part matter: maps keep the size of what passes them, routers decide, norms are not 1 and 0."""
    for name, parameter in model.named_parameters():
        if "embeddings" in name or "shared" in name or "embed_tokens" in name or "relative_attention_bias" in name:
            parameter.normal_(0, 0.7)
        elif name.endswith("mlp.gate.weight"):
            parameter.normal_(0, 0.6)
        elif parameter.ndim >= 2:
            fan_in = parameter[0].numel() if parameter.ndim != 3 else parameter.shape[-1]
            parameter.normal_(0, 0.8 * fan_in**-0.5)
        else:
            parameter.add_(0.3 * torch.randn_like(parameter))


def as_published(model: torch.nn.Module, folder: Path) -> None:
    """T5 v1.1 as its files were published: `tie_word_embeddings` false and the head in the file."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if ".embed_tokens." not in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = False
    del config["scale_decoder_outputs"]
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def record_gemma3n() -> None:
    """The feed-forward networks of Gemma 3n alone, one for each sparsity, under their names in a checkpoint."""
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

    torch.manual_seed(0)
    config = transformers.Gemma3nTextConfig(
        hidden_size=16, intermediate_size=64, num_hidden_layers=LAYERS_OF_GEMMA3N, activation_sparsity_pattern=SPARSITY,
        num_kv_shared_layers=0)  # fmt: skip
    x = torch.randn(BATCH, LENGTH, 16)
    tensors, outputs = {}, []
    with torch.no_grad():
        for layer in range(LAYERS_OF_GEMMA3N):
            mlp = Gemma3nTextMLP(config, layer).eval()
            draw(mlp)
            outputs.append(mlp(x).numpy())
            tensors |= {f"model.layers.{layer}.mlp.{name}": tensor for name, tensor in mlp.state_dict().items()}
    folder = FOLDER / "gemma3n_ffn"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write("gemma3n_ffn", {"x": x.numpy(), "output": np.stack(outputs)})


def write(name: str, arrays: dict[str, np.ndarray]) -> None:
    (FOLDER / name / "model.safetensors").chmod(0o644)
    np.savez_compressed(FOLDER / name / "reference.npz", **arrays)
    largest = max(path.stat().st_size for path in (FOLDER / name).iterdir())
    print(f"{name}: output std {arrays['output'].std():.2f}, largest file {largest} bytes")


def record_minilm(folder: str) -> None:
    """Every 24th feature of the hidden states, and the whole sentence vectors."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    np.savez_compressed(
        FOLDER.parent / "minilm.npz",
        sentences=np.array(SENTENCES),
        **{key: value.numpy().astype(np.int32) for key, value in batch.items()},
        hidden=hidden[..., ::24].numpy(),
        vectors=vectors.numpy(),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["minilm"]:
        record_minilm(sys.argv[2])
        sys.exit()
    for wanted in sys.argv[1:] or [*CASES, "gemma3n_ffn"]:
        record_gemma3n() if wanted == "gemma3n_ffn" else record(wanted)
    total = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
    print(f"{total} bytes in all")
