import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import entry
from sparsejax.plugs import ConfigError

ROOT = Path(__file__).resolve().parent.parent
TINY = "--config=configs/tiny_relu2.py"


@dataclasses.dataclass
class Flags:
    out: str = entry.flag("", "run folder")
    tokens: int = entry.flag(16, "how many")
    rate: float = entry.flag(0.5, "how fast")
    quiet: bool = entry.flag(False, "say less")
    tags: tuple[str, ...] = entry.flag((), "names")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def parse(*argv, **options):
    return entry.parse(["prog", *argv], Flags, **options)[0]


def test_overrides_reach_nested_fields_and_derived_fields_follow():
    call = parse(TINY, "--config.model.num_layers=6", "--config.model.d_model", "64", "--config.optimizer.learning_rate=1e-3")
    assert (call.config.model.num_layers, call.config.model.d_model, call.config.optimizer.learning_rate) == (6, 64, 1e-3)
    assert call.config.model.attention.head_dim == 16
    assert call.config.model.ffn.hidden == 256
    assert (call.base.model.num_layers, call.base.model.attention.head_dim) == (4, 0)


@pytest.mark.parametrize(("text", "steps"), [("1e3", 1000), ("1000", 1000), ("2.5e2", 250), ("7.0", 7)])
def test_a_whole_number_may_be_written_with_an_exponent(text, steps):
    found = parse(TINY, f"--config.steps={text}").config.steps
    assert found == steps and type(found) is int


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--config.model.inputs=blocks.*.mlp.down=int8"], ("blocks.*.mlp.down=int8",)),
        (["--config.model.inputs=blocks.*.{attn.q,attn.k}=int8:start=3"], ("blocks.*.{attn.q,attn.k}=int8:start=3",)),
        (["--config.model.inputs=blocks.*.attn.*=int8", "--config.model.inputs=blocks.*.mlp.*=int8"],
         ("blocks.*.attn.*=int8", "blocks.*.mlp.*=int8")),
        (["--config.model.inputs=('blocks.*.attn.*=int8', 'blocks.*.mlp.*=int8')"],
         ("blocks.*.attn.*=int8", "blocks.*.mlp.*=int8")),
        (["--config.model.inputs="], ()),
        (["--config.model.inputs=()"], ()),
    ],
)
def test_a_tuple_is_one_string_or_a_python_tuple_or_a_repeated_flag(flags, value):
    assert parse(TINY, *flags).config.model.inputs == value


def test_booleans_have_three_spellings():
    assert parse(TINY, "--config.model.attention.bias").config.model.attention.bias is True
    assert parse(TINY, "--noconfig.model.scan").config.model.scan is False
    assert parse(TINY, "--config.model.scan=false").config.model.scan is False


def test_the_config_may_stand_anywhere_and_carry_an_argument():
    call = parse("--config.steps=5", "--out=x", "--config", "configs/lm_30m.py:text:a=b,c.txt")
    assert (call.config.steps, call.config.data.source, call.flags.out) == (5, "text:a=b,c.txt", "x")


def test_flags_of_the_verb_have_types():
    assert parse(TINY).flags == Flags()
    call = parse(TINY, "--tokens=1e2", "--rate=2", "--quiet", "--tags=a", "--tags=b,c")
    assert call.flags == Flags("", 100, 2.0, True, ("a", "b,c"))


def test_positional_names_are_taken_where_the_verb_wants_them():
    assert parse("teal", "wina", config=False, names="claim").names == ("teal", "wina")
    assert parse(config=False).config is None


def test_a_config_file_needs_no_repository(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "from sparsejax.config import ExperimentConfig\n"
        "def get_config(arg=''):\n"
        "    return ExperimentConfig(name=arg or 'own')\n"
    )
    assert parse(f"--config={path}:mine").config.name == "mine"
    saved = tmp_path / "config.json"
    saved.write_text('{"name": "saved", "steps": 3}')
    assert parse(f"--config={saved}", "--config.steps=4").config.steps == 4


