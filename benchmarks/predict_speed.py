"""Seconds to read, price and simulate a 7B decoder on 64, 512 and 4096 chips; by hand.

    python benchmarks/predict_speed.py [TARGET...]

Compiles what is not in the cache first, some minutes a target. The time should not depend on the
number of chips, nor on the trips of loops.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from jaxbench import cache
from jaxbench.compiler import compiled_key, unpack_compiled
from jaxbench.published import Case
from jaxbench.record import read_records
from jaxbench.run import Limits, describe, families_of, run
from jaxbench.target import parse_target

TARGETS = ("tpu-v5p:4x4x4", "tpu-v5p:8x8x8", "tpu-v5p:16x16x16")
CANDIDATE = "language-paper-llama2_7b"
REPEATS = 5
MEASURED = """
import resource, sys, time
from jaxbench.cost import price_module
from jaxbench.hlo import read_module
from jaxbench.predict import predict_step
from jaxbench.target import parse_target
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
hlo = open(sys.argv[1], "rb").read()
started = time.perf_counter()
module = read_module(hlo)
cost = price_module(module, mxu=128)
prediction = predict_step(cost, parse_target(sys.argv[2]), model_flops=1.0, dtype="bfloat16")
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops = sum(1 for _ in module.all_ops())
print(f"[{seconds}, {peak * 1024}, {ops}, {prediction.step_s}]")
"""


def compiled_hlo(target, folder):
    """Compiles the decoder, a sample a device, and returns the file of its HLO."""
    parsed = parse_target(target)
    case = Case(
        id=target, candidate=CANDIDATE, layout="fsdp", target=target, batch=parsed.num_devices,
        step_s=1.0, half="check", group="plain", source="", differs="",
    )  # fmt: skip
    described = {one["name"]: one for one in describe(families_of([CANDIDATE]), Limits())}
    request = case.request(described)
    run([request], folder, Limits(), lambda *_: None)
    record = next(record for record in read_records(folder) if record.id == request.id)
    packed = cache.read_entry("compiled", compiled_key(record.program_sha256 or "", parsed))
    path = folder / f"{record.id}.hlo"
    path.write_bytes(unpack_compiled(packed or b"").hlo)
    return path


def main():
    folder = Path("out/predict_speed")
    for target in sys.argv[1:] or TARGETS:
        path = compiled_hlo(target, folder)
        rows = []
        for _ in range(REPEATS):
            command = [sys.executable, "-c", MEASURED, str(path), target]
            rows.append(json.loads(subprocess.check_output(command)))
            time.sleep(0.1)
        seconds, peak, ops, step_s = (statistics.median(row[i] for row in rows) for i in range(4))
        print(
            f"{target}: {seconds:.2f} s, {peak / 1e6:.0f} MB, {ops:.0f} instructions, "
            f"step {step_s:.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
