"""Target names, the table of chips, and layouts."""

import math

import pytest

from jaxbench.errors import LayoutError, UnknownPeakError, UsageError
from jaxbench.layout import check_batch, parse_layout, resolve_layout
from jaxbench.target import chip_table, missing_compiler, parse_target

CHIPS = chip_table()
TPUS = [name for name, chip in CHIPS.items() if chip.kind == "tpu"]
GPUS = [name for name, chip in CHIPS.items() if chip.kind == "gpu"]


@pytest.mark.parametrize(
    ("text", "name", "topology", "num_slices", "num_devices"),
    [
        ("cpu", "cpu", (1,), 1, 1),
        ("cpu:1", "cpu", (1,), 1, 1),
        ("cpu:8", "cpu:8", (8,), 1, 8),
        (" tpu-v5e ", "tpu-v5e", (1, 1), 1, 1),
        ("tpu-v5e:1x1", "tpu-v5e", (1, 1), 1, 1),
        ("tpu-v5e:1", "tpu-v5e", (1, 1), 1, 1),
        ("tpu-v5e:4x4", "tpu-v5e:4x4", (4, 4), 1, 16),
        ("tpu-v6e:16x16*2", "tpu-v6e:16x16*2", (16, 16), 2, 512),
        ("tpu-v6e:4x4*1", "tpu-v6e:4x4", (4, 4), 1, 16),
        ("tpu-v4:2x2x1", "tpu-v4:2x2x1", (2, 2, 1), 1, 4),
        ("tpu-v5p:4x4x8", "tpu-v5p:4x4x8", (4, 4, 8), 1, 128),
        ("tpu-v2", "tpu-v2", (1, 1), 1, 2),
        ("tpu-v3:4x4", "tpu-v3:4x4", (4, 4), 1, 32),
        ("tpu-7x:2x2x1", "tpu-7x:2x2x1", (2, 2, 1), 1, 8),
        ("gpu-h100", "gpu-h100", (1, 1), 1, 1),
        ("gpu-h100:8", "gpu-h100:8", (1, 8), 1, 8),
        ("gpu-h100:1x8", "gpu-h100:8", (1, 8), 1, 8),
        ("gpu-h100:4x8", "gpu-h100:4x8", (4, 8), 1, 32),
        ("gpu-h100:4x1", "gpu-h100:4x1", (4, 1), 1, 4),
        ("gpu-gb200:72", "gpu-gb200:72", (1, 72), 1, 72),
    ],
)
def test_parse_target_good_name_gives_topology_and_canonical_name(
    text: str, name: str, topology: tuple[int, ...], num_slices: int, num_devices: int
) -> None:
    target = parse_target(text)
    assert (target.name, target.topology, target.num_slices) == (name, topology, num_slices)
    assert target.num_devices == num_devices
    assert parse_target(target.name) == target


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tpu-v9", ("Unknown target 'tpu-v9'", "tpu-v5e", "gpu-h100", "cpu:8")),
        ("", ("Unknown target ''", "tpu-v5e:4x4")),
        ("tpu-v5e:", ("Unknown target 'tpu-v5e:'",)),
        ("tpu-v5e:4X4", ("Unknown target 'tpu-v5e:4X4'",)),
        ("tpu-v5e:4x4*", ("Unknown target 'tpu-v5e:4x4*'",)),
        ("tpu-v5e*2", ("Unknown target 'tpu-v5e*2'",)),
        ("tpu-v5e:-4x4", ("Unknown target 'tpu-v5e:-4x4'",)),
        ("tpu-v5e:0x4", ("'tpu-v5e:0x4'", "zero", "at least 1")),
        ("tpu-v5e:4x4*0", ("'tpu-v5e:4x4*0'", "zero")),
        ("cpu:0", ("'cpu:0'", "zero")),
        ("tpu-v5e:4x4x4", ("'tpu-v5e:4x4x4'", "3 axes", "AxB", "at most 16x16")),
        ("tpu-v5p:4x4", ("'tpu-v5p:4x4'", "2 axes", "AxBxC", "at most 16x16x24")),
        ("tpu-v5e:4", ("'tpu-v5e:4'", "1 axes", "AxB")),
        ("tpu-v5e:32x32", ("'tpu-v5e:32x32'", "larger", "16x16")),
        ("tpu-v5p:24x24x4", ("'tpu-v5p:24x24x4'", "larger", "16x16x24")),
        ("tpu-v5e:3x4", ("'tpu-v5e:3x4'", "whole hosts", "2x2")),
        ("tpu-v4:2x1x2", ("'tpu-v4:2x1x2'", "whole hosts", "2x2x1")),
        ("tpu-v5e:1x1*2", ("'tpu-v5e:1x1*2'", "whole hosts")),
        ("gpu-h100:9", ("'gpu-h100:9'", "9 GPUs", "at most 8", "gpu-h100:HOSTSx8")),
        ("gpu-h100:2x16", ("'gpu-h100:2x16'", "16 GPUs", "at most 8")),
        ("gpu-h100:2x2x2", ("'gpu-h100:2x2x2'", "gpu-h100:HOSTSxGPUS")),
        ("gpu-h100:8*2", ("'gpu-h100:8*2'", "gpu-h100:HOSTSxGPUS")),
        ("cpu:2x2", ("'cpu:2x2'", "cpu:DEVICES")),
        ("cpu:8*2", ("'cpu:8*2'", "cpu:DEVICES")),
    ],
)
def test_parse_target_bad_name_says_what_is_allowed(text: str, says: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_target(text)
    for words in says:
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*TPUS, *GPUS])
def test_chip_table_accelerator_has_every_number_that_prices_need(name: str) -> None:
    chip = CHIPS[name]
    peaks = dict(chip.peak_flops)
    assert {"bfloat16", "float32"} <= peaks.keys()
    numbers = [
        *peaks.values(), chip.hbm_bytes, chip.hbm_bytes_per_s, chip.clock_ghz,
        chip.link_bytes_per_s, chip.num_links, chip.devices_per_chip,
    ]  # fmt: skip
    for number in numbers:
        assert number is not None
        assert 0 < number < math.inf
    # A step's worth of bytes moves in milliseconds: catches numbers off by a thousand.
    assert 1e9 < chip.hbm_bytes < 1e12  # type: ignore[operator]
    assert 1e-3 < chip.hbm_bytes / chip.hbm_bytes_per_s < 0.1  # type: ignore[operator]
    assert 1e13 < peaks["bfloat16"] < 1e16
    assert peaks["float32"] <= peaks["bfloat16"]