REFUSED = [
    ([], ["--config", "configs/tiny_relu2.py"]),
    (["--config"], ["--config", "give a config file"]),
    (["--config", "--out=x"], ["--config", "give a config file"]),
    ([TINY, TINY], ["--config", "twice"]),
    (["--config=configs/tiny_relu.py"], ["'configs/tiny_relu.py'", "no such file", "Did you mean 'configs/tiny_relu2.py'?"]),
    (["--config=configs"], ["'configs'", "no such file"]),
    (["--config=README.md"], ["README.md", ".py or .json"]),
    (["--config=configs/tiny_relu2.py:big"], ["tiny_relu2 = 'big'", "takes no argument"]),
    (["--config.steps=3"], ["--config.steps=3", "needs --config"]),
    ([TINY, "--config.step=3"], ["--config.step:", "Did you mean 'steps'?"]),
    ([TINY, "--config.model.num_layer=3"], ["--config.model.num_layer:", "Did you mean 'model.num_layers'?"]),
    ([TINY, "--config.num_layers=3"], ["Did you mean 'model.num_layers'?"]),
    ([TINY, "--config.model=3"], ["config.model is a group", "num_layers"]),
    ([TINY, "--config.steps[0]=3"], ["--config.steps[0]", "Did you mean 'steps'?"]),
    ([TINY, "--config.steps=many"], ["--config.steps=many", "whole number"]),
    ([TINY, "--config.steps=1.5"], ["--config.steps=1.5", "whole number"]),
    ([TINY, "--config.steps=inf"], ["--config.steps=inf", "whole number"]),
    ([TINY, "--config.steps"], ["--config.steps", "alue"]),
    ([TINY, "--config.optimizer.learning_rate=fast"], ["--config.optimizer.learning_rate=fast"]),
    ([TINY, "--config.optimizer.learning_rate=nan"], ["optimizer.learning_rate", "finite"]),
    ([TINY, "--config.model.scan=maybe"], ["--config.model.scan=maybe"]),
    ([TINY, "--config.model.inputs=(1, 2)"], ["--config.model.inputs", "tuple"]),
    ([TINY, "--config.model.inputs=(a"], ["--config.model.inputs", "tuple"]),
    ([TINY, "--config.model.attention.num_heads=3"], ["model.attention.num_heads = 3", "d_model = 128"]),
    ([TINY, "--ouot=x"], ["--ouot", "Did you mean --out?"]),
    ([TINY, "--tokens=few"], ["--tokens=few", "whole number"]),
    ([TINY, "stray"], ["stray", "flags only"]),
    ([TINY, "--json=configs"], ["--json", "folder"]),
    ([TINY, "--json=README.md/x.json"], ["--json", "README.md"]),
]


@pytest.mark.parametrize(("argv", "parts"), REFUSED, ids=[" ".join(argv)[-50:] for argv, _ in REFUSED])
def test_a_bad_command_line_is_refused_in_the_users_terms(argv, parts):
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("def get_config(arg):\n    return 1 +\n", ["line 2", "invalid syntax"]),
        ("import nothing_of_this_name\n", ["line 1", "ModuleNotFoundError", "nothing_of_this_name"]),
        ("x = 1\n", ["no function get_config"]),
        ("def get_config(arg):\n    return 3\n", ["returned int", "ExperimentConfig"]),
        ("def get_config(arg):\n    pass\n", ["returned NoneType"]),
        ("def get_config():\n    return 3\n", ["TypeError"]),
        ("def get_config(arg):\n    x = 1\n    return x[0]\n", ["line 3", "TypeError"]),
        (
            "from sparsejax.config import ExperimentConfig\ndef get_config(arg):\n    c = ExperimentConfig()\n"
            "    c.model.layers = 3\n    return c\n",
            ["model.layers", "no such config field"],
        ),
    ],
)
def test_a_broken_config_file_is_named_with_its_line(tmp_path, text, parts):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse(f"--config={path}")
    for part in parts:
        assert part in str(caught.value)


def test_a_saved_config_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes('{"name": "é"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot be read"):
        parse(f"--config={path}")


def test_a_refusal_is_one_message_and_status_two(capsys):
    def main(call):
        raise ConfigError("steps = 3: too few")

    with pytest.raises(SystemExit) as left:
        entry.run(main, config=False, argv=["prog"])
    assert left.value.code == 2
    assert capsys.readouterr() == ("", "error: steps = 3: too few\n")


def test_other_errors_are_not_dressed_up_as_refusals():
    def main(call):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        entry.run(main, config=False, argv=["prog"])


def test_the_result_is_written_as_strict_json(tmp_path):
    @dataclasses.dataclass
    class Row:
        name: str
        value: np.floating

    path = tmp_path / "new" / "result.json"

    def main(call):
        rows = (Row("a", np.float32(0.5)),)
        return {"rows": rows, "mfu": math.nan, "counts": np.arange(3), "path": Path("x"), "none": None, "ok": True}

    with pytest.raises(SystemExit) as left:
        entry.run(main, config=False, argv=["prog", f"--json={path}"])
    assert left.value.code == 0
    expected = {"rows": [{"name": "a", "value": 0.5}], "mfu": None, "counts": [0, 1, 2], "path": "x", "none": None, "ok": True}
    assert json.loads(path.read_text()) == expected
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(TypeError, match="no JSON value"):
        entry.write_json(path, {"x": object()})
    assert path.read_text() == "old"


def test_help_lists_the_flags(capsys):
    with pytest.raises(SystemExit) as left:
        parse("--help")
    assert left.value.code == 0
    text = capsys.readouterr().out
    for part in ("--tokens", "how many", "--json", "--config"):
        assert part in text


def test_as_a_process_a_refusal_leaves_no_traceback(tmp_path):
    program = "from experiments import entry; entry.run(lambda call: print(call.config.steps))"

    def call(*argv):
        environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
        return subprocess.run([sys.executable, "-c", program, *argv], cwd=ROOT, env=environment, capture_output=True, text=True)

    done = call(TINY, "--config.steps=2e2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "200\n", "")
    refused = call(TINY, "--config.stpes=3")
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.count("\n") == 1 and "Did you mean 'steps'?" in refused.stderr
