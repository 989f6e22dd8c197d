"""Chat templates: a conversation as the text that a model was trained to continue."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from sparsejax.plugs import ConfigError

LONGEST_MESSAGE = 200  # characters of a template's own error that are repeated


def render_chat(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    special_tokens: Mapping[str, str] | None = None,
    add_generation_prompt: bool = True,
    where: str = "chat template",
    **variables: Any,
) -> str:
    """The prompt of a conversation, by a template as published models carry it (Jinja2, as `transformers` renders it).

    Args:
      template: the model's; None where it has none.
      messages: in order, each with `role` (`system`, `user`, `assistant`, ...) and `content`.
      special_tokens: `bos_token`, `eos_token`, ... as text; those that a template names and that are not given are empty.
      add_generation_prompt: end with the beginning of the assistant's turn.
      where: the template's file, for messages.
      variables: what else a template may ask for, e.g. `tools` or `enable_thinking`.
    Returns:
      Text with the special tokens spelled out: encode it without adding any.
    Raises:
      ConfigError: no template, one that is no valid Jinja2, messages that it refuses, or one that fails.
    """
    if template is None:
        raise ConfigError(f"{where}: the model has no chat template; give it a plain prompt instead of messages")
    _check_messages(messages, where)
    tokens = {"bos_token": "", "eos_token": "", "pad_token": "", "unk_token": "", **(special_tokens or {})}
    compiled = _compile(template, where)
    try:
        return compiled.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **{**tokens, **variables})
    except _Refused as error:
        raise ConfigError(f"{where}: the template refuses these messages: {error}") from error
    except Exception as error:  # whatever a template's own expressions do
        reason = str(error)[:LONGEST_MESSAGE] or type(error).__name__
        raise ConfigError(f"{where}: the template failed on these messages: {reason}") from error


class _Refused(Exception):
    """A template called `raise_exception`."""


def _check_messages(messages: Sequence[Mapping[str, Any]], where: str) -> None:
    if not messages:
        raise ConfigError(f"{where}: there are no messages")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ConfigError(f"{where}: messages[{index}] = {message!r}: expected a mapping with 'role' (text) and 'content'")


@lru_cache(maxsize=8)
def _compile(template: str, where: str) -> Any:
    import jinja2

    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{where}: line {error.lineno}: not a valid Jinja2 template: {error.message}") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: not a valid Jinja2 template: nested too deep") from error


def _environment() -> Any:
    """Templates come with downloaded files: they may compute on what they are given, and reach nothing else."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant said, for training; it prints its body."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment


def _to_json(value: Any, **options: Any) -> str:
    """Jinja's own filter escapes HTML, which a prompt must not."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _refuse(message: str) -> None:
    raise _Refused(message)
