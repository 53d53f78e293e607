"""What every shipped candidate keeps; a new family file is found and held to it as it is."""

import collections
import dataclasses
import functools
import importlib
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import jax
import numpy as np
import pytest
from flax import nnx
from jax.extend import core
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxbench import mathematics, program
from jaxbench.candidate import Candidate, Kind
from jaxbench.discovery import describe_candidates, family_modules, load_candidate
from jaxbench.layout import RULES, Layout
from jaxbench.models import blocks
from jaxbench.program import Program, build_program

NUM_DEVICES = 8
# Every small candidate learns its one random batch: after so many steps its loss is at most this
# part of the first.
NUM_STEPS, LEARNT = 20, 0.8
# LLVM unoptimised: most of the time would go into code that runs a few times.
QUICK = {"xla_backend_optimization_level": 0}
DATA = Layout(axes=(("data", NUM_DEVICES),))
FSDP = Layout(axes=(("fsdp", NUM_DEVICES),))
ONE = Layout(axes=(("data", 1),))
SPLIT = [logical for logical, axes in RULES if "fsdp" in axes and logical != "batch"]

DESCRIBED = {given["name"]: given for given in describe_candidates(family_modules())}
NAMES = list(DESCRIBED)
CPU_NAMES = [name for name in NAMES if DESCRIBED[name]["size"] == "cpu"]
BASES = [name for name in NAMES if DESCRIBED[name]["base"] == name]
FAMILIES = sorted({DESCRIBED[name]["family"] for name in NAMES})
LOWERINGS = [
    (name, layout, platform)
    for name in NAMES
    for layout in ("data", "fsdp")
    for platform in ("tpu", "cuda")
    # A second layout and a second platform are the file's matter, not that of a size or a variant.
    if (layout, platform) == ("data", "tpu")
    or (
        name in BASES
        and DESCRIBED[name]["size"] == "cpu"
        and (layout, platform) == ("fsdp", "cuda")
    )
]
# A family's large bases differ in values of one config class: the first stands for the others.
LARGE = {
    DESCRIBED[name]["family"]: name
    for name in reversed(BASES)
    if DESCRIBED[name]["size"] in ("paper", "fleet")
}
# A whole step over 8 devices compiles for half a minute and more: one base of each kind is held to
# it each time, with products, convolutions, experts and scattered sums.
SHARDED = ("decoder-cpu-head64", "convnet-cpu-mbconv", "moe-cpu-mixtral", "bev-cpu-segsum")
STEPPED = [name for name in BASES if DESCRIBED[name]["size"] == "cpu" or name in LARGE.values()]


def each(
    arguments: str,
    cases: Sequence[Any],
    *,
    held: Literal["all", "small", "bases"] | tuple[str, ...],
) -> pytest.MarkDecorator:
    """Parametrises over cases that begin with a candidate; rivals stay in one process.

    Args:
      held: Which are always held to the test: all; all but large variants, whose fields small ones
        change too; bases alone, one large one a family, where a step must be traced or compiled;
        or those that are named. The others are where `-m every` asks for it.
    """
    marked = []
    for case in cases:
        row = case if isinstance(case, tuple) else (case,)
        marks = [pytest.mark.xdist_group(DESCRIBED[row[0]]["base"])]
        small = row[0] in BASES or DESCRIBED[row[0]]["size"] == "cpu"
        by_kind = {"all": True, "small": small, "bases": row[0] in STEPPED}
        if not (by_kind[held] if isinstance(held, str) else row[0] in held):
            marks.append(pytest.mark.every)
        marked.append(pytest.param(*row, marks=marks))
    return pytest.mark.parametrize(arguments.split(), marked)


@dataclass(frozen=True, slots=True)
class Built:
    """A program and the jaxpr that it was lowered from."""

    program: Program
    jaxpr: Any


def load(name: str) -> Candidate:
    """The candidate with a batch that divides over the devices."""
    candidate = load_candidate(DESCRIBED[name]["module"], name)
    batch = candidate.workload.global_batch
    workload = dataclasses.replace(
        candidate.workload, global_batch=NUM_DEVICES if batch % NUM_DEVICES else batch
    )
    return dataclasses.replace(candidate, workload=workload)


def abstract_mesh(layout: Layout) -> AbstractMesh:
    names, sizes = zip(*layout.axes, strict=True)
    return AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))


