"""`experiments.compress`: a model and a recipe to a model folder with its report.

Everything that can be refused is refused before work starts: the folder, and the recipe against the config, before the weights
are read; then data, and overlap of calibration and evaluation. An interrupted compression goes on where it was; a finished one
is left alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.compress import accounting, measure, report, report_html
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.calibration import SHINGLE, Calibration, CalibrationSpec, calibrate, check_disjoint
from sparsejax.compress.provenance import check_overlap, compression
from sparsejax.compress.recipe import TIERS, Pass, Tier, Work, check_experts, check_recipe, run_recipe
from sparsejax.compress.work_folder import WorkFolder, check_out, fingerprint, key_of
from sparsejax.data.sources import data_directories
from sparsejax.evaluate import suite
from sparsejax.evaluate.progress import Advance, progress_bar
from sparsejax.evaluate.scope import Scope
from sparsejax.io import model_folder
from sparsejax.io.load import config_of, load
from sparsejax.io.model import Model
from sparsejax.models.serving import cache_bytes
from sparsejax.models.sizes import parameter_counts
from sparsejax.plugs import ConfigError, check

QUICK_TASK_ROWS = 100  # of each task in tier quick, unless a limit is given
TIMED_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class Request:
    """What a compression is asked for.

    Fields:
      model, out: as named by the user.
      recipe, recipe_text, passes: `FILE.py:ARGUMENT`, the file's text, and what its get_recipe returned.
      data: texts and tasks to evaluate on, as `suite.open_data` takes them.
      tier: a name of `TIERS`. calibration: its zeros stand for the tier's numbers.
      scope: at which tokens sparsity acts when it is evaluated.
      window, limit: 0: the tier's. batch: windows per forward pass, 0: chosen.
      baseline: a folder of an earlier compression whose dense row is taken instead of scoring the dense model again.
      allow_overlap: calibrate on what is evaluated.
      resume: use the pieces of an interrupted compression.
      decode_tokens: decoded to measure speed; 0: not measured.
      executor: of the compressed model's sparse products while that is measured, one of `arrays.EXECUTORS`.
      pieces: where passes whose `levels_share` keep their pieces for later compressions; None: with the result, until it is
        finished, as those of the others.
      about: versions, device and command, for the report.
    """

    model: str
    out: Path
    recipe: str
    recipe_text: str
    passes: tuple[Pass, ...]
    data: tuple[str, ...]
    tier: str
    calibration: CalibrationSpec
    scope: Scope
    window: int = 0
    limit: int = 0
    batch: int = 0
    dtype: str = "float32"
    data_dir: str = ""
    baseline: str = ""
    allow_overlap: bool = False
    resume: bool = True
    decode_tokens: int = 32
    executor: str = "masked"
    pieces: Path | None = None
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def effort(self) -> Tier:
        return TIERS[self.tier]

    @property
    def label(self) -> str:
        """How tables name it: `teal:0.5`."""
        file, colon, argument = self.recipe.partition(":")
        return f"{Path(file).stem}{colon}{argument}"

    @property
    def method(self) -> str:
        """What a line of a plot joins: the label without its numbers, so that variants are told apart."""
        stem, *parts = re.split("[:,]", self.label)  # an argument may be another recipe with its own
        return ",".join([stem, *(part for part in parts if not _is_number(part))])

    def with_tier(self) -> Request:
        """With the numbers that the tier decides."""
        tier, spec = self.effort, self.calibration
        spec = dataclasses.replace(spec, sequences=spec.sequences or tier.sequences, length=spec.length or tier.length)
        return dataclasses.replace(self, calibration=spec, window=self.window or tier.window)

    def identity(self) -> dict[str, Any]:
        """All that decides the result, as JSON values."""
        names = ("model", "recipe", "tier", "window", "limit", "dtype", "allow_overlap", "decode_tokens")
        given = {name: getattr(self, name) for name in names}
        if self.executor != "masked":
            given["executor"] = self.executor
        given["recipe_sha256"] = hashlib.sha256(self.recipe_text.encode()).hexdigest()
        return {**given, "data": list(self.data), "calibration": vars(self.calibration), "scope": vars(self.scope)}


def compress(request: Request) -> dict[str, Any]:
    """Do what is asked, print for people, and return the report (`report.read` of the folder).

    Raises:
      ConfigError: a recipe that does not fit the model, unusable data or folder, calibration that overlaps the evaluation.
    """
    began = time.perf_counter()
    request = request.with_tier()
    if check_out(request.out, request.identity()):
        print(f"{request.out}: finished before; nothing to do")
        return report.read(request.out)
    task = _prepared(request)
    print("\n".join(_plan(request, task)), flush=True)
    folder = WorkFolder(request.out, _pieces_key(request, task), resume=request.resume)
    shared = _shared_folders(request, task)
    work = Work(task.calibration, request.effort, folder.pieces / "passes", _steps_bar, shared=shared)
    started = time.perf_counter()
    compressed = run_recipe(request.passes, task.model, work)
    jax.block_until_ready(compressed.values)
    cost = {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes(), "resumed": folder.resumed}
    compressed = _named(request, task, compressed)
    dense, row = _measured(request, task, compressed, folder)
    row |= {"cost": {**cost, "total_seconds": time.perf_counter() - began}, "notes": work.notes}
    document = report.document(task.protocol, [dense, row])

    def write(into: Path) -> None:
        model_folder.save(compressed, into)
        report_html.write(document, into)

    folder.finish(write)
    print("\n" + report.text(document))
    print(f"\n{request.out}: model and report.html after {time.perf_counter() - began:.0f} s, peak memory "
          f"{peak_bytes() / 2**30:.2f} GiB")
    return report.read(request.out)


class _Task(NamedTuple):
    """What was opened and checked before the work; dense: a row to reuse."""

    model: Model
    calibration: Calibration
    sources: list[suite.Source]
    encoded: list[suite.Encoded]
    protocol: dict[str, Any]
    dense: dict[str, Any] | None


def _prepared(request: Request) -> _Task:
    config = config_of(request.model)
    accounting.check_countable(config)
    check_experts(request.passes, config)
    check_recipe(request.passes, config)
    _check_scope(request)
    for flag, length in (("--calibration-length", request.calibration.length), ("--window", request.window)):
        rule = f"must be {SHINGLE} (the run of tokens that tells overlap) to {config.max_length} (positions of {request.model})"
        check(SHINGLE <= length <= config.max_length, flag, length, rule)
    directories = data_directories(request.data_dir)
    sources = suite.open_data(request.data, directories)
    model = load(request.model, dtype=request.dtype)
    if model.tokenizer is None:
        raise ConfigError(f"--model = {request.model!r}: has no tokenizer, so that no text can be put to it")
    encoded = _encode(model, sources, request)
    calibration = calibrate(request.calibration, model.tokenizer, directories)
    for source, piece in zip(sources, encoded, strict=True):
        if not request.allow_overlap:
            check_disjoint(calibration.shingles, suite.tokens_of(piece), source.name)
            check_overlap(model, suite.tokens_of(piece), source.name)
    protocol = _protocol(request, model, sources, encoded)
    dense = _reused(request.baseline, protocol) if request.baseline else None
    return _Task(model, calibration, sources, encoded, protocol, dense)


def _pieces_key(request: Request, task: _Task) -> str:
    """What the finished pieces of the passes depend on."""
    return key_of(**_given(request, task), recipe=request.recipe, text=request.recipe_text)


def _given(request: Request, task: _Task) -> dict[str, Any]:
    """What passes work with."""
    return dict(weights=task.protocol["weights"], tier=request.tier, calibration=task.calibration.sha256,
                skip_first=task.calibration.spec.skip_first, jax=jax.__version__)


def _shared_folders(request: Request, task: _Task) -> dict[int, Path]:
    """For each pass whose pieces serve every sparsity: named after the options of the passes up to it, but for that one."""
    if request.pieces is None:
        return {}
    found: dict[int, Path] = {}
    for number, one in enumerate(request.passes):
        if one.levels_share:
            passes = [*map(repr, request.passes[:number]), f"{type(one).__name__} {_options(one)}"]
            found[number] = request.pieces / key_of(**_given(request, task), passes=passes)
    return found


def _options(one: Pass) -> dict[str, str]:
    return {name: repr(value) for name, value in sorted(vars(one).items()) if name != "sparsity"}


def _named(request: Request, task: _Task, compressed: Model) -> Model:
    """The compressed model with its name and where it comes from."""
    made = compression(
        task.model, task.calibration, recipe=request.recipe, recipe_text=request.recipe_text, passes=request.passes,
        tier=request.tier, request=request.identity(),
    )  # fmt: skip
    return dataclasses.replace(compressed, name=request.label, source={**task.model.source, "compression": made})


def _measured(
    request: Request, task: _Task, compressed: Model, folder: WorkFolder
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows of the dense and of the compressed model; finished scores are kept in the folder."""
    scoring = key_of(protocol=task.protocol, batch=request.batch)

    def scored(model: Model, name: str) -> dict[str, Any]:
        ways = task.sources, task.encoded, request.scope, request.batch, name, progress_bar
        kind = "dense" if model is task.model else "compressed"
        return folder.kept(f"{kind}-{scoring}", lambda: measure.scored(model, *ways))

    dense = task.dense or {**_dense_row(task.model, scored(task.model, "dense")), **request.about}
    row = _compressed_row(request, task, compressed, scored(compressed, request.label), dense)
    if request.decode_tokens:
        prompt = suite.tokens_of(task.encoded[0])[0].tolist()
        models = {"dense": (task.model, "masked"), "compressed": (compressed, request.executor)}
        speed = measure.decoding(models, prompt, request.decode_tokens)
        dense, row = {**dense, "decode": speed["dense"]}, {**row, "decode": speed["compressed"]}
    return dense, row


