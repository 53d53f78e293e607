"""Programs: size, identity, the mathematics in them, and layouts that they do not fit."""

import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxbench.candidate import Candidate
from jaxbench.discovery import load_candidate
from jaxbench.errors import LayoutError
from jaxbench.layout import Layout
from jaxbench.mathematics import Mathematics, count_mathematics
from jaxbench.program import Program, build_program

MODELS = pathlib.Path(__file__).parent.parent / "models"
LAYERS, WIDTH, ROWS = 12, 64, 32
# LLVM unoptimised: most of the time would go into code that runs once.
QUICK = {"xla_backend_optimization_level": 0}
BASES = ("bev-cpu-segsum", "convnet-cpu-mbconv", "decoder-cpu-head64")

# A network of 70 billion parameters: 140 GB in bfloat16, 850 GB with its moments in float32.
LLAMA_70B = """
import dataclasses, resource
from jaxbench.compiler import apply_environment
apply_environment()
import jax
from jax.sharding import AbstractMesh, AxisType
from jaxbench.candidate import Input
from jaxbench.layout import Layout
from jaxbench.models.decoder import CANDIDATES, DecoderConfig
from jaxbench.program import build_program
config = DecoderConfig(num_layers=80, embed_dim=8192, mlp_dim=28672, num_heads=64,
                       num_kv_heads=8, head_dim=128, vocab_size=128256)
base = CANDIDATES[0]
tokens = Input(shape=(8193,), dtype="int32", high=128256)
work = dataclasses.replace(base.workload, global_batch=64, inputs=(("tokens", tokens),))
candidate = dataclasses.replace(base, config=config, workload=work)
mesh = AbstractMesh((64,), ("fsdp",), axis_types=(AxisType.Auto,))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
program = build_program(candidate, Layout(axes=(("fsdp", 64),)), mesh, "tpu")
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(program.num_params, (after - before) * 1024)
"""

DIGESTS = """
import json, sys
from jaxbench.compiler import apply_environment
apply_environment()
from jax.sharding import AbstractMesh, AxisType
from jaxbench.discovery import load_candidate
from jaxbench.layout import Layout
from jaxbench.program import build_program
mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,))
for source, name in json.loads(sys.argv[1]):
    candidate = load_candidate(source, name)
    print(build_program(candidate, Layout(axes=(("data", 1),)), mesh, "tpu").sha256)
"""