def real_mesh(layout: Layout) -> Mesh:
    names, sizes = zip(*layout.axes, strict=True)
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


@functools.cache
def build(name: str, layout: Layout, platform: str) -> Built:
    """Traces and lowers for absent devices, once for all tests, and keeps the jaxpr."""
    counted: list[Any] = []

    def count(trace: Any, jaxpr: Any) -> Any:
        counted.append(jaxpr)
        return mathematics.count_mathematics(trace, jaxpr)

    with mock.patch.object(program, "count_mathematics", count):
        built = build_program(load(name), layout, abstract_mesh(layout), platform)
    return Built(built, counted[0])


@functools.cache
def digest(name: str, kind: Kind, changes: tuple[tuple[str, Any], ...] = ()) -> str:
    """The program's identity on one device, with config fields changed."""
    candidate = load(name)
    changed = dataclasses.replace(
        candidate,
        config=dataclasses.replace(candidate.config, **dict(changes)),
        workload=dataclasses.replace(candidate.workload, kind=kind),
    )
    return build_program(changed, ONE, abstract_mesh(ONE), "cpu").sha256


_group: list[str] = []


@pytest.fixture(autouse=True)
def forget_other_bases(request: pytest.FixtureRequest) -> None:
    """Lets go of programs that only another base's tests share.

    All in one process they take gigabytes, and so many mappings of executable code that Linux
    (65,530 a process) refuses more and XLA crashes.
    """
    group = request.node.get_closest_marker("xdist_group").args
    if _group != list(group):
        _group[:] = group
        for cached in (build, digest, start, train):
            cached.cache_clear()


# --- What a candidate says of itself ---


def test_names_over_all_families_are_unique() -> None:
    names = [given["name"] for given in describe_candidates(family_modules())]
    assert len(names) == len(set(names))


@each("name", NAMES, held="all")
def test_name_is_family_size_change(name: str) -> None:
    candidate = load(name)
    assert re.fullmatch(rf"{candidate.family}-{candidate.size}(-[a-z0-9_]+)+", name)
    assert DESCRIBED[name]["module"] == f"jaxbench.models.{candidate.family}"
    assert candidate.size in {"cpu", "drive", "paper", "fleet"}


@each("name", NAMES, held="all")
def test_base_exists_and_is_its_own_base(name: str) -> None:
    candidate = load(name)
    assert candidate.base in NAMES
    base = load(candidate.base)
    assert base.base == base.name
    assert (base.family, base.size) == (candidate.family, candidate.size)
    is_base = candidate.name == candidate.base
    assert (candidate.validity == "base") == is_base
    assert (candidate.replaces == "") == is_base
    assert candidate.source


@each("name", NAMES, held="all")
def test_rivals_do_the_same_work(name: str) -> None:
    assert load(name).workload == load(load(name).base).workload


def _changed(name: str) -> set[str]:
    """Config fields in which a variant differs from its base."""
    config, base = DESCRIBED[name]["config"], DESCRIBED[DESCRIBED[name]["base"]]["config"]
    return {field for field in config if config[field] != base[field]}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_large_variants_change_is_also_changed_at_cpu_size(family: str) -> None:
    changed = collections.defaultdict(set)
    for name in NAMES:
        if DESCRIBED[name]["family"] == family:
            changed[DESCRIBED[name]["size"]] |= _changed(name)
    assert "cpu" in changed
    assert "paper" in changed
    assert changed["paper"] | changed["fleet"] <= changed["cpu"]


# --- What it is before any device is known ---


@each("name", NAMES, held="small")
def test_parameters_carry_logical_axes_that_layouts_know(name: str) -> None:
    candidate = load(name)
    with nnx.use_eager_sharding(False):
        module = nnx.eval_shape(lambda: candidate.build(candidate.config, nnx.Rngs(params=0)))
    known = {logical for logical, _ in RULES} - {"batch"}
    parameters = nnx.to_flat_state(nnx.state(module, nnx.Param))
    assert parameters
    for path, parameter in parameters:
        axes = parameter.get_metadata().get("out_sharding")
        if axes is None:
            # Flax's own initialisers name no axes: a bias of a few numbers is replicated.
            assert len(parameter.shape) < 2, path
            continue
        assert len(axes) == len(parameter.shape), path
        assert set(axes) - {None} <= known, path
        # What FSDP splits divides over its devices: 8 here, 32 on a slice of a pod. EfficientNet's
        # published widths, such as 24 and 40, divide by no more than 8; those that drive, by 2.
        ways = NUM_DEVICES if candidate.size == "cpu" or candidate.family == "convnet" else 32
        ways = 2 if candidate.size == "drive" else ways
        split = [size for size, axis in zip(parameter.shape, axes, strict=True) if axis in SPLIT]
        assert not [size for size in split if size % ways], path