def _is_number(text: str) -> bool:
    try:
        float(text or "0")
    except ValueError:
        return False
    return True


def peak_bytes() -> int:
    """The most memory that this process has held."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else 1024 * held


def _steps_bar(title: str, total: int) -> AbstractContextManager[Advance]:
    return progress_bar(title, total, unit="steps", doing="compressing")


def _check_scope(request: Request) -> None:
    """A method that reads a prompt is not scored as if it needed none."""
    needed = [one for one in request.passes if one.scope != "all"]
    if needed and request.scope.tokens == "all":
        raise ConfigError(f"--scope = 'all': {needed[0].name} chooses by a prompt; give --scope={needed[0].scope}, and the "
                          "same to every method that it is compared with")


def _encode(model: Model, sources: Sequence[suite.Source], request: Request) -> list[suite.Encoded]:
    encoded: list[suite.Encoded] = []
    for source in sources:
        task = not isinstance(source, suite.EvaluationText)
        limit = request.limit or (request.effort.windows and (QUICK_TASK_ROWS if task else request.effort.windows))
        encoded += suite.encode(model, [source], request.window, limit, request.scope)
    return encoded


def _protocol(
    request: Request, model: Model, sources: Sequence[suite.Source], encoded: Sequence[suite.Encoded]
) -> dict[str, Any]:
    """What two reports must share to stand in one table."""
    data = [suite.protocol(source, piece, request.scope) for source, piece in zip(sources, encoded, strict=True)]
    for one in data:
        del one["path"]  # where a file lies does not matter, what it holds does
    return {
        "model": request.model, "weights": fingerprint(model), "dtype": request.dtype,
        "scope": request.scope.tokens, "keep_first": request.scope.keep_first, "data": data,
    }  # fmt: skip


def _reused(baseline: str, protocol: dict[str, Any]) -> dict[str, Any]:
    found = report.read(Path(baseline))
    report.check_same_protocol(f"--baseline = {baseline!r}", found["protocol"], protocol)
    return found["rows"][0]


def _plan(request: Request, task: _Task) -> list[str]:
    """What will be done and about how long it takes, from one timed block."""
    config, calibration, spec = task.model.config, task.calibration, task.calibration.spec
    per_token = _block_seconds(task.model, calibration) / TIMED_TOKENS
    pieces = [tokens for piece in task.encoded for tokens in suite.tokens_of(piece)]
    counts = parameter_counts(config)
    with_head = 1 + config.vocab_size * config.d_model / (counts["attention"] + counts["feed"])
    stream = per_token * config.num_layers * calibration.tokens.size
    scoring = per_token * config.num_layers * with_head * sum(map(len, pieces)) * (1 if task.dense else 2)
    scope = f"scope {request.scope.tokens}, keep_first {request.scope.keep_first}"
    lines = [
        f"{request.model}: {config.num_layers} blocks, {counts['total']:,} parameters, {request.dtype}; tier {request.tier}",
        f"calibration: {spec.sequences} x {spec.length} tokens of {spec.source}, seed {spec.seed}, first {spec.skip_first} of "
        f"each left out, sha256 {calibration.sha256[:12]}; running it through all blocks once takes about {stream:.0f} s",
    ]
    for number, one in enumerate(request.passes):
        cost = one.cost(config, request.effort)
        lines.append(f"pass {number}: {one!r}" + (f"; {cost}" if cost else ""))
    lines.append(f"one block takes about {1000 * per_token * TIMED_TOKENS:.0f} ms for {TIMED_TOKENS} tokens")
    rows = f"{', '.join(request.data)}: {len(pieces)} windows and rows, {sum(map(len, pieces)):,} tokens"
    both = "compressed (dense reused)" if task.dense else "dense and compressed"
    lines.append(f"evaluation: {rows}, {scope}; {both} take about {scoring:.0f} s")
    return lines


def _block_seconds(model: Model, calibration: Calibration) -> float:
    """Seconds of one block for `TIMED_TOKENS` tokens, without compiling."""
    blocks = Blocks(model)
    rows = max(1, TIMED_TOKENS // calibration.spec.length)
    tokens = calibration.tokens[:rows, :TIMED_TOKENS]
    h = blocks.embed(jnp.asarray(tokens))
    run = functools.partial(blocks.run, len(blocks) // 2, h)
    jax.block_until_ready(run())
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, time.perf_counter() - start)
    return best * TIMED_TOKENS / tokens.size


def _dense_row(model: Model, found: dict[str, Any]) -> dict[str, Any]:
    total = accounting.bytes_per_token(model).total
    return {
        "method": "dense", "label": "dense", "requested": 0.0, "results": found["results"],
        "sparsity": measure.realised(model, found).describe(), "weight_zeros": accounting.weight_zeros(model),
        "bytes": {"per_token": total, "relative": 1.0, "extra": 0.0, "cache": cache_bytes(model.config)}, "ideal_speedup": 1.0,
    }  # fmt: skip


def _compressed_row(
    request: Request, task: _Task, compressed: Model, found: dict[str, Any], dense: dict[str, Any]
) -> dict[str, Any]:
    realised = measure.realised(compressed, found)
    before, after = accounting.bytes_per_token(task.model), accounting.bytes_per_token(compressed, realised)
    results = []
    for ours, theirs in zip(found["results"], dense["results"], strict=True):
        paired = suite.compared(measure.as_scored(ours), measure.as_scored(theirs))
        results.append({**ours, **{name: value for name, value in paired.items() if "_difference" in name}})
    options = [getattr(one, "sparsity", None) for one in request.passes]
    return {
        "method": request.method,
        "label": request.label,
        "requested": max((one for one in options if isinstance(one, float)), default=None),
        "results": results,
        "sparsity": realised.describe(),
        "weight_zeros": accounting.weight_zeros(compressed),
        "bytes": {
            "per_token": after.total, "relative": after.total / before.total, "extra": after.extra,
            "cache": cache_bytes(compressed.config),
        },
        "ideal_speedup": before.total / after.total,
        "tier": request.tier,
        "recipe": request.recipe,
        "passes": [repr(one) for one in request.passes],
        "calibration": task.calibration.describe(),
        "allow_overlap": request.allow_overlap,
        **request.about,
    }
