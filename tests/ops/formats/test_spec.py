"""Formats as strings: what can be written, what is refused, and how."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.ops.formats.grids import ELEMENTS
from sparsejax.ops.formats.rounding import ROUNDINGS
from sparsejax.ops.formats.spec import PUBLISHED, RAGGED, RULES, SCALES, SYMMETRIC, WHOLE, ZEROS, FormatSpec
from sparsejax.plugs import ConfigError
from tests.ops.formats.samples import ALL

VALUES = {"ragged": RAGGED, "zero": ZEROS, "round": ROUNDINGS, "scale": SCALES, "rule": RULES, "codes": ("exact",),
          "axis": ("-1", "-2"), "group": ("1", "16", "128"), "block": ("128x128", "1x16")}  # fmt: skip
WORDS = (*WHOLE, *SYMMETRIC, "double", "two_level", "static", "indexed")


@st.composite
def texts(draw):
    """Spellings of which many name a format."""
    options = draw(st.lists(st.sampled_from([*WORDS, *VALUES]), max_size=4, unique=True))
    values = [option if option in WORDS else f"{option}={draw(st.sampled_from(VALUES[option]))}" for option in options]
    name = draw(st.sampled_from([*ELEMENTS, *PUBLISHED]))
    return f"{name}:{','.join(values)}" if values else name


@given(st.lists(texts(), min_size=20, max_size=20))
def test_what_parses_comes_back_from_its_string(spellings):
    for text in spellings:
        try:
            spec = FormatSpec.parse(text)
        except ConfigError as error:
            assert repr(text) in str(error)
            continue
        again = FormatSpec.parse(str(spec))
        assert again == spec and hash(again) == hash(spec) and str(again) == str(spec)


@pytest.mark.parametrize("text", ALL)
def test_the_shortest_spelling_is_the_one_that_is_printed(text):
    spec = FormatSpec.parse(text)
    assert str(spec) == text and repr(spec) == f"FormatSpec({text!r})"
    assert pickle.loads(pickle.dumps(spec)) == spec


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("int4:channel", "int4"),
        ("fp8_e4m3:channel,scale=f32", "fp8_e4m3"),
        ("int4:ragged=tail,group=128,asym", "int4:asym,group=128,ragged=tail"),
        ("fp4_e2m1:group=32,scale=e8m0", "mxfp4"),
        ("fp4_e2m1:two_level,group=16", "nvfp4"),
        ("mxfp4:group=16", "fp4_e2m1:group=16,scale=e8m0"),
        ("nf4:group=64,double", "nf4:group=64,double"),
        ("int4:group=64,scale=f16", "int4:group=64"),
        ("q4_0:round=even", "q4_0:round=even"),
    ],
)
def test_one_format_has_one_spelling(text, printed):
    assert str(FormatSpec.parse(text)) == printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9", r"model.format: element = 'int9': allowed are 'int2', .*Did you mean 'int"),
        ("mxpf4", "Did you mean 'mxfp4'"),
        ("int4:grup=64", r"model.format = 'int4:grup=64': option 'grup=64': allowed are tensor, .*Did you mean 'group='"),
        ("int4:group", "option 'group': allowed are .*Did you mean 'group='"),
        ("int4:asym=1", "option 'asym=1'"),
        ("int4:group=x4", "group = '': expected a whole number"),
        ("int4:scale=", "scale = '': needs a value"),
        ("int4:full15,scale=e8m0", "holds no scale of int4 full15"),
        ("int4:group=0", r"group = \(0,\): needs 1 positive"),
        ("int4:block=16", r"block = \(16,\): needs 2 positive"),
        ("int4:asym,full15", "'full15' sets what was set before"),
        ("int4:token,group=8", "'group=8' sets what was set before"),
        ("int4:asym,zero=flot", "zero = 'flot': allowed are 'int', 'float', 'min'. Did you mean 'float'"),
        ("int4:zero=float", "zero = 'float': is for asym"),
        ("mxfp4:asym", "symmetric = 'asym': is for integers"),
        ("int4:rule=ceil", "rule = 'ceil': is for scale=e8m0"),
        ("int4:asym,scale=e8m0", "holds no scale of int4 asym"),
        ("ternary:scale=e4m3", "holds no scale of ternary"),
        ("int4:ragged=tail", "ragged = 'tail': is for groups and blocks"),
        ("int4:axis=-1", "axis = -1: is for groups"),
        ("int4:group=8,axis=0", "axis = 0: allowed are -2, -1"),
        ("nf4:double", "second = 'double': is for the float32 scales"),
        ("fp4_e2m1:two_level,scale=f16", "second = 'two_level': is for scale=e4m3"),
        ("int4:group=8,asym,codes=exact", "codes = 'exact': is for"),
        (64, "expected the name of a number format"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(text, message):
    with pytest.raises(ConfigError, match=message):
        FormatSpec.parse(text, "model.format")


def test_a_group_that_does_not_divide_is_refused_with_one_that_does():
    with pytest.raises(ConfigError, match=r"'int4:group=128': 576 channels .* ragged=tail, ragged=pad, .* such as 96"):
        FormatSpec.parse("int4:group=128").block((576, 1536))
    assert FormatSpec.parse("int4:group=128,axis=-1").block((576, 1536)) == (1, 128)
    assert FormatSpec.parse("int4:group=128,ragged=tail").padded((576, 10)) == (576, 10)
    assert FormatSpec.parse("int4:group=128,ragged=pad").padded((576, 10)) == (640, 10)
