"""Chat templates: rendered as the reference does, and never more than one error from one that is broken."""

import re

import pytest

from sparsejax.io.chat import render_chat
from sparsejax.plugs import ConfigError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello <you> & 'me'"}]


def test_messages_become_the_prompt_that_the_template_spells():
    assert render_chat(CHATML, HELLO) == "<|im_start|>user\nHello <you> & 'me'<|im_end|>\n<|im_start|>assistant\n"
    assert render_chat(CHATML, HELLO, add_generation_prompt=False) == "<|im_start|>user\nHello <you> & 'me'<|im_end|>\n"


def test_special_tokens_and_further_variables_reach_the_template():
    template = "{{ bos_token }}{{ messages[0].content | trim }}{{ eos_token }}{{ pad_token }}{{ 'T' if thinking else 'F' }}"
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    assert render_chat(template, [{"role": "user", "content": " x "}], special_tokens=tokens, thinking=True) == "<s>x</s>T"


def test_blocks_are_trimmed_as_the_reference_trims_them():
    template = "{% for m in messages %}\n  {% if loop.first %}\n<{{ m.role }}>\n  {% endif %}\n{{ m.content }}\n{% endfor %}"
    assert render_chat(template, [{"role": "a", "content": "1"}, {"role": "b", "content": "2"}]) == "<a>\n1\n2\n"


def test_json_is_not_escaped_for_html_and_loops_can_be_left():
    template = "{{ messages[0].content | tojson }}{% for m in messages %}{{ loop.index }}{% break %}{% endfor %}"
    assert render_chat(template, HELLO + HELLO) == "\"Hello <you> & 'me'\"1"
    assert render_chat("{{ messages[0] | tojson(indent=1) }}", HELLO).startswith('{\n "role": "user"')


def test_the_generation_tag_prints_its_body():
    assert render_chat("{% generation %}{{ messages[0].role }}!{% endgeneration %}", HELLO) == "user!"


def test_dates_are_formatted():
    assert re.fullmatch(r"\d{4}-\d\d", render_chat("{{ strftime_now('%Y-%m') }}", HELLO))


def test_a_model_without_a_template_is_refused():
    with pytest.raises(ConfigError, match="no chat template"):
        render_chat(None, HELLO)


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ messages[ }}", "{% nonsense %}", "{{ 1 | nosuchfilter }}"])
def test_a_broken_template_is_refused_with_its_line(template):
    with pytest.raises(ConfigError, match=r"model.gguf: line 2: not a valid Jinja2 template"):
        render_chat("\n" + template, HELLO, where="model.gguf")


@pytest.mark.parametrize("template", [
    "{{ messages[7]['content'] + 'x' }}", "{{ 1 / 0 }}", "{{ undefined_function() }}", "{{ messages[0].content + 3 }}",
    "{{ (1).__class__.__mro__[-1].__subclasses__() }}", "{{ ''.__class__ }}{{ cycler.__init__.__globals__.os.getcwd() }}",
    "{{ messages.append(1) }}", "{{ range(10**9) | list }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
])  # fmt: skip
def test_a_template_that_fails_or_reaches_out_is_refused(template):
    with pytest.raises(ConfigError, match="chat template: the template failed on these messages"):
        render_chat(template, HELLO)


def test_what_a_template_says_of_refused_messages_is_repeated():
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
    with pytest.raises(ConfigError, match="refuses these messages: begin with the user"):
        render_chat(template, [{"role": "assistant", "content": ""}])


@pytest.mark.parametrize("messages", [[], ["hello"], [{"role": "user"}], [{"role": 3, "content": ""}], [{"content": ""}]])
def test_messages_of_another_shape_are_refused(messages):
    with pytest.raises(ConfigError, match="message"):
        render_chat(CHATML, messages)
