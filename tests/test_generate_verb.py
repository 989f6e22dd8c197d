"""The verb `generate` and the benchmark `decode`, on a tiny model of random weights that reads bytes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiments.bench as bench
import experiments.generate as verb
import sparsejax.io.load
from experiments import entry
from sparsejax import arrays, nnx_compat
from sparsejax.data.tokenizers import Bytes
from sparsejax.evaluate import decode_speed
from sparsejax.evaluate.sampling import Sampling
from sparsejax.evaluate.text_generator import TextGenerator
from sparsejax.io.model import Model
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig, PositionConfig
from sparsejax.models.transformer import Transformer
from sparsejax.plugs import ConfigError

LENGTH = 96
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_model(name="tiny", **changes):
    base = dict(
        num_layers=2,
        d_model=16,
        vocab_size=264,
        max_length=LENGTH,
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
        ffn=FFNConfig(hidden=24, activation="swiglu"),
        positions=PositionConfig("learned"),
    )
    config = ModelConfig(**{**base, **changes})
    structure, values = nnx_compat.split(Transformer(config, jax.random.key(0)))
    values = jax.tree.map(lambda a: a * 3 if a.ndim >= 2 else a, values)
    return Model(name, config, structure, values, Bytes().build(None, 0, ()), TEMPLATE, {"generation": {"eos_token_id": [255]}})


@pytest.fixture(autouse=True)
def tiny_everywhere(monkeypatch):
    """`load` gives the model that a test put under a name; the probe of the memory is small."""
    models = {"tiny": tiny_model()}

    def load(name, dtype="float32"):  # arrays of its own each time, as the real one: the verb takes them from the model
        return dataclasses.replace(models[name], values=jax.tree.map(jnp.copy, models[name].values))

    monkeypatch.setattr(sparsejax.io.load, "load", load)
    monkeypatch.setattr(decode_speed.Probe.__init__, "__defaults__", (2**20,))
    return models


def run(*arguments, main=verb.main, flags=verb.Flags, names=""):
    call, path = entry.parse(["generate", *arguments], flags, config=False, names=names)
    result = main(call)
    if path:
        entry.write_json(path, result)
    return result


def tokens_of(result):
    return [row["text"] for row in result["results"]]


def test_one_prompt_is_printed_with_its_continuation_and_the_speed_goes_to_the_other_stream(capsys, tmp_path):
    path = tmp_path / "out.json"
    result = run("--model=tiny", "--prompt=Once", "--max-new-tokens=20", f"--json={path}")
    printed = capsys.readouterr()
    assert printed.out == "Once" + tokens_of(result)[0] + "\n"
    assert "decode" in printed.err and "% of the" in printed.err
    speed = json.loads(path.read_text())["speed"]
    assert speed["fraction_of_read_bandwidth"] > 0 and min(speed["weight_bytes"], speed["cache_bytes"]) > 0


def test_a_batch_gives_what_each_prompt_gives_alone_with_its_seed():
    sampled = ["--model=tiny", "--temperature=0.9", "--top-k=50", "--top-p=0.95", "--min-p=0.01", "--max-new-tokens=12"]
    together = run(*sampled, "--prompt=Once upon a time", "--prompt=In", "--seed=4")
    alone = [run(*sampled, "--prompt=Once upon a time", "--seed=4"), run(*sampled, "--prompt=In", "--seed=5")]
    assert tokens_of(together) == [tokens_of(one)[0] for one in alone]
    assert tokens_of(run(*sampled, "--prompt=In", "--seed=6")) != tokens_of(alone[1])


def test_prompts_come_from_files_and_chats_go_through_the_template(tmp_path):
    lines, listed, chat = tmp_path / "p.txt", tmp_path / "p.json", tmp_path / "chat.json"
    lines.write_text("Once\n\nIn the\n")
    listed.write_text(json.dumps(["Once", "In the"]))
    chat.write_text(json.dumps([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]))
    by_flag = run("--model=tiny", "--prompt=Once", "--prompt=In the", "--max-new-tokens=3")
    for path in (lines, listed):
        assert tokens_of(run("--model=tiny", f"--prompt-file={path}", "--max-new-tokens=3")) == tokens_of(by_flag)
    told = run("--model=tiny", "--prompt=<user>Hi<assistant>Hello<user>Bye<assistant>", "--max-new-tokens=3")
    spoken = run("--model=tiny", "--chat=Hi", "--chat=Hello", "--chat=Bye", "--max-new-tokens=3")
    assert tokens_of(spoken) == tokens_of(told)
    assert run("--model=tiny", f"--chat-file={chat}", "--max-new-tokens=3")["results"][0]["prompt_tokens"] == len(
        "<system>Be brief.<user>Hi<assistant>"
    )


def test_decoding_by_gathered_rows_gives_what_multiplying_zeros_gives(tiny_everywhere, monkeypatch):
    rows = []
    gathered = arrays.sparse_gemv
    monkeypatch.setattr(arrays, "sparse_gemv", lambda x, *rest, **kwargs: rows.append(x.shape) or gathered(x, *rest, **kwargs))
    tiny_everywhere["sparse"] = tiny_model(num_layers=1, inputs=("blocks.*.attn.*=topk:0.5", "blocks.*.mlp.down=n_of_m:1,3"))
    asked = ["--model=sparse", "--prompt=Once upon a time", "--max-new-tokens=12"]
    masked, found = (run(*asked, f"--executor={executor}") for executor in arrays.EXECUTORS)
    assert tokens_of(found) == tokens_of(masked) and found["executor"] == "gathered"
    # q, k, v, o and down, in decoding alone: a prompt has too many rows.
    assert sorted(set(rows)) == [(1, 1, 16), (1, 1, 24)] and len(rows) == 5
    with pytest.raises(ConfigError, match="--executor = 'gather': .*Did you mean 'gathered'"):
        run(*asked, "--executor=gather")


def test_a_cache_of_few_bits_is_asked_for_by_name_and_its_bytes_are_told(capsys):
    asked = ["--model=tiny", "--prompt=Once", "--max-new-tokens=3"]
    found = run(*asked, "--cache-format=int4:asym,token,zero=min,scale=f16")
    # 256 slots, two layers, keys and values: 8 codes of half a byte, a scale and a minimum of two.
    assert found["speed"]["cache_bytes"] == 256 * 2 * 2 * (4 + 4) and "0.01 MB of cache" in capsys.readouterr().err
    assert found["cache_format"] == "int4:asym,token,zero=min,scale=f16"
    with pytest.raises(ConfigError, match="--cache-format: .*granularity = 'channel'"):
        run(*asked, "--cache-format=int4")


def test_a_stop_string_ends_the_text_before_it():
    whole = tokens_of(run("--model=tiny", "--prompt=Once", "--max-new-tokens=40"))[0]
    middle = next(c for c in whole[3:] if c not in whole[:3])
    cut = tokens_of(run("--model=tiny", "--prompt=Once", "--max-new-tokens=40", f"--stop={middle}"))[0]
    assert cut == whole[: whole.index(middle)]


def test_an_encoder_decoder_answers_its_encoded_prompt(tiny_everywhere):
    tiny_everywhere["t5"] = tiny_model(kind="encoder_decoder", encoder_layers=1, positions=PositionConfig("relative"))
    result = run("--model=t5", "--prompt=Once upon", "--prompt=In", "--max-new-tokens=5")
    assert [row["new_tokens"] for row in result["results"]] == [5, 5]
    model = tiny_everywhere["t5"]
    source = model.tokenizer.encode("Once upon")[None]
    tokens = np.zeros((1, 6), np.int32)  # what stands behind the last token is not seen
    tokens[0, 0] = model.tokenizer.pad_id
    logits = jax.jit(lambda tokens: model.module()({"tokens": tokens, "encoder_tokens": source})[0])
    for position in range(5):
        tokens[0, position + 1] = logits(tokens)[0, position].argmax()
    assert model.tokenizer.decode(tokens[0, 1:]) == result["results"][0]["text"]


def test_texts_end_at_the_tokenizers_end_and_at_those_of_the_generation_settings(tiny_everywhere):
    assert TextGenerator(tiny_everywhere["tiny"]).ends == [255, 258]
    bare = dataclasses.replace(tiny_everywhere["tiny"], source={"generation": {"eos_token_id": 7}})
    assert TextGenerator(bare).ends == [7, 258]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt=a"], "--model"),
        (["--model=tiny"], "prompt = '': give one of --prompt"),
        (["--model=tiny", "--prompt=a", "--chat=b"], "--prompt --chat"),
        (["--model=tiny", "--prompt="], r"--prompt\[0\].*is empty"),
        (["--model=tiny", "--prompt=a", "--temperature=-1"], "temperature"),
        (["--model=tiny", "--prompt=a", "--top-p=0"], "top_p"),
        (["--model=tiny", "--prompt=a", "--min-p=2"], "min_p"),
        (["--model=tiny", "--prompt=a", "--max-new-tokens=0"], "--max-new-tokens"),
        (["--model=tiny", "--prompt=a", "--max-new-tokens=1000"], "max-new-tokens = 1000.*96 positions: at most 95"),
        (["--model=tiny", "--prompt=" + "a" * 96], r"prompt\[0\] = '96 tokens'.*96 positions"),
        (["--model=tiny", "--prompt=a", "--seed=-1"], "--seed"),
        (["--model=tiny", "--prompt=a", "--dtype=int4"], "--dtype"),
        (["--model=tiny", "--prompt=a", "--stop="], "--stop"),
        (["--model=tiny", "--prompt=a", "--tempo=1"], "--tempo: there is no such flag. Did you mean --temperature"),
        (["--model=tiny", "--prompt-file=nowhere.txt"], "nowhere.txt.*cannot be read"),
        (["--model=silent", "--chat=a"], "no chat template"),
        (["--model=encoder", "--prompt=a"], "only a decoder generates text"),
        (["--model=mute", "--prompt=a"], "without a tokenizer"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_message(tiny_everywhere, arguments, message):
    tiny = tiny_everywhere["tiny"]
    tiny_everywhere["silent"] = dataclasses.replace(tiny, chat_template=None)
    tiny_everywhere["mute"] = dataclasses.replace(tiny, tokenizer=None)
    if "--model=encoder" in arguments:
        tiny_everywhere["encoder"] = tiny_model(kind="encoder")
    with pytest.raises(ConfigError, match=message):
        run(*arguments)


@pytest.mark.parametrize("text, message", [("{", "is no JSON"), ("[]", "at least one"), ('["a", 1]', "list of strings")])
def test_a_prompt_file_that_is_no_list_of_prompts_is_refused(tmp_path, text, message):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        run("--model=tiny", f"--prompt-file={path}")


def test_the_benchmark_sets_each_variant_beside_the_memory(monkeypatch, capsys):
    import experiments.bench_decode as bench_decode

    monkeypatch.setattr(bench_decode, "load", lambda name, dtype: tiny_model(dtype=dtype))
    result = run("decode", "--model=tiny", "--tokens=4", "--rounds=2", main=bench.main, flags=bench.Flags, names="benchmark")
    assert [row["variant"] for row in result["variants"]] == list(bench_decode.VARIANTS)
    assert all(row["fraction_of_read_bandwidth"]["lowest"] > 0 for row in result["variants"])
    assert "GB/s" in capsys.readouterr().out
    refused = (["decode"], "--model"), (["decode", "--model=tiny", "--tokens=1"], "--tokens"), (["train"], "--config")
    for arguments, message in refused:
        with pytest.raises(ConfigError, match=message):
            run(*arguments, main=bench.main, flags=bench.Flags, names="benchmark")


def test_a_second_measurement_compiles_nothing(tiny_everywhere):
    from sparsejax.evaluate import generate

    generator = TextGenerator(tiny_everywhere["tiny"])
    prompts, sampling = [generator.encode("Once")], Sampling(temperature=0.5)
    list(generator.stream(prompts, 30, sampling))
    before = generate._prefill._cache_size(), generate._decode._cache_size()
    generator.speed(prompts, 30, sampling, 5, decode_speed.Probe(2**20))
    assert before == (generate._prefill._cache_size(), generate._decode._cache_size())
