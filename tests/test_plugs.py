import dataclasses
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax import plugs
from sparsejax.plugs import ConfigError, parse_int, register, resolve, resolve_chain

KIND = "test_plug"


@register(KIND, "keep")
@dataclasses.dataclass(frozen=True)
class Keep:
    fraction: float = 0.5
    steps: int = 0
    exact: bool = True
    widths: tuple[int, ...] = (1, 2)
    limit: float | None = None
    side: Literal["left", "right"] = "left"


@register(KIND, "file")
@dataclasses.dataclass(frozen=True)
class File:
    path: str


@register(KIND, "positive")
@dataclasses.dataclass(frozen=True)
class Positive:
    value: int

    def __post_init__(self) -> None:
        plugs.check(self.value > 0, "value", self.value, "must be positive")


@register(KIND, "constant")
def constant() -> str:
    return "made"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("keep", Keep()),
        ("keep:", Keep()),
        (" keep:0.25 ", Keep(0.25)),
        ("keep:0.25,1e3,false", Keep(0.25, 1000, False)),
        ("keep:steps=7, fraction=0.125", Keep(0.125, 7)),
        ("keep:0.25,side=right", Keep(0.25, side="right")),
        ("keep:widths=3/4/5", Keep(widths=(3, 4, 5))),
        ("keep:limit=2,exact=0", Keep(limit=2.0, exact=False)),
        ("keep:limit=none", Keep(limit=None)),
        ("file:a,b=c|d:e.txt", File("a,b=c|d:e.txt")),
        ("file:path=x.txt", File("x.txt")),
        ("positive:3", Positive(3)),
        ("constant", "made"),
    ],
)
def test_a_spec_string_gives_its_spec(text, expected):
    assert resolve(KIND, text) == expected


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("kep", ["'kep'", "Did you mean 'keep'?", "'constant'"]),
        ("", ["''", "allowed are"]),
        ("keep:fractoin=1", ["'fractoin'", "Did you mean 'fraction'?"]),
        ("keep:half", ["keep.fraction", "'half'", "float"]),
        ("keep:nan", ["keep.fraction", "'nan'", "number"]),
        ("keep:steps=1.5", ["keep.steps", "'1.5'", "int"]),
        ("keep:steps=inf", ["keep.steps", "'inf'", "int"]),
        ("keep:exact=maybe", ["keep.exact", "'maybe'", "bool"]),
        ("keep:widths=1/x", ["keep.widths", "'x'", "int"]),
        ("keep:side=lef", ["keep.side", "'lef'", "Did you mean 'left'?"]),
        ("keep:0.5,fraction=0.5", ["'fraction'", "given twice"]),
        ("keep:fraction=0.5,3", ["'3'", "no name"]),
        ("keep:0.5,,1", ["empty value"]),
        ("keep:0.5,1,true,1,2,left,7", ["at most 6"]),
        ("file", ["'file' needs path"]),
        ("positive:0", ["value = 0: must be positive"]),
        ("constant:1", ["takes no arguments"]),
        (3, ["= 3", "as a string"]),
        (None, ["= None", "as a string"]),
    ],
)
def test_a_bad_spec_names_the_field_the_value_and_what_is_allowed(text, parts):
    with pytest.raises(ConfigError) as caught:
        resolve(KIND, text, "model.inputs[0]")
    message = str(caught.value)
    assert message.startswith("model.inputs[0]")
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_chain_resolves_in_order():
    assert resolve_chain(KIND, "keep:0.1|positive:2") == (Keep(0.1), Positive(2))
    assert resolve_chain(KIND, " ") == ()


def test_one_name_cannot_be_registered_twice():
    with pytest.raises(ValueError, match="registered twice"):
        register(KIND, "keep")(File)
    assert register(KIND, "keep")(Keep) is Keep


@given(st.floats(allow_nan=False), st.integers(-(10**18), 10**18), st.booleans(), st.lists(st.integers(), min_size=1))
def test_values_survive_being_written_as_a_spec(fraction, steps, exact, widths):
    text = f"keep:{fraction!r},steps={steps},exact={str(exact).lower()},widths={'/'.join(map(str, widths))}"
    assert resolve(KIND, text) == Keep(fraction, steps, exact, tuple(widths))


@given(st.integers(0, 10**15))
def test_a_whole_number_may_be_written_as_a_float(number):
    assert parse_int(f"{number}.0") == number
    assert parse_int(f"{number:e}") == int(float(f"{number:e}"))


@given(st.text(max_size=30))
def test_any_text_resolves_or_is_refused_with_a_config_error(text):
    for name in ("keep", "file", "positive", "constant"):
        try:
            resolve(KIND, f"{name}:{text}")
        except ConfigError:
            continue


def test_every_registered_spec_is_frozen_and_has_a_docstring():
    for kind in ("nonlinearity", "feed", "objective", "source", "tokenizer", "task", "activation_op", "weight_op"):
        for name in plugs.names(kind):
            target = plugs._REGISTRY[kind][name]
            spec_class = target if isinstance(target, type) else type(resolve(kind, name))
            assert dataclasses.is_dataclass(spec_class), (kind, name)
            assert spec_class.__dataclass_params__.frozen, (kind, name)
            assert spec_class.__doc__ and not spec_class.__doc__.startswith(f"{spec_class.__name__}("), (kind, name)
