"""A GGUF file as a Hugging Face checkpoint: llama.cpp's conversion, done here in a few lines, is undone exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.io.family import family_of
from sparsejax.io.gguf_model import as_hf
from sparsejax.io.gguf_names import ARCHITECTURES
from sparsejax.plugs import ConfigError

LAYERS, WIDTH, HEADS, KV_HEADS, SIZE, HIDDEN, VOCABULARY, EXPERTS = 2, 24, 4, 2, 6, 20, 9, 3
Q, KV = HEADS * SIZE, KV_HEADS * SIZE
RMS, EPSILON = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
LAYER = "model.layers.{n}."
NUMBERS = np.random.RandomState(0)


def permuted(heads):
    """What the converter does to rows of q and k (the card's formula; ours undoes it)."""
    return lambda w: w.reshape(heads, 2, SIZE // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def same(w):
    return w


def plus_one(w):
    return w + 1


def grouped(w):
    """GPT-NeoX: per head q, k, v -> all q, all k, all v."""
    return np.concatenate(list(w.reshape(HEADS, 3, -1, *w.shape[1:]).swapaxes(0, 1))).reshape(w.shape)


# Published name, GGUF name, shape, what the converter does. {n} layers, {e} experts (stacked in GGUF).
TOP = [("model.embed_tokens.weight", "token_embd.weight", (VOCABULARY, WIDTH), same),
       ("model.norm.weight", "output_norm.weight", (WIDTH,), same)]  # fmt: skip
HEAD = [("lm_head.weight", "output.weight", (VOCABULARY, WIDTH), same)]
ATTENTION = [
    (LAYER + "input_layernorm.weight", "attn_norm.weight", (WIDTH,), same),
    (LAYER + "self_attn.q_proj.weight", "attn_q.weight", (Q, WIDTH), same),
    (LAYER + "self_attn.k_proj.weight", "attn_k.weight", (KV, WIDTH), same),
    (LAYER + "self_attn.v_proj.weight", "attn_v.weight", (KV, WIDTH), same),
    (LAYER + "self_attn.o_proj.weight", "attn_output.weight", (WIDTH, Q), same),
    (LAYER + "post_attention_layernorm.weight", "ffn_norm.weight", (WIDTH,), same),
]
BY_NAME = {"attn_q.weight": permuted(HEADS), "attn_k.weight": permuted(KV_HEADS)}
PERMUTED = [(a, b, s, BY_NAME.get(b, c)) for a, b, s, c in ATTENTION]
BIASES = [
    (LAYER + "self_attn.q_proj.bias", "attn_q.bias", (Q,), same),
    (LAYER + "self_attn.k_proj.bias", "attn_k.bias", (KV,), same),
    (LAYER + "self_attn.v_proj.bias", "attn_v.bias", (KV,), same),
]
PERMUTED_BIASES = [(*BIASES[0][:3], permuted(HEADS)), (*BIASES[1][:3], permuted(KV_HEADS)), BIASES[2]]
QK_NORM = [(LAYER + f"self_attn.{x}_norm.weight", f"attn_{x}_norm.weight", (SIZE,), same) for x in "qk"]
GATED = [(LAYER + f"mlp.{x}_proj.weight", f"ffn_{x}.weight", (HIDDEN, WIDTH)[:: -1 if x == "down" else 1], same)
         for x in ("gate", "up", "down")]  # fmt: skip
ROUTER = [(LAYER + "mlp.gate.weight", "ffn_gate_inp.weight", (EXPERTS, WIDTH), same)]
ROUTED = ROUTER + [(a.replace("mlp.", "mlp.experts.{e}."), b.replace(".weight", "_exps.weight"), s, c) for a, b, s, c in GATED]
SHARED = [(a.replace("mlp.", "mlp.shared_expert."), b.replace(".weight", "_shexp.weight"), s, c) for a, b, s, c in GATED]
SHARED += [(LAYER + "mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight", (1, WIDTH), np.ravel)]
MIXTRAL = [(LAYER + "block_sparse_moe.gate.weight", "ffn_gate_inp.weight", (EXPERTS, WIDTH), same)]
MIXTRAL += [(LAYER + f"block_sparse_moe.experts.{{e}}.w{i}.weight", f"ffn_{x}_exps.weight", s, c)
            for i, x, (_, _, s, c) in zip((1, 3, 2), ("gate", "up", "down"), GATED, strict=True)]  # fmt: skip
SANDWICH = [
    (LAYER + "pre_feedforward_layernorm.weight", "ffn_norm.weight", (WIDTH,), same),
    (LAYER + "post_attention_layernorm.weight", "post_attention_norm.weight", (WIDTH,), same),
    (LAYER + "post_feedforward_layernorm.weight", "post_ffw_norm.weight", (WIDTH,), same),
]


def gemma(entries):
    return [(a, b, s, plus_one if b.endswith("norm.weight") else c) for a, b, s, c in entries]


GPT2 = [
    ("transformer.wte.weight", "token_embd.weight", (VOCABULARY, WIDTH), same),
    ("transformer.wpe.weight", "position_embd.weight", (16, WIDTH), same),
    ("transformer.ln_f.weight", "output_norm.weight", (WIDTH,), same),
    ("transformer.h.{n}.ln_1.bias", "attn_norm.bias", (WIDTH,), same),
    ("transformer.h.{n}.attn.c_attn.weight", "attn_qkv.weight", (WIDTH, 3 * WIDTH), np.transpose),
    ("transformer.h.{n}.attn.c_attn.bias", "attn_qkv.bias", (3 * WIDTH,), same),
    ("transformer.h.{n}.mlp.c_fc.weight", "ffn_up.weight", (WIDTH, HIDDEN), np.transpose),
    ("transformer.h.{n}.mlp.c_proj.weight", "ffn_down.weight", (HIDDEN, WIDTH), np.transpose),
]
NEOX = [
    ("gpt_neox.embed_in.weight", "token_embd.weight", (VOCABULARY, WIDTH), same),
    ("embed_out.weight", "output.weight", (VOCABULARY, WIDTH), same),
    ("gpt_neox.layers.{n}.attention.query_key_value.weight", "attn_qkv.weight", (3 * WIDTH, WIDTH), grouped),
    ("gpt_neox.layers.{n}.attention.query_key_value.bias", "attn_qkv.bias", (3 * WIDTH,), grouped),
    ("gpt_neox.layers.{n}.mlp.dense_h_to_4h.weight", "ffn_up.weight", (HIDDEN, WIDTH), same),
]
WITHOUT_POST = [one for one in ATTENTION if one[1] != "ffn_norm.weight"]
MODELS = {
    "llama": ("llama", TOP + HEAD + PERMUTED + PERMUTED_BIASES + GATED),
    "mixtral": ("llama", TOP + HEAD + PERMUTED + MIXTRAL),
    "qwen2": ("qwen2", TOP + ATTENTION + BIASES + GATED),
    "qwen3": ("qwen3", TOP + ATTENTION + QK_NORM + GATED),
    "qwen2_moe": ("qwen2moe", TOP + HEAD + ATTENTION + BIASES + ROUTED + SHARED),
    "qwen3_moe": ("qwen3moe", TOP + HEAD + ATTENTION + QK_NORM + ROUTED),
    "olmoe": ("olmoe", TOP + HEAD + ATTENTION + QK_NORM + ROUTED),
    "gemma2": ("gemma2", gemma(TOP + WITHOUT_POST + SANDWICH + GATED)),
    "gemma3_text": ("gemma3", gemma(TOP + WITHOUT_POST + SANDWICH + QK_NORM + GATED)),
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": ("gptneox", NEOX),
}


def metadata_of(architecture, model_type, **changed):
    values = {
        "block_count": LAYERS, "embedding_length": WIDTH, "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
        "attention.key_length": SIZE, "feed_forward_length": HIDDEN, "context_length": 16, "rope.freq_base": 5e5, RMS: 1e-5,
        EPSILON: 1e-5, "attention.sliding_window": 8, **changed,
    }  # fmt: skip
    if model_type in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"):
        values |= {"expert_count": EXPERTS, "expert_used_count": 2}
    stored = {f"{architecture}.{key}": value for key, value in values.items() if value is not None}
    return {"general.architecture": architecture, "tokenizer.ggml.eos_token_id": 3, **stored}


def converted(entries):
    """Random published tensors, and what a converter would store of them."""
    theirs, stored = {}, {}
    for published, name, shape, convert in entries:
        for n in range(LAYERS if "{n}" in published else 1):
            key = f"blk.{n}.{name}" if "{n}" in published else name
            experts = range(EXPERTS) if "{e}" in published else (0,)
            each = {published.format(n=n, e=e): NUMBERS.randn(*shape).astype(np.float32) for e in experts}
            theirs |= each
            arrays = [convert(array) for array in each.values()]
            stored[key] = np.stack(arrays) if "{e}" in published else arrays[0]
    return theirs, stored


@pytest.fixture
def model(gguf_bytes, open_bytes):
    def build(model_type, *, drop=(), add=None, **changed):
        architecture, entries = MODELS[model_type]
        theirs, stored = converted(entries)
        stored = {name: array for name, array in stored.items() if name not in drop} | (add or {})
        return theirs, open_bytes(gguf_bytes(metadata_of(architecture, model_type, **changed), stored))

    return build


@pytest.mark.parametrize("model_type", MODELS)
def test_published_tensors_come_back_under_their_names(model, model_type):
    theirs, gguf = model(model_type)
    config, source = as_hf(gguf)
    assert config["model_type"] == model_type and config["vocab_size"] == VOCABULARY and config["eos_token_id"] == 3
    assert config["tie_word_embeddings"] == ("output.weight" not in gguf.tensors)
    assert set(source.tensors) == set(theirs)
    for name, expected in theirs.items():
        found = source.read(name)
        assert source.tensors[name].shape == found.shape == expected.shape and source.tensors[name].dtype == found.dtype
        rounded = 2e-7 if gguf.metadata["general.architecture"].startswith("gemma") else 0  # (w + 1) - 1
        np.testing.assert_allclose(found, expected, rtol=0, atol=rounded, err_msg=name)


@pytest.mark.parametrize("model_type", MODELS)
def test_the_family_understands_the_config_and_knows_every_tensor(model, model_type):
    published, source = as_hf(model(model_type)[1])
    family = family_of(published, "model.gguf")
    entries = family.entries(family.to_config(published))
    templates = {name for one in entries for name in one.theirs}
    known = {name.format(layer=n, expert=e) for name in templates for n in range(LAYERS) for e in range(EXPERTS)}
    assert set(source.tensors) <= known


def test_every_architecture_is_tested():
    assert {architecture for architecture, _ in MODELS.values()} == set(ARCHITECTURES)


def test_a_llama_config_is_the_published_one(model):
    config, _ = as_hf(model("llama")[1])
    assert config == {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY, "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": SIZE,
        "intermediate_size": HIDDEN, "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False, "rope_theta": 5e5, "rope_scaling": None, "attention_bias": True, "mlp_bias": False,
        "eos_token_id": 3,
    }  # fmt: skip


def test_experts_heads_and_widths_reach_the_configs(model):
    assert as_hf(model("mixtral")[1])[0]["num_local_experts"] == EXPERTS
    config = as_hf(model("qwen2_moe")[1])[0]
    assert (config["num_experts"], config["num_experts_per_tok"], config["norm_topk_prob"]) == (EXPERTS, 2, False)
    assert config["moe_intermediate_size"] == config["shared_expert_intermediate_size"] == HIDDEN
    assert as_hf(model("qwen3_moe")[1])[0]["norm_topk_prob"] is True
    neox = as_hf(model("gpt_neox", **{"rope.dimension_count": 2, "use_parallel_residual": False})[1])[0]
    assert neox["rotary_pct"] == 1 / 3 and neox["rotary_emb_base"] == 5e5 and neox["use_parallel_residual"] is False
    gemma2 = as_hf(model("gemma2")[1])[0]
    assert (gemma2["attn_logit_softcapping"], gemma2["final_logit_softcapping"], gemma2["sliding_window"]) == (50.0, 30.0, 8)
    assert gemma2["query_pre_attn_scalar"] == SIZE
    gemma3 = as_hf(model("gemma3_text", **{"rope.scaling.type": "linear", "rope.scaling.factor": 8.0})[1])[0]
    assert gemma3["rope_scaling"] == {"rope_type": "linear", "factor": 8.0} and gemma3["rope_local_base_freq"] == 10000.0


def test_the_scaling_of_llama_3_is_read_from_its_frequencies(model):
    base, factor, low, high, length = 5e5, 8.0, 1.0, 4.0, 8192
    divisors = []
    for frequency in base ** (-np.arange(0, SIZE, 2) / SIZE):  # as the converter writes them
        wavelength = 2 * np.pi / frequency
        smooth = (length / wavelength - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(1.0 if wavelength < length / high else factor if wavelength > length / low else between)
    assert len(set(divisors)) == 3 - 1  # at head size 6 no pair lies between
    gguf = model("llama", add={"rope_freqs.weight": np.array(divisors)})[1]
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert as_hf(gguf)[0]["rope_scaling"] == {**scaling, "original_max_position_embeddings": 8192}
    with pytest.raises(ConfigError, match="rope_freqs.weight"):
        as_hf(model("llama", add={"rope_freqs.weight": np.array([1.0, 2, 8])})[1])


REFUSED = {
    "an unknown architecture": ("qwen2", {}, {"general.architecture": "qwen22"}, "Did you mean 'qwen2'"),
    "an architecture that is no text": ("qwen2", {}, {"general.architecture": [1, 2]}, "is a ndarray, expected str"),
    "one part of several": ("qwen2", {}, {"split.count": 3}, "one of 3 parts"),
    "a missing key": ("qwen2", {RMS: None}, {}, "'qwen2.attention.layer_norm_rms_epsilon' is missing"),
    "a key of a wrong type": ("qwen2", {"feed_forward_length": "20"}, {}, "'qwen2.feed_forward_length' is a str, expected int"),
    "heads per layer": ("qwen2", {"attention.head_count": [4, 4]}, {}, "'qwen2.attention.head_count' is a ndarray"),
    "a zero": ("qwen2", {"context_length": 0}, {}, "'qwen2.context_length' = 0: must be positive"),
    "an epsilon that is NaN": ("qwen2", {RMS: float("nan")}, {}, "= nan: must be finite"),
    "too many blocks": ("qwen2", {"block_count": 10**9}, {}, "= 1000000000, but there are tensors of 2 blocks"),
    "another width": ("qwen2", {"embedding_length": 48}, {}, "'token_embd.weight' has shape (9, 24)"),
    "another vocabulary": ("qwen2", {"vocab_size": 10}, {}, "'token_embd.weight' has shape (9, 24)"),
    "key heads that do not divide": ("qwen2", {"attention.head_count_kv": 3}, {}, "= 3: the 4 query heads are no multiple"),
    "a partial rotation": ("qwen2", {"rope.dimension_count": 4}, {}, "only heads of one size (6), rotated whole"),
    "rows that are no heads": ("llama", {"attention.head_count": 7, "attention.head_count_kv": 7}, {}, "are not 7 heads"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_model_cannot_be_is_refused_by_key_or_tensor(gguf_bytes, open_bytes, case):
    model_type, changed, extra, message = REFUSED[case]
    architecture, entries = MODELS[model_type]
    data = gguf_bytes(metadata_of(architecture, model_type, **changed) | extra, converted(entries)[1])
    with pytest.raises(ConfigError) as caught:
        as_hf(open_bytes(data))
    assert message in str(caught.value) and "model.gguf" in str(caught.value)


@settings(max_examples=200)
@given(st.data())
def test_flipped_bits_are_refused_or_understood(gguf_bytes, open_bytes, data):
    content = bytearray(gguf_bytes(metadata_of("olmoe", "olmoe"), converted(MODELS["olmoe"][1])[1]))
    content[data.draw(st.integers(0, 2000))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        _, source = as_hf(open_bytes(bytes(content)))
    except ConfigError as error:
        assert "model.gguf" in str(error)
    else:
        for name, info in source.tensors.items():
            assert source.read(name).shape == info.shape


def test_tensors_that_the_architecture_does_not_have_are_listed(model):
    extra = {"blk.0.attn_sinks.weight": np.ones(4), "blk.1.ffn_gate.scale": np.ones(1), "mm.weight": np.ones(2)}
    with pytest.raises(ConfigError, match=r"no qwen2 model has: blk.0.attn_sinks.weight, blk.1.ffn_gate.scale, mm.weight$"):
        as_hf(model("qwen2", add=extra)[1])


def test_missing_tables_and_stacks_of_a_wrong_size_are_refused(model):
    with pytest.raises(ConfigError, match="'token_embd.weight' is missing"):
        as_hf(model("qwen2", drop=("token_embd.weight",))[1])
    with pytest.raises(ConfigError, match=r"ffn_up_exps.weight' has shape \(2, 20, 24\); expected \[3 experts, out, in\]"):
        as_hf(model("olmoe", add={"blk.1.ffn_up_exps.weight": np.ones((2, HIDDEN, WIDTH))})[1])
    with pytest.raises(ConfigError, match="there is no tensor 'lm_head.weight'"):
        as_hf(model("qwen2")[1])[1].read("lm_head.weight")


def test_smollm2_is_the_model_that_it_should_be(smollm2):
    config, source = as_hf(smollm2)
    assert config["model_type"] == "llama" and config["tie_word_embeddings"] is True
    assert (config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]) == (30, 576, 1536)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (9, 3, 64)
    assert (config["rope_theta"], config["rms_norm_eps"], config["vocab_size"]) == (1e5, 1e-5, 49152)
    assert source.tensors["model.layers.29.self_attn.k_proj.weight"].shape == (192, 576)
    stored, found = smollm2.read("blk.3.attn_k.weight"), source.read("model.layers.3.self_attn.k_proj.weight")
    np.testing.assert_array_equal(found.reshape(3, 2, 32, 576)[1, 1, 5], stored.reshape(3, 32, 2, 576)[1, 5, 1])
