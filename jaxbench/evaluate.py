"""One candidate on one target, from source to prediction: the line of values, in a worker.

Returns plain data for a record. Each stage that fails ends the line with a `Failure`; what the
stages before it gave is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

import psutil

from jaxbench import cache
from jaxbench.compiler import (
    Compiled,
    DoesNotFitError,
    check_fit,
    compile_program,
    compiled_key,
    devices_of,
    make_mesh,
    platform_of,
    unpack_compiled,
    use_attached,
    versions_for,
)
from jaxbench.errors import Failure, MeasureError
from jaxbench.executable import (
    compile_init,
    has_executables,
    keep_executables,
    load_executables,
)
from jaxbench.layout import parse_layout
from jaxbench.target import Target, chip_table, parse_target
from jaxbench.worker import failure_of

# What these files hold decides which program a request becomes.
_PROGRAM_FILES = (
    "candidate.py",
    "layout.py",
    "program.py",
    "mathematics.py",
    "compiler.py",
    "chips.toml",
)


def evaluate(
    *,
    described: Mapping[str, Any],
    layout: str,
    target: str,
    options: tuple[tuple[str, Any], ...] = (),
    attached: bool = False,
    cpu_peaks: Mapping[str, float] | None = None,
    keep: bool = False,
    calibration: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluates one request and returns the stage values of its record.

    Args:
      described: From `discovery.describe_candidates`.
      layout: Resolved layout.
      target: Target name.
      options: Compiler options of the target.
      attached: Whether the target is the accelerator of this machine.
      cpu_peaks: From `measure_peaks`, needed on CPU targets.
      keep: Also keep the executables in the cache, for `open_stepper`.
      calibration: Of this machine, to be applied to the prediction, as JSON values.
    """
    asked = dataclasses.replace(parse_target(target), options=options, attached=attached)
    line = _Line(described, layout, asked, cpu_peaks)
    return line.run(lambda: line.price(keep=keep, calibration=calibration))


def open_stepper(
    *,
    described: Mapping[str, Any],
    layout: str,
    target: str,
    options: tuple[tuple[str, Any], ...] = (),
    attached: bool = False,
    seed: int = 0,
) -> Any:
    """Returns a `Stepper` of one request, from executables that `evaluate` kept or makes now.

    Raises:
      MeasureError: with the stage that failed.
    """
    asked = dataclasses.replace(parse_target(target), options=options, attached=attached)
    line = _Line(described, layout, asked, None)
    try:
        return line.open_stepper(seed)
    except _StageError as error:
        raise MeasureError(f"{error.failure.stage}: {error.failure.text}") from error


class _StageError(Exception):
    def __init__(self, failure: Failure):
        super().__init__(failure.text)
        self.failure = failure


class _Stage:
    """Names the stage of whatever goes wrong inside, and times it."""

    def __init__(self, name: str, timings: dict[str, float]):
        self.name, self.timings = name, timings

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        name = f"{self.name}_s"
        self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - self.started
        if isinstance(error, DoesNotFitError):
            raise _StageError(error.to_failure()) from error
        if isinstance(error, Exception) and not isinstance(error, _StageError):
            raise _StageError(failure_of(error, stage=self.name)) from error


