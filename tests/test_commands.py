"""What the README and the Makefile promise, as far as it can be checked without running for minutes (.ci/run does that)."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from experiments import analyze, bench, compress, entry, evaluate, export, generate, report, train
from experiments.claims import __main__ as claims
from sparsejax.plugs import ConfigError

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
COMMANDS = [line.partition(" #")[0].strip() for line in BLOCKS.splitlines()]
PYTHON_COMMANDS = [command for command in COMMANDS if command.startswith("python ")]
MODULES = (train, bench, evaluate, generate, export, compress, report, analyze, claims)
VERBS = {verb.__name__.removesuffix(".__main__"): verb.Flags for verb in MODULES}
# What positional arguments of a verb are.
NAMES = {"experiments.bench": "benchmark", "experiments.report": "report folder", "experiments.claims": "claim"}


def test_the_readme_opens_with_the_two_commands():
    assert COMMANDS[:2] == ["make demo", "make test"]
    assert len(PYTHON_COMMANDS) >= 3


@pytest.mark.parametrize("command", PYTHON_COMMANDS)
def test_a_readme_command_resolves(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, _, verb, *argv = shlex.split(command)
    takes_config = verb in ("experiments.train", "experiments.bench")
    call, _ = entry.parse([verb, *argv], VERBS[verb], config=takes_config, names=NAMES.get(verb, ""))
    assert (call.config is not None) == takes_config


@pytest.mark.parametrize(
    ("argv", "part"),
    [(["--steps=1"], "--steps = 1"), (["--rounds=0"], "--rounds = 0"), (["more"], "benchmark = 'train more'")],
)
def test_a_benchmark_of_nothing_is_refused(argv, part):
    config = f"--config={ROOT / 'configs/tiny_relu2.py'}"
    call, _ = entry.parse(["bench", "train", config, *argv], bench.Flags, names="benchmark")
    with pytest.raises(ConfigError, match=part):
        bench.main(call)


def test_every_file_that_the_readme_links_is_there():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        if not target.startswith("results/"):
            assert (ROOT / target).exists(), target


def test_an_older_interpreter_gets_one_clear_line(tmp_path):
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt", ".python-version"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.10.4"\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(["make", "setup", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    message, *after = done.stderr.splitlines()
    assert "needs Python 3.12 or newer" in message and "Python 3.10.4" in message
    assert all(line.startswith("make") for line in after)
    assert not (tmp_path / ".venv").exists()


def test_every_requirement_has_both_bounds():
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            assert re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+", line), line
