"""A model as lm-eval (EleutherAI's language model evaluation harness) sees one: `simple_evaluate(model=lm_eval_model(m), ...)`.

lm-eval is optional and imported only when `lm_eval_model` is called. Its requests go through the same tokenization, truncation
and scoring as `evaluate.tasks`, and both give the same log-likelihoods for the same rows. Its `acc_bytes` is our `acc_norm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from sparsejax.evaluate.generate import Params, decoder
from sparsejax.evaluate.progress import no_progress, progress_bar
from sparsejax.evaluate.sampling import Sampling
from sparsejax.evaluate.scoring import Row, Scorer
from sparsejax.evaluate.tasks import encode_pairs, truncate
from sparsejax.evaluate.text_stream import stream_text
from sparsejax.io.model import Model
from sparsejax.plugs import ConfigError, check

MAX_GENERATED = 256  # tokens, where a request does not say (lm-eval's own default)
GENERATED_TOGETHER = 8  # prompts, where no batch size is given


class Request(Protocol):
    """What is read of an `lm_eval.api.instance.Instance`."""

    @property
    def args(self) -> tuple[Any, ...]: ...


class Responder:
    """Answers lm-eval's three kinds of request; knows nothing of lm-eval's classes."""

    def __init__(self, model: Model, batch: int = 0):
        """Prepare a model.

        Args:
          model: a causal language model with its tokenizer.
          batch: rows per forward pass; 0: chosen by length and device.
        Raises:
          ConfigError: not a language model, or one without tokenizer.
        """
        if model.tokenizer is None:
            raise ConfigError(f"--model = {model.name!r}: has no tokenizer, so that no text can be put to it")
        super().__init__()
        self.model, self.text, self.scorer = model, model.tokenizer, Scorer(model, batch)
        self._decoder = decoder(model.structure)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's caches of requests."""
        return self.text.fingerprint

    def loglikelihood(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p, whether greedy decoding gives it) of each continuation after its context: args = (context, continuation)."""
        where = [f"request {i}" for i in range(len(requests))]
        pairs = [(context, continuation) for context, continuation in (request.args for request in requests)]
        rows, _ = truncate(encode_pairs(pairs, self.text, where), self.scorer.max_length, where)
        nll, greedy = self._score(rows, disable_tqdm)
        return [(-float(loss), bool(hit)) for loss, hit in zip(nll, greedy, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text: args = (text,).

        A text longer than the model is cut so that every token is predicted once and the last stretch has full context.
        """
        rows, owner = [], []
        for index, request in enumerate(requests):
            (text,) = request.args
            stretches = rolling_rows(self.text.encode(text), self.text.bos_id, self.scorer.max_length)
            rows += stretches
            owner += [index] * len(stretches)
        nll, _ = self._score(rows, disable_tqdm)
        return (-np.bincount(owner, weights=nll, minlength=len(requests))).tolist() if rows else [0.0] * len(requests)

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """What follows each prompt up to a stop string: args = (prompt, options).

        Options: `until` (stop strings), `max_gen_toks`, `do_sample` with `temperature`, `top_k`, `top_p`; greedy otherwise.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        texts = [""] * len(requests)
        size = self.scorer.batch or GENERATED_TOGETHER
        for group in groups.values():
            for begin in range(0, len(group), size):
                chosen = group[begin : begin + size]
                found = self._continue([requests[i].args[0] for i in chosen], requests[chosen[0]].args[1])
                for index, text in zip(chosen, found, strict=True):
                    texts[index] = text
        return texts

    def _score(self, rows: list[Row], quiet: bool) -> tuple[np.ndarray, np.ndarray]:
        progress = no_progress if quiet else progress_bar
        with progress(self.model.name, sum(len(row.tokens) for row in rows)) as advance:
            return self.scorer.score(rows, advance)

    def _continue(self, prompts: list[str], options: dict[str, Any]) -> list[str]:
        until = options.get("until") or []
        stop = [until] if isinstance(until, str) else [string for string in until if string]
        limit = int(options.get("max_gen_toks", MAX_GENERATED))
        room = self.scorer.max_length - limit
        check(room > 0, "max_gen_toks", limit, f"must leave the prompt some of the model's {self.scorer.max_length} positions")
        encoded = self.text.encode_batch(prompts)
        tokens = [[*self.text.prefix_ids, *ids.tolist()][-room:] or [self.text.bos_id] for ids in encoded]
        ends, params = [self.text.eos_id], Params(self.model.values)
        parts = stream_text(self._decoder, params, self.text, tokens, limit, _sampling(options), ends=ends, stop=stop)
        return ["".join(row) for row in zip(*(texts for texts, _ in parts), strict=True)]


def lm_eval_model(model: Model, batch: int = 0) -> Any:
    """An `lm_eval.api.model.LM` that answers from a model.

    Raises:
      ConfigError: lm-eval is not installed, or the model is not a language model with a tokenizer.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ConfigError("lm-eval is not installed; it is optional: pip install lm-eval") from error
    return type("SparsejaxLM", (Responder, LM), {})(model, batch)


def rolling_rows(tokens: np.ndarray, first: int, max_length: int) -> list[Row]:
    """Rows of at most `max_length` inputs that predict each token once: stretches of `max_length`, the last with full context.

    Args:
      tokens: int[N] of the text, all of which are predicted.
      first: the id before the text.
    """
    whole = np.concatenate([np.array([first], np.int32), np.asarray(tokens, np.int32)])
    rows = []
    for begin in range(1, len(whole), max_length):
        end = min(begin + max_length, len(whole))
        low = max(0, end - max_length - 1)
        rows.append(Row(whole[low:end], begin - low))
    return rows


def _sampling(options: dict[str, Any]) -> Sampling:
    if not options.get("do_sample", options.get("temperature", 0) > 0):
        return Sampling(temperature=0)
    return Sampling(float(options.get("temperature", 1)), int(options.get("top_k", 0)), float(options.get("top_p", 1)))