@pytest.mark.parametrize("name", TPUS)
def test_chip_table_tpu_describes_its_torus(name: str) -> None:
    chip = CHIPS[name]
    assert chip.topology_name
    assert chip.topology_dims in (2, 3)
    assert len(chip.max_topology) == len(chip.host_bounds) == chip.topology_dims
    assert chip.num_links == 2 * chip.topology_dims
    assert chip.mxu in (128, 256)
    largest = parse_target(f"{name}:{'x'.join(map(str, chip.max_topology))}")
    assert largest.num_chips == math.prod(chip.max_topology)


@pytest.mark.parametrize("name", GPUS)
def test_chip_table_gpu_describes_its_cores_and_network(name: str) -> None:
    chip = CHIPS[name]
    assert chip.description.startswith("NVIDIA")
    assert chip.compute_capability >= (8, 0)
    numbers = [
        chip.num_cores, chip.fpus_per_core, chip.l2_bytes, chip.shared_bytes_per_core,
        chip.shared_bytes_optin, chip.gpus_per_host, chip.launch_s, chip.vector_flops,
        chip.network_bytes_per_s,
    ]  # fmt: skip
    for number in numbers:
        assert number is not None
        assert number > 0
    assert chip.network_bytes_per_s < chip.link_bytes_per_s  # type: ignore[operator]


def test_chip_unknown_dtype_raises_with_the_known_ones() -> None:
    with pytest.raises(UnknownPeakError, match=r"float8_e4m3fn.*'tpu-v5e'.*bfloat16.*chips\.toml"):
        CHIPS["tpu-v5e"].peak("float8_e4m3fn")


def test_missing_compiler_all_compilers_installed_says_nothing() -> None:
    assert [missing_compiler(kind) for kind in ("cpu", "tpu", "gpu")] == [None, None, None]


def test_missing_compiler_absent_package_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib.metadata

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert "pip install 'jaxbench[tpu]'" in str(missing_compiler("tpu"))
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert "Linux x86-64 only" in str(missing_compiler("gpu"))


@pytest.mark.parametrize(
    ("text", "num_devices", "resolved"),
    [
        ("data", 8, "data=8"),
        ("fsdp", 1, "fsdp=1"),
        ("data=2,fsdp", 8, "data=2,fsdp=4"),
        ("data, tensor=4", 8, "data=2,tensor=4"),
        ("data=2,fsdp=2,tensor=2", 8, "data=2,fsdp=2,tensor=2"),
    ],
)
def test_resolve_layout_good_text_uses_every_device(
    text: str, num_devices: int, resolved: str
) -> None:
    layout = parse_layout(text)
    assert parse_layout(layout.name) == layout
    full = resolve_layout(layout, num_devices)
    assert full.name == resolved
    assert math.prod(size for _, size in full.axes) == num_devices


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pipeline", ("'pipeline'", "data, fsdp, tensor")),
        ("", ("''", "data, fsdp, tensor")),
        ("data=2,", ("'data=2,'", "''")),
        ("data=0", ("'data=0'", "data=2,fsdp=8")),
        ("data=-1", ("'data=-1'",)),
        ("data=two", ("'data=two'",)),
        ("data=2,data=4", ("'data=2,data=4'", "twice")),
        ("data,fsdp", ("'data,fsdp'", "at most one")),
    ],
)
def test_parse_layout_bad_text_says_what_is_allowed(text: str, says: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_layout(text)
    for words in says:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "num_devices", "says"),
    [
        ("data=3,fsdp", 8, "a multiple of 3 devices, the target has 8"),
        ("data=2,fsdp=2", 8, "needs 4 devices, the target has 8"),
        ("data=16", 8, "needs 16 devices, the target has 8"),
    ],
)
def test_resolve_layout_wrong_number_of_devices_raises(
    text: str, num_devices: int, says: str
) -> None:
    with pytest.raises(LayoutError, match=says):
        resolve_layout(parse_layout(text), num_devices)


def test_check_batch_divides_over_data_and_fsdp_only() -> None:
    layout = parse_layout("data=2,fsdp=4,tensor=3")
    check_batch(layout, 16)
    with pytest.raises(LayoutError, match="global_batch=12 does not divide over 8 devices"):
        check_batch(layout, 12)


def test_layout_rules_keep_only_the_axes_of_the_mesh() -> None:
    rules = dict(parse_layout("fsdp").rules())
    assert rules["batch"] == ("fsdp",)
    assert rules["embed"] == ("fsdp",)
    assert rules["mlp"] is None