@each("name layout platform", LOWERINGS, held="bases")
def test_lowers_for_absent_devices(name: str, layout: str, platform: str) -> None:
    built = build(name, {"data": DATA, "fsdp": FSDP}[layout], platform).program
    assert f'sdy.mesh @mesh = <["{layout}"={NUM_DEVICES}]>' in built.lowered.as_text()
    assert built.mathematics.flops > 0
    # Sharding does not change what is computed, nor does the platform.
    assert built.mathematics == build(name, DATA, "tpu").program.mathematics


@pytest.mark.every  # each layout and each platform are held above; these are their other pairs
@each("name", [name for name in CPU_NAMES if name in BASES], held="all")
@pytest.mark.parametrize(("layout", "platform"), [("data", "cuda"), ("fsdp", "tpu")])
def test_base_lowers_for_the_other_pairs(name: str, layout: str, platform: str) -> None:
    test_lowers_for_absent_devices(name, layout, platform)


# --- What it computes ---


def operations(jaxpr: Any, scopes: tuple[str, ...] = ()) -> Iterator[tuple[Any, str]]:
    """Every equation, also in loops and calls, with the name stacks down to it."""
    for equation in jaxpr.eqns:
        inner = (*scopes, str(equation.source_info.name_stack))
        yield equation, "/".join(filter(None, inner))
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                if isinstance(item, core.ClosedJaxpr):
                    yield from operations(item.jaxpr, inner)
                elif isinstance(item, core.Jaxpr):
                    yield from operations(item, inner)


def products(name: str) -> list[tuple[Any, str]]:
    found = [
        (equation, stack)
        for equation, stack in operations(build(name, DATA, "tpu").jaxpr.jaxpr)
        if equation.primitive.name in ("dot_general", "conv_general_dilated")
    ]
    assert found
    return found


@functools.cache
def scopes_of(family: str) -> set[str]:
    """Names of the scopes that a family and the shared blocks open."""
    folder = Path(blocks.__file__).parent
    files = [Path(importlib.import_module(family).__file__ or ""), *folder.glob("*.py")]
    texts = (file.read_text() for file in files)
    return {name for text in texts for name in re.findall(r'named_scope\("(\w+)"\)', text)}


@each("name", NAMES, held="bases")
def test_every_product_lies_in_a_scope_of_a_part(name: str) -> None:
    scopes = scopes_of(DESCRIBED[name]["module"])
    for equation, stack in products(name):
        inside = [part for part in re.split(r"[/()]+", stack) if part in scopes]
        # The outermost scope is the whole network, which tells nothing.
        assert len(inside) >= 2, f"{equation.primitive.name} at {stack!r}"


@each("name", NAMES, held="bases")
def test_every_product_is_in_the_workloads_dtype(name: str) -> None:
    dtype = np.dtype(load(name).workload.dtype)
    for equation, stack in products(name):
        dtypes = {np.dtype(operand.aval.dtype) for operand in equation.invars}
        assert dtypes == {dtype}, f"{equation.primitive.name} at {stack!r}"


@each("name", NAMES, held="bases")
def test_step_never_calls_back_to_the_host(name: str) -> None:
    found = {eqn.primitive.name for eqn, _ in operations(build(name, DATA, "tpu").jaxpr.jaxpr)}
    assert not [primitive for primitive in found if "callback" in primitive]


@functools.cache
def start(name: str) -> Any:
    """State and batch of one seed, on the host."""
    init = build(name, DATA, "tpu").program.init
    return jax.device_get(jax.jit(init, compiler_options=QUICK)(jax.random.key(0)))


def ready(name: str, kind: Kind, layout: Layout, dtype: str) -> tuple[Any, Any, Any]:
    """The compiled step with its arguments on CPU devices, with products in `dtype`."""
    candidate = load(name)
    workload = dataclasses.replace(candidate.workload, kind=kind)
    module = importlib.import_module(DESCRIBED[name]["module"])
    with mock.patch.object(module, "DTYPE", np.dtype(dtype)):
        built = build_program(
            dataclasses.replace(candidate, workload=workload), layout, real_mesh(layout), "cpu"
        )
    executable: Any = built.lowered.compile(compiler_options=QUICK)
    state, batch = start(name)
    if kind == "forward":
        state = {part: values for part, values in state.items() if part != "optimizer"}
    return executable, *jax.device_put((state, batch), executable.input_shardings[0])