def run_python(code: str, *arguments: str, hash_seed: str = "0") -> list[str]:
    """Lines of what the code prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def abstract_mesh(**axes: int) -> AbstractMesh:
    kinds = (AxisType.Auto,) * len(axes)
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


def decoder(*, kind: str = "train", global_batch: int = 4, **fields: Any) -> Candidate:
    """The small decoder with two layers and changes."""
    base = load_candidate("jaxbench.models.decoder", "decoder-cpu-head64")
    return dataclasses.replace(
        base,
        config=dataclasses.replace(base.config, **{"num_layers": 2, **fields}),
        workload=dataclasses.replace(base.workload, kind=kind, global_batch=global_batch),
    )


def build_on(candidate: Candidate, **axes: int) -> Program:
    return build_program(candidate, Layout(axes=tuple(axes.items())), abstract_mesh(**axes), "tpu")


def count(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Mathematics:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    trace = lambda: jax.jit(lambda *given: function(*given)).trace(*arguments)  # noqa: E731
    return count_mathematics(trace, trace().jaxpr)


# --- Size and identity ---


def test_program_of_70_billion_parameters_lowers_without_allocation() -> None:
    num_params, risen_bytes = map(int, run_python(LLAMA_70B)[-1].split())
    attention = 8192 * 128 * (64 + 8 + 8 + 64)
    norms = 80 * 2 * 8192 + 8192
    assert num_params == 80 * (attention + 3 * 8192 * 28672) + 128256 * 8192 + norms
    # 2 GB is what tracing and the StableHLO text may take; one layer's parameters are 3.4 GB.
    assert risen_bytes < 2e9


def test_digest_stays_under_another_hash_seed_and_in_a_moved_file(tmp_path: pathlib.Path) -> None:
    shipped, moved = [], []
    for name in BASES:
        family = name.split("-")[0]
        module = f"jaxbench.models.{family}"
        text = (MODELS / f"{family}.py").read_text()
        path = tmp_path / f"moved_{family}.py"
        path.write_text("# One line more.\n# And another.\n" + text)
        shipped.append((module, name))
        moved.append((str(path), name))
    first = run_python(DIGESTS, json.dumps(shipped), hash_seed="1")
    second = run_python(DIGESTS, json.dumps(moved), hash_seed="2")
    assert len(set(first)) == len(BASES)
    assert first == second


def test_digest_follows_layout_and_workload() -> None:
    programs = [
        build_on(decoder(), data=1),
        build_on(decoder(), data=4),
        build_on(decoder(), fsdp=4),
        build_on(decoder(global_batch=8), data=4),
        build_on(decoder(kind="forward"), data=4),
    ]
    assert len({program.sha256 for program in programs}) == len(programs)


def test_program_on_real_devices_is_the_program_on_an_abstract_mesh() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",), axis_types=(AxisType.Auto,))
    real = build_program(decoder(), Layout(axes=(("fsdp", 4),)), mesh, "tpu")
    assert real.sha256 == build_on(decoder(), fsdp=4).sha256


# --- Mathematics: known answers ---


def test_mathematics_of_a_matmul_is_2mnk() -> None:
    counted = count(jnp.matmul, (4096, 4096), (4096, 4096))
    assert counted.flops_by_dtype == (("bfloat16", 2 * 4096**3),)
    assert counted.io_bytes == 3 * 4096**2 * 2


def scanned(weights: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0]


def unrolled(weights: jax.Array, x: jax.Array) -> jax.Array:
    for layer in range(LAYERS):
        x = jnp.tanh(x @ weights[layer])
    return x


def squares(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    return jax.grad(lambda w, x: jnp.sum(function(w, x) ** 2), argnums=(0, 1))


def test_mathematics_of_a_scan_equals_its_layers_written_out() -> None:
    shapes = ((LAYERS, WIDTH, WIDTH), (ROWS, WIDTH))
    forward = LAYERS * 2 * ROWS * WIDTH**2
    assert count(scanned, *shapes).flops == count(unrolled, *shapes).flops == forward
    assert count(squares(scanned), *shapes) == count(squares(unrolled), *shapes)
    assert count(squares(scanned), *shapes).flops == 3 * forward


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_mathematics_of_the_decoder_does_not_count_rematerialisation(layers: str) -> None:
    kept = build_on(decoder(layers=layers, remat="none"), data=1)
    again = build_on(decoder(layers=layers, remat="full"), data=1)
    assert kept.mathematics == again.mathematics
    assert kept.sha256 != again.sha256


def brute_force_flops(
    *, edge: int, taps: int, stride: int, num_in: int, num_out: int, groups: int, batch: int
) -> int:
    """Multiplications and additions of a SAME convolution, tap by tap; padding is no input."""
    outputs = -(-edge // stride)
    low = max((outputs - 1) * stride + taps - edge, 0) // 2
    rows = sum(
        0 <= out * stride + tap - low < edge
        for out, tap in itertools.product(range(outputs), range(taps))
    )
    return 2 * rows**2 * batch * num_out * (num_in // groups)


@pytest.mark.parametrize(
    "given",
    [
        {"edge": 12, "taps": 3, "stride": 1, "num_in": 8, "num_out": 16, "groups": 1},
        {"edge": 13, "taps": 3, "stride": 2, "num_in": 8, "num_out": 16, "groups": 1},
        {"edge": 12, "taps": 5, "stride": 2, "num_in": 8, "num_out": 16, "groups": 1},
        {"edge": 12, "taps": 3, "stride": 1, "num_in": 16, "num_out": 16, "groups": 16},
        {"edge": 13, "taps": 5, "stride": 2, "num_in": 16, "num_out": 16, "groups": 16},
        {"edge": 12, "taps": 3, "stride": 1, "num_in": 16, "num_out": 32, "groups": 4},
    ],
    ids=["plain", "strided", "strided-even", "depthwise", "depthwise-strided", "grouped"],
)
def test_mathematics_of_a_convolution_equals_a_brute_force_count(given: dict[str, int]) -> None:
    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (given["stride"],) * 2,
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=given["groups"],
        )

    def gradients(x: jax.Array, kernel: jax.Array) -> Any:
        return jax.grad(lambda *both: jnp.sum(convolve(*both) ** 2), argnums=(0, 1))(x, kernel)

    images = (4, given["edge"], given["edge"], given["num_in"])
    kernel = (given["taps"],) * 2 + (given["num_in"] // given["groups"], given["num_out"])
    flops = brute_force_flops(**given, batch=4)
    assert count(convolve, images, kernel).flops == flops
    # Each pair of an output and a tap gives one product to each of the two gradients as well.
    assert count(gradients, images, kernel).flops == 3 * flops


def test_mathematics_of_the_decoder_is_six_flops_a_parameter_and_token_and_attention() -> None:
    candidate = decoder()
    program = build_on(candidate, data=1)
    config, batch = candidate.config, candidate.workload.global_batch
    num_layers, heads, width = config.num_layers, config.num_heads, config.head_dim
    tokens = dict(candidate.workload.inputs)["tokens"].shape[0] - 1
    num_norm_params = (2 * num_layers + 1) * config.embed_dim
    # The table is a parameter of one product, the unembedding; looking tokens up is none. Attention
    # is computed in full and masked: 2 products, 2 T^2 N H each, three times with the gradients.
    products = 6 * (program.num_params - num_norm_params) * tokens * batch
    attention = 12 * num_layers * heads * width * tokens**2 * batch
    assert program.mathematics.flops_by_dtype == (("bfloat16", products + attention),)


# --- The kind of work ---


def test_forward_is_a_third_of_the_training_step_in_flops() -> None:
    forward, train = build_on(decoder(kind="forward"), data=1), build_on(decoder(), data=1)
    assert 3 * forward.mathematics.flops == train.mathematics.flops
    assert forward.num_params == train.num_params
    assert forward.mathematics.io_bytes < train.mathematics.io_bytes / 3


def test_forward_step_runs_and_gives_the_loss_of_the_training_step() -> None:
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    small = {"num_layers": 1, "embed_dim": 64, "mlp_dim": 64, "vocab_size": 1024}
    losses = {}
    for kind in ("forward", "train"):
        candidate = decoder(kind=kind, global_batch=2, **small)
        program = build_program(candidate, Layout(axes=(("data", 1),)), mesh, "cpu")
        executable = program.lowered.compile(compiler_options=QUICK)
        state, batch = jax.jit(program.init, compiler_options=QUICK)(jax.random.key(0))
        out = executable(state, batch)
        losses[kind] = float(out if kind == "forward" else out[1])
    # Random tokens and parameters: near log(1024) = 6.9. The two are compiled differently, and
    # logits are rounded to bfloat16 (2^-9), which a mean over 128 tokens averages.
    assert losses["forward"] == pytest.approx(losses["train"], rel=1e-3)
    assert 6.5 < losses["forward"] < 9


# --- Layouts that do not fit ---


@pytest.mark.parametrize(("batch", "axes", "ways"), [(4, {"data": 8}, 8), (6, {"fsdp": 4}, 4)])
def test_batch_that_does_not_divide_raises(batch: int, axes: dict[str, int], ways: int) -> None:
    with pytest.raises(LayoutError, match=f"global_batch={batch} .* {ways} devices") as caught:
        build_on(decoder(global_batch=batch), **axes)
    assert "\n" not in str(caught.value)


def test_batch_divides_over_data_times_fsdp() -> None:
    with pytest.raises(LayoutError, match="global_batch=6 .* 4 devices"):
        build_on(decoder(global_batch=6), data=2, fsdp=2)
    assert build_on(decoder(global_batch=6), data=2, fsdp=1, tensor=4).num_params > 0


@pytest.mark.parametrize(
    ("fields", "axes", "said"),
    [
        ({}, {"fsdp": 3}, "has 128 along its axis 'embed', which fsdp=3"),
        ({"mlp_dim": 1022}, {"tensor": 4}, "has 1022 along its axis 'mlp', which tensor=4"),
        ({}, {"tensor": 8}, "has 4 along its axis 'kv_heads', which tensor=8"),
    ],
)
def test_parameter_that_does_not_divide_raises(
    fields: dict[str, int], axes: dict[str, int], said: str
) -> None:
    with pytest.raises(LayoutError, match=said) as caught:
        build_on(decoder(global_batch=3, **fields), **axes)
    assert "\n" not in str(caught.value)
    assert "Use fewer devices" in str(caught.value)
