"""Continue prompts, or answer a chat, with a model.

    python -m experiments.generate --model smollm2-135m --prompt "The capital of France is" --max-new-tokens 40
    python -m experiments.generate --model smollm2-135m --chat "Name three rivers." --temperature 0.7 --top-p 0.9 --seed 1
    python -m experiments.generate --model runs/mine --prompt-file prompts.txt --stop "\\n" --json generated.json
    python -m experiments.generate --model smollm2-135m --prompt "Once" --cache-format int4:asym,token,zero=min,scale=f16

Prompts: --prompt (repeat it for several), --prompt-file (one a line, or a JSON list of strings), --chat (turns of user and
assistant by turns, the user first) or --chat-file (a JSON list of {"role", "content"}); a chat goes through the model's own
template. One prompt is printed as it is decoded. Decoding is greedy unless --temperature is more than 0.
Speed is measured on a second run of the same prompts, in which nothing compiles, beside the rate at which memory is read.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import entry
from sparsejax.data.sources import check_unicode
from sparsejax.plugs import ConfigError, check, check_choice

TIMED_TOKENS = 64  # of the second run, at most


@dataclass
class Flags:
    model: str = entry.flag("", "name or path of the model")
    prompt: tuple[str, ...] = entry.flag((), "text to continue; several if repeated")
    prompt_file: str = entry.flag("", "prompts, one a line, or a JSON list of strings in a file that ends in .json")
    chat: tuple[str, ...] = entry.flag((), "turns of a conversation, user and assistant by turns")
    chat_file: str = entry.flag("", 'a conversation as a JSON list of {"role": ..., "content": ...}')
    max_new_tokens: int = entry.flag(128, "new tokens of each prompt, at most")
    temperature: float = entry.flag(0.0, "0: the most likely token; 1: the model's own distribution")
    top_k: int = entry.flag(0, "draw from this many most likely tokens; 0: all")
    top_p: float = entry.flag(1.0, "draw from the fewest tokens that have this probability together")
    min_p: float = entry.flag(0.0, "draw from tokens at least this times as likely as the most likely one")
    stop: tuple[str, ...] = entry.flag((), "text that ends a continuation and is not printed; several if repeated")
    seed: int = entry.flag(0, "of the draws; the n-th prompt has seed + n")
    dtype: str = entry.flag("float32", entry.DTYPE)
    cache_format: str = entry.flag("", "of keys and values, e.g. int4:asym,token,zero=min; by default the model's own")
    executor: str = entry.flag("masked", "of sparse products while decoding: masked (zeros are multiplied) or gathered")


def main(call: entry.Call[Flags]) -> dict[str, Any]:
    flags = call.flags
    check(flags.model, "--model", "", "give the name or path of a model")
    entry.computing_in(flags.dtype)
    check(flags.max_new_tokens >= 1, "--max-new-tokens", flags.max_new_tokens, "must be at least 1")
    check(all(flags.stop), "--stop", "", "must not be empty")
    check(0 <= flags.seed < 2**31, "--seed", flags.seed, "must lie in 0 .. 2**31 - 1")
    asked = read_prompts(flags)
    from sparsejax.arrays import EXECUTORS
    from sparsejax.evaluate.sampling import Sampling
    from sparsejax.evaluate.text_generator import TextGenerator
    from sparsejax.io.load import load
    from sparsejax.methods.quant.kv_cache import with_cache_format

    check_choice("--executor", flags.executor, EXECUTORS)
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.min_p)
    model = load(flags.model, dtype=flags.dtype)
    model = with_cache_format(model, flags.cache_format, "--cache-format") if flags.cache_format else model
    generator = TextGenerator(model, consume=True, executor=flags.executor)
    prompts = [generator.encode(prompt) if isinstance(prompt, str) else generator.encode_chat(prompt) for prompt in asked]
    generator.check_room(prompts, flags.max_new_tokens)
    started = time.perf_counter()
    results = _print_as_decoded(generator, asked, prompts, flags, sampling)
    seconds = time.perf_counter() - started
    speed = generator.speed(prompts, flags.max_new_tokens, sampling, TIMED_TOKENS)
    print(f"\n{describe_speed(speed, flags.executor)}; {seconds:.1f} s with compilation", file=sys.stderr)
    return {
        "model": flags.model, "dtype": flags.dtype, "executor": flags.executor, "seed": flags.seed, "command": call.command,
        "cache_format": model.config.attention.cache_format,
        "results": results, "seconds_with_compilation": seconds, "speed": speed,
    }


def read_prompts(flags: Flags) -> list[str | list[dict[str, str]]]:
    """What the flags ask to continue: texts, or one list of chat messages.

    Raises:
      ConfigError: none or several ways of asking, or a file that cannot be read.
    """
    ways = {"--prompt": flags.prompt, "--prompt-file": flags.prompt_file, "--chat": flags.chat, "--chat-file": flags.chat_file}
    given = [name for name, value in ways.items() if value]
    check(len(given) == 1, "prompt", " ".join(given), f"give one of {', '.join(ways)}")
    if flags.chat:
        return [[{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(flags.chat)]]
    if flags.chat_file:
        return [_json_list("--chat-file", flags.chat_file, dict, 'of {"role", "content"}')]
    prompts = list(flags.prompt) or _prompts_of_file(flags.prompt_file)
    for index, prompt in enumerate(prompts):
        check(prompt, f"{given[0]}[{index}]", prompt, "is empty; a line break will do")
        check_unicode(prompt, f"{given[0]}[{index}]")
    return list(prompts)


def _prompts_of_file(path: str) -> list[str]:
    if path.endswith(".json"):
        return _json_list("--prompt-file", path, str, "of strings")
    prompts = [line for line in _read("--prompt-file", path).splitlines() if line]
    check(prompts, "--prompt-file", path, "holds no line of text")
    return prompts


def _read(flag: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} = {path!r}: cannot be read ({error})") from error


def _json_list(flag: str, path: str, kind: type, what: str) -> list[Any]:
    try:
        found = json.loads(_read(flag, path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{flag} = {path!r}: is no JSON ({error})") from error
    good = isinstance(found, list) and found and all(isinstance(item, kind) for item in found)
    check(good, flag, path, f"expected a JSON list {what}, with at least one")
    return found


def _print_as_decoded(
    generator: Any, asked: Sequence[Any], prompts: Sequence[Any], flags: Flags, sampling: Any
) -> list[dict[str, Any]]:
    """Generate; one continuation is shown as it comes, several one below the other at the end."""
    texts, counts = [""] * len(prompts), [0] * len(prompts)
    alone = len(prompts) == 1
    if alone and isinstance(asked[0], str):
        print(asked[0], end="", flush=True)
    for new, numbers in generator.stream(prompts, flags.max_new_tokens, sampling, flags.seed, flags.stop):
        texts = [text + part for text, part in zip(texts, new, strict=True)]
        counts = [count + number for count, number in zip(counts, numbers, strict=True)]
        if alone:
            print(new[0], end="", flush=True)
    if alone:
        print()
    else:
        for prompt, text in zip(asked, texts, strict=True):
            print(f"{prompt}{text}\n{'-' * 40}")
    return [
        {"prompt": prompt, "text": text, "prompt_tokens": len(tokens), "new_tokens": count}
        for prompt, text, tokens, count in zip(asked, texts, prompts, counts, strict=True)
    ]


def describe_speed(speed: dict[str, Any], executor: str = "masked") -> str:
    """One line: rates, bytes per token (all weights, which `executor` may not read), and the fraction of what memory allows."""
    reads = "reads" if executor == "masked" else f"({executor}) reads of"
    return (
        f"prefill {speed['prefill_tokens_per_second']:,.0f}, decode {speed['decode_tokens_per_second']:,.1f} tokens/s; "
        f"a step {reads} {speed['weight_bytes'] / 1e6:,.1f} MB of weights and {speed['cache_bytes'] / 1e6:,.2f} MB of cache, "
        f"{speed['bytes_per_second'] / 1e9:,.1f} GB/s, {100 * speed['fraction_of_read_bandwidth']:.0f} % of the "
        f"{speed['read_bandwidth'] / 1e9:,.1f} GB/s at which memory is read"
    )


if __name__ == "__main__":
    entry.run(main, Flags, config=False)