@functools.cache
def train(name: str, layout: Layout, dtype: str, num_steps: int) -> tuple[float, ...]:
    """Losses of so many steps on one batch, on CPU devices, with products in `dtype`."""
    executable, state, batch = ready(name, "train", layout, dtype)
    losses = []
    for _ in range(num_steps):
        state, loss = executable(state, batch)
        losses.append(float(loss))
    return tuple(losses)


@each("name", CPU_NAMES, held="bases")
def test_loss_over_8_devices_is_that_of_one(name: str) -> None:
    executable, state, batch = ready(name, "forward", FSDP, "float32")
    one = train(name, ONE, "float32", NUM_STEPS)[0]
    # In float32 only the order of sums differs, some 1e-7 of the loss each time.
    assert float(executable(state, batch)) == pytest.approx(one, rel=1e-5)


@each("name", CPU_NAMES, held=SHARDED)
def test_step_over_8_devices_gives_the_losses_of_one(name: str) -> None:
    # The second loss has gone through every gradient.
    one, many = train(name, ONE, "float32", NUM_STEPS)[:2], train(name, FSDP, "float32", 2)
    assert many == pytest.approx(one, rel=1e-5)


@each("name", CPU_NAMES, held="bases")
def test_candidate_learns_its_batch(name: str) -> None:
    losses = train(name, ONE, "float32", NUM_STEPS)
    assert losses[-1] < LEARNT * losses[0]


@pytest.mark.every  # bfloat16 compiles for ten times as long
@each("name", CPU_NAMES, held="all")
def test_candidate_learns_its_batch_in_the_workloads_dtype(name: str) -> None:
    losses = train(name, ONE, load(name).workload.dtype, NUM_STEPS)
    assert losses[-1] < LEARNT * losses[0]


@each("name", [name for name in CPU_NAMES if name in BASES], held="bases")
def test_base_in_the_workloads_dtype_gives_the_float32_loss(name: str) -> None:
    exact = train(name, ONE, "float32", NUM_STEPS)
    executable, state, batch = ready(name, "forward", ONE, load(name).workload.dtype)
    # bfloat16 rounds by up to 2^-9 some twenty times on the way to a logit: sqrt(20) of that is
    # 2^-7 in a logit, and the loss is a mean over at least eight of them.
    assert float(executable(state, batch)) == pytest.approx(exact[0], rel=2**-7)


# --- What its config changes ---


def other(value: Any, hint: Any) -> Any:
    """Another allowed value of a config field: the next literal, not, or the double."""
    if typing.get_origin(hint) is Literal:
        allowed = typing.get_args(hint)
        return allowed[(allowed.index(value) + 1) % len(allowed)]
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return tuple(2 * item for item in value)
    return 2 * value


def changed_fields() -> list[tuple[str, str]]:
    """Every field of a base; of a variant, those in which it differs from its base."""
    cases = []
    for name in CPU_NAMES:
        fields = DESCRIBED[name]["config"] if name in BASES else sorted(_changed(name))
        cases += [(name, field) for field in fields]
    return cases


@each("name field", changed_fields(), held="bases")
def test_config_field_changes_the_program(name: str, field: str) -> None:
    config = load(name).config
    hint = typing.get_type_hints(type(config))[field]
    value = other(getattr(config, field), hint)
    changes = ((field, value),)
    # Most fields show in the forward pass, which is traced in a third of the time; how much is
    # kept for the backward pass shows only in the whole step.
    if digest(name, "forward", changes) == digest(name, "forward"):
        assert digest(name, "train", changes) != digest(name, "train")


@each("name", [name for name in CPU_NAMES if name not in BASES], held="small")
def test_variant_is_another_program_than_its_rivals(name: str) -> None:
    rivals = [other for other in CPU_NAMES if DESCRIBED[other]["base"] == DESCRIBED[name]["base"]]
    alike = [
        other
        for other in rivals
        if other != name and digest(other, "forward") == digest(name, "forward")
    ]
    for other in alike:
        assert digest(name, "train") != digest(other, "train")