class _Line:
    """The values of one request as they come into being."""

    def __init__(self, described: Mapping[str, Any], layout: str, target: Target, cpu_peaks: Any):
        self.described, self.layout, self.target, self.cpu_peaks = (
            described,
            layout,
            target,
            cpu_peaks,
        )
        self.values: dict[str, Any] = {"timings": {}}
        self.timings: dict[str, float] = self.values["timings"]
        self.started = time.perf_counter()
        self.compiled: Compiled | None = None
        if target.attached:
            use_attached(target.kind)
        self._executables: list[Any] | None = None

    def run(self, stages: Callable[[], None]) -> dict[str, Any]:
        """Goes through the stages until one fails, and returns the values there are."""
        try:
            stages()
        except _StageError as error:
            self.values["failure"] = error.failure.to_json()
        self.timings["worker_s"] = time.perf_counter() - self.started
        return self.values

    def _compile_once(self) -> None:
        """Finds the compiled program in the cache, or traces, lowers and compiles it."""
        program_key = self._program_key()
        if not self._recall(program_key):
            with cache.locked("programs", program_key):
                if not self._recall(program_key):
                    self._make(program_key)

    def _compile_to_run(self) -> None:
        """Makes executables for the attached device and keeps them, unless they are kept."""
        program_key = self._program_key()
        with cache.locked("programs", program_key):
            if self._recall(program_key) and has_executables(self._executables_key()):
                return
            self._executables = self._make_executables(program_key)
            with _Stage("store", self.timings):
                keep_executables(self._executables_key(), *self._executables)

    def _make_executables(self, program_key: str) -> list[Any]:
        program = self._build(program_key)
        step = self._compile(program)
        with _Stage("compile", self.timings):
            return [step, compile_init(program.init, self.target, step.input_shardings[0])]

    def _executables_key(self) -> str:
        return cache.key_of(
            compiled_key(self.values["program_sha256"], self.target),
            _code_digest(),
            versions_for(self.target)["python"],
        )

    def _program_key(self) -> str:
        asked = [
            self.described[key] for key in ("module", "name", "config", "workload", "source_sha256")
        ]
        return cache.key_of(
            asked, self.layout, self.target.name, versions_for(self.target), _code_digest()
        )

    def _recall(self, program_key: str) -> bool:
        with _Stage("recall", self.timings):
            known = cache.read_entry("programs", program_key)
            if known is None:
                return False
            program = json.loads(known)
            packed = cache.read_entry(
                "compiled", compiled_key(program["program_sha256"], self.target)
            )
            if packed is None:
                return False
            self.values.update(program)
            self.compiled = unpack_compiled(packed)
            return True

    def _make(self, program_key: str) -> None:
        """Traces and lowers; compiles unless the same program has been compiled for the target."""
        program = self._build(program_key)
        with _Stage("recall", self.timings):
            packed = cache.read_entry("compiled", compiled_key(program.sha256, self.target))
        if packed is None:
            self._compile(program)
        else:
            self.compiled = unpack_compiled(packed)

    def _compile(self, program: Any) -> Any:
        """Runs the compiler, keeps what it made, and returns the executable."""
        with _Stage("compile", self.timings):
            compiled, executable = compile_program(program.lowered, program.sha256, self.target)
        self.compiled = compiled
        with _Stage("store", self.timings):
            key = compiled_key(program.sha256, self.target)
            cache.write_entry("compiled", key, compiled.pack())
        return executable

    def _build(self, program_key: str) -> Any:
        with _Stage("load", self.timings):
            from jaxbench.discovery import load_described
            from jaxbench.program import build_program

            candidate = load_described(self.described)
        with _Stage("program", self.timings):
            layout = parse_layout(self.layout)
            program = build_program(
                candidate, layout, make_mesh(self.target, layout), platform_of(self.target)
            )
        self.timings["trace_s"], self.timings["lower_s"] = program.trace_s, program.lower_s
        known = {
            "program_sha256": program.sha256,
            "num_params": program.num_params,
            "mathematics": dataclasses.asdict(program.mathematics),
        }
        self.values.update(known)
        with _Stage("store", self.timings):
            cache.write_entry("programs", program_key, json.dumps(known).encode())
        return program

    def _describe_compiled(self) -> None:
        assert self.compiled is not None
        memory = self.compiled.memory
        self.values["hlo_sha256"] = self.compiled.hlo_sha256
        self.values["compiled"] = {
            "compile_s": self.compiled.compile_s,
            "hlo_bytes": len(self.compiled.hlo),
            "memory": {**dataclasses.asdict(memory), "peak_bytes": memory.peak_bytes},
            "extra_options": dict(self.compiled.extra_options),
        }
        with _Stage("fit", self.timings):
            check_fit(self.compiled, self.target)

    def price(self, *, keep: bool, calibration: Mapping[str, Any] | None = None) -> None:
        """Compiles, reads and prices the optimised HLO and predicts the step."""
        if keep:
            self._compile_to_run()
        else:
            self._compile_once()
        self._describe_compiled()
        self._price(calibration)

    def _price(self, calibration: Mapping[str, Any] | None) -> None:
        assert self.compiled is not None
        with _Stage("price", self.timings):
            from jaxbench.cost import price_module
            from jaxbench.hlo import read_module
            from jaxbench.predict import predict_step

            module = read_module(self.compiled.hlo)
            cost = price_module(module, mxu=chip_table()[self.target.chip].mxu)
            model = self.values.pop("mathematics")
            model_flops = (
                sum(flops for _, flops in model["flops_by_dtype"]) / self.target.num_devices
            )
            self.values["cost"] = {
                "model_flops": model_flops,
                "model_io_bytes": model["io_bytes"] / self.target.num_devices,
                **_cost_values(cost),
            }
            prediction = predict_step(
                cost,
                self.target,
                model_flops=model_flops,
                dtype=self.described["workload"]["dtype"],
                cpu_peaks=self.cpu_peaks,
            )
            if calibration is not None:
                prediction = self._calibrated(prediction, cost, module, calibration)
            self._describe_prediction(prediction, cost)

    def _calibrated(
        self, prediction: Any, cost: Any, module: Any, calibration: Mapping[str, Any]
    ) -> Any:
        from jaxbench.ops import list_ops
        from jaxbench.ops.calibration import Calibration, calibrate_prediction
        from jaxbench.predict import predict_ops

        rows = list_ops(predict_ops(cost, self.target, cpu_peaks=self.cpu_peaks), module)
        return calibrate_prediction(prediction, rows, Calibration.from_json(calibration))

    def _describe_prediction(self, prediction: Any, cost: Any) -> None:
        values = {**dataclasses.asdict(prediction), "terms": dict(prediction.terms)}
        compiler_s = values.pop("compiler_s")
        if self.cpu_peaks and self.target.kind == "cpu":
            values["cpu_peaks"] = dict(self.cpu_peaks)
        self.values["prediction"] = values
        if compiler_s is not None:
            self.values["compiler"] = {"cycles": cost.cycles, "step_s": compiler_s}
        self._set_samples_per_s(prediction.step_s, "prediction")

    def _set_samples_per_s(self, step_s: float, origin: str) -> None:
        if step_s > 0:
            self.values["samples_per_s"] = self.described["workload"]["global_batch"] / step_s
            self.values["samples_per_s_from"] = origin

    def _check_host_memory(self) -> None:
        assert self.compiled is not None
        needed, free = self.compiled.memory.peak_bytes, psutil.virtual_memory().available
        if self.target.kind == "cpu" and needed > free:
            raise DoesNotFitError(needed, free)

    def open_stepper(self, seed: int) -> Any:
        """Makes state and batch on the attached device, for a step compiled there."""
        from jaxbench.measure.stepper import Stepper

        self._compile_to_run()
        with _Stage("fit", self.timings):
            self._check_host_memory()
        with _Stage("load", self.timings):
            executables = self._executables or load_executables(
                self._executables_key(), devices_of(self.target)
            )
        if executables is None:
            raise _StageError(
                Failure(stage="load", error="CacheError", text="Executables are gone. Run again.")
            )
        with _Stage("measure", self.timings):
            assert self.compiled is not None
            peak_bytes = self.compiled.memory.peak_bytes
            return Stepper(*executables, seed=seed, peak_bytes=peak_bytes)


def _cost_values(cost: Any) -> dict[str, Any]:
    kinds: dict[str, int] = {}
    for (kind, _), size in cost.collective_bytes:
        kinds[kind] = kinds.get(kind, 0) + size
    return {
        "hlo_flops": cost.hlo_flops,
        "matmul_flops": cost.matmul_flops,
        "padded_flops": cost.padded_flops,
        "flops_by_dtype": dict(cost.flops_by_dtype),
        "hbm_bytes": cost.hbm_bytes,
        "collective_bytes": sum(kinds.values()),
        "collective_bytes_by_kind": kinds,
        "num_ops": sum(op.count for op in cost.ops),
        "unpriced": dict(cost.unpriced),
        "unpriced_share": cost.unpriced_share,
    }


@functools.cache
def _code_digest() -> str:
    files = resources.files("jaxbench")
    texts = [files.joinpath(name).read_bytes() for name in _PROGRAM_FILES]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()
