"""A loaded model that generates text: its serving form, its tokenizer, its template, its limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparsejax.evaluate import decode_speed
from sparsejax.evaluate.generate import Params, cache_slots, decoder, encode_prompts
from sparsejax.evaluate.sampling import Sampling
from sparsejax.evaluate.text_stream import stream_text
from sparsejax.io.chat import render_chat
from sparsejax.io.model import Model
from sparsejax.models.serving import read_bytes, serving_form
from sparsejax.plugs import check

LIMITED_POSITIONS = ("learned", "rope")  # kinds whose model knows no position from max_length on


class TextGenerator:
    """Generates with one model.

    Raises:
      ConfigError: the model predicts no next token, or has no tokenizer.
    """

    def __init__(
        self,
        model: Model,
        *,
        serving: bool = True,
        consume: bool = False,
        executor: str = "masked",
    ):
        """Prepare a model.

        Args:
          model: that predicts the next token.
          serving: whether its weights are laid out anew for decoding.
          consume: whether they may be taken from the model, which cannot be used afterwards, so that memory never holds both.
          executor: of sparse products while decoding, one of `arrays.EXECUTORS`.
        """
        where = f"--model = {model.name!r}"
        config = model.config
        check(config.kind in ("decoder", "encoder_decoder"), f"{where}: kind", config.kind, "only a decoder generates text")
        check(config.head and not config.num_classes, f"{where}: head", config.head, "this model predicts no next token")
        check(model.tokenizer is not None, f"{where}: tokenizer", None, "a model without a tokenizer generates no text")
        assert model.tokenizer is not None
        self.model, self.tokenizer = model, model.tokenizer
        self.structure, self.values = model.structure, model.values
        if serving:
            self.structure, self.values = serving_form(model.structure, model.values, consume=consume)
        self.decoder = decoder(self.structure, executor)

    @property
    def ends(self) -> list[int]:
        """Ids that end a text: the tokenizer's, and those that the model's own generation settings name."""
        source = self.model.source
        named = (source.get("generation") or source.get("config") or {}).get("eos_token_id")
        listed = named if isinstance(named, list) else [] if named is None else [named]
        good = all(type(one) is int and 0 <= one < 2**31 for one in listed)
        check(good, f"--model = {self.model.name!r}: eos_token_id", named, "expected a token id or a list of them")
        return sorted({self.tokenizer.eos_id, *listed})

    def encode(self, prompt: str) -> list[int]:
        """Ids of a plain prompt, with the ids that the tokenizer puts before a text."""
        return [*self.tokenizer.prefix_ids, *map(int, self.tokenizer.encode(prompt))]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a conversation up to where the assistant speaks; the template spells its special tokens out.

        Raises:
          ConfigError: no template, or messages that it refuses.
        """
        special = {f"{role}_token": text for role, text in (self.model.source.get("special_tokens") or {}).items()}
        where = f"--model = {self.model.name!r}"
        text = render_chat(self.model.chat_template, messages, special_tokens=special, where=where)
        return list(map(int, self.tokenizer.encode(text)))

    def check_room(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """Raise a ConfigError where a prompt and its continuation are more than the model's positions."""
        config = self.model.config
        for index, prompt in enumerate(prompts):
            highest, rows = max(prompt, default=0), config.vocab_size
            check(highest < rows, f"prompt[{index}]", f"token {highest}", f"the model's embedding has {rows} rows")
        limit = config.max_length
        if config.kind == "encoder_decoder" or config.positions.kind not in LIMITED_POSITIONS or not limit:
            return
        for index, prompt in enumerate(prompts):
            check(len(prompt) < limit, f"prompt[{index}]", f"{len(prompt)} tokens", f"the model has {limit} positions")
            rule = f"prompt[{index}] has {len(prompt)} tokens, and the model {limit} positions: at most {limit - len(prompt)}"
            check(len(prompt) + max_new_tokens <= limit, "--max-new-tokens", max_new_tokens, rule)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[tuple[list[str], list[int]]]:
        """(new text, number of new tokens) of every row, as chunks are decoded; see `text_stream.stream_text`."""
        params, inputs = self._inputs(prompts)
        return stream_text(self.decoder, params, self.tokenizer, inputs, max_new_tokens, sampling, seed, self.ends, stop)

    def speed(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling, timed: int, probe: Any = None
    ) -> dict[str, Any]:
        """Rates of a run of at most `timed` new tokens by programs that `stream` has compiled, beside the memory's.

        Returns:
          tokens per second of prefill and decode, bytes that a step reads, their rate, the rate at which memory is read, and
          the fraction of it that is reached.
        """
        probe = probe or decode_speed.Probe()
        params, inputs = self._inputs(prompts)
        width = max(map(len, inputs))
        slots = cache_slots(width, max_new_tokens)
        new = max(2, min(timed, max_new_tokens))
        before = probe.read()
        speed = decode_speed.measure(self.decoder, params, inputs, new, sampling, slots)
        bandwidth = max(before, probe.read())
        weights = read_bytes(self.structure, self.values)
        cache = decode_speed.cache_read_bytes(self.decoder, len(inputs), slots, width + new // 2)
        rate = (weights + cache) / speed.step_seconds
        return {
            "prefill_tokens_per_second": speed.prefill,
            "decode_tokens_per_second": speed.decode,
            "weight_bytes": weights,
            "cache_bytes": cache,
            "bytes_per_second": rate,
            "read_bandwidth": bandwidth,
            "fraction_of_read_bandwidth": rate / bandwidth,
        }

    def _inputs(self, prompts: Sequence[Sequence[int]]) -> tuple[Params, list[list[int]]]:
        """Params and what the decoder starts from: the prompts, or of an encoder-decoder its start token."""
        if self.model.config.kind == "decoder":
            return Params(self.values), [list(prompt) for prompt in prompts]
        published = self.model.source.get("config") or {}
        start = int(published.get("decoder_start_token_id", self.tokenizer.pad_id))
        return encode_prompts(self.structure, self.values, prompts), [[start]] * len(prompts)
