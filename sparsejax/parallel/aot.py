"""Ahead-of-time compilation: what a step costs, before any data is read and without the device when it is not there."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
from jax.stages import Compiled


class Compilation(NamedTuple):
    """A compiled function with what compiling it took and told.

    Fields:
      compiled: call it with arrays of the shapes, dtypes and shardings it was compiled for.
      trace_seconds, lower_seconds, compile_seconds: Python tracing, lowering to StableHLO, the XLA compiler.
      memory: bytes per device: `arguments`, `output`, `temporary`, `aliased` (outputs that reuse donated arguments), `code`,
        and `peak` where the backend tells; empty where it tells nothing.
      flops: per device and call as XLA counts them, None where the backend tells nothing. The body of a loop (a scan over
        layers) is counted once by most backends, so that it is a check, not the numerator of an MFU.
    """

    compiled: Compiled
    trace_seconds: float
    lower_seconds: float
    compile_seconds: float
    memory: dict[str, int]
    flops: float | None


def lower_and_compile(fn: Any, *avals: Any, **static: Any) -> Compilation:
    """Trace, lower and compile a function for the devices that its arguments' shardings name.

    Args:
      fn: a function, or the result of `jax.jit` with its donation, shardings and static names.
      avals: ShapeDtypeStructs (with shardings, on a mesh of absent devices if need be) or arrays.
      static: static arguments of `fn` by name.
    """
    jitted = fn if hasattr(fn, "trace") else jax.jit(fn)
    times = [time.perf_counter()]
    traced = jitted.trace(*avals, **static)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    trace, lower, compile_ = (after - before for before, after in zip(times, times[1:], strict=False))
    return Compilation(compiled, trace, lower, compile_, memory_of(compiled), flops_of(compiled))


_MEMORY = {
    "arguments": "argument_size_in_bytes",
    "output": "output_size_in_bytes",
    "temporary": "temp_size_in_bytes",
    "aliased": "alias_size_in_bytes",
    "code": "generated_code_size_in_bytes",
    "peak": "peak_memory_in_bytes",
}


def memory_of(compiled: Compiled) -> dict[str, int]:
    """Bytes per device by use, see `Compilation`."""
    stats = compiled.memory_analysis()
    found = {name: getattr(stats, field, None) for name, field in _MEMORY.items()}
    return {name: int(value) for name, value in found.items() if value is not None}


def flops_of(compiled: Compiled) -> float | None:
    """Floating-point operations per device and call as the compiler counts them, or None."""
    costs = compiled.cost_analysis()
    value = (costs or {}).get("flops")
    return None if value is None or value < 0 else float(value)
