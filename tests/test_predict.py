"""Predictions against arithmetic done by hand."""

import pytest

from jaxbench.cost import Cost, OpCost
from jaxbench.errors import ImpossibleError, UnknownPeakError
from jaxbench.network import collective_s
from jaxbench.predict import STATUS, predict_step
from jaxbench.target import chip_table, parse_target

MATMUL_FLOPS = 2 * 4096**3
MATMUL_BYTES = 3 * 4096**2 * 2


def matmul(**changes):
    values = {
        "name": "dot",
        "opcode": "dot",
        "scope": "net",
        "flops": (("bf16", MATMUL_FLOPS),),
        "matmul_flops": MATMUL_FLOPS,
        "padded_flops": MATMUL_FLOPS,
        "product_dtype": "bf16",
        "hbm_bytes": MATMUL_BYTES,
    }
    return OpCost(**{**values, **changes})


def predict(cost, target, **options):
    options = {"model_flops": MATMUL_FLOPS, "dtype": "bfloat16", **options}
    return predict_step(cost, parse_target(target), **options)


def test_prediction_of_a_large_product_is_its_flops_over_the_peak():
    chip = chip_table()["gpu-h100"]
    prediction = predict(Cost(ops=(matmul(),)), "gpu-h100")
    assert prediction.step_s == pytest.approx(MATMUL_FLOPS / 989.4e12 + chip.launch_s)
    assert prediction.bound == "compute"
    assert prediction.mfu == pytest.approx(MATMUL_FLOPS / (prediction.step_s * 989.4e12))


def test_prediction_of_a_copy_is_its_bytes_over_the_bandwidth():
    copy = OpCost(name="copy", opcode="copy", scope="", hbm_bytes=819_000_000)
    prediction = predict(Cost(ops=(copy,)), "tpu-v5e", model_flops=0)
    assert prediction.step_s == pytest.approx(1e-3)
    assert prediction.bound == "memory"


def test_prediction_on_tpu_takes_the_compilers_cycles_over_its_clock():
    prediction = predict(Cost(ops=(matmul(cycles=1_500_000),)), "tpu-v5e")
    assert prediction.step_s == pytest.approx(1e-3)
    assert prediction.compiler_s == pytest.approx(1e-3)
    assert prediction.hlo_s == pytest.approx(MATMUL_FLOPS / 197e12)


def test_prediction_on_tpu_takes_the_roofline_of_ops_without_cycles():
    cost = Cost(ops=(matmul(cycles=1_500_000), matmul()))
    prediction = predict(cost, "tpu-v5e")
    assert prediction.step_s == pytest.approx(1e-3 + MATMUL_FLOPS / 197e12)
    assert prediction.compiler_s == pytest.approx(1e-3)


def test_prediction_prices_padded_products_and_each_at_its_own_dtype():
    padded = predict(Cost(ops=(matmul(padded_flops=2 * MATMUL_FLOPS),)), "tpu-v5p")
    assert padded.step_s == pytest.approx(2 * MATMUL_FLOPS / 459e12)
    wide = matmul(flops=(("f32", MATMUL_FLOPS),), product_dtype="f32")
    chip = chip_table()["gpu-h100"]
    prediction = predict(Cost(ops=(wide,)), "gpu-h100")
    assert prediction.step_s == pytest.approx(MATMUL_FLOPS / 494.7e12 + chip.launch_s)


def test_prediction_hides_collectives_but_its_interval_does_not():
    gather = OpCost(
        name="ag",
        opcode="all-gather",
        scope="",
        collective="all-gather",
        collective_bytes=1_000_000,
        group_size=8,
    )
    cost = Cost(ops=(matmul(cycles=1_500_000), gather))
    prediction = predict(cost, "tpu-v5e:2x4")
    wire_s = 1_000_000 / (2 * 45e9)
    assert prediction.step_s == pytest.approx(1e-3)
    assert prediction.high_s > 1e-3 + wire_s
    assert prediction.low_s < 1e-3


def test_prediction_is_labelled_not_yet_validated():
    assert predict(Cost(ops=(matmul(),)), "gpu-a100").status == STATUS == "not yet validated"


def test_prediction_faster_than_the_peak_is_refused():
    with pytest.raises(ImpossibleError, match="200%"):
        predict(Cost(ops=(matmul(),)), "tpu-v5e", model_flops=2 * MATMUL_FLOPS)


def test_prediction_of_a_product_without_a_peak_names_dtype_and_chip():
    odd = matmul(flops=(("f8e4m3fn", 8),), product_dtype="f8e4m3fn")
    with pytest.raises(UnknownPeakError, match="f8e4m3fn.*tpu-v5e.*chips.toml"):
        predict(Cost(ops=(odd,)), "tpu-v5e")


def test_prediction_on_fake_cpu_devices_shares_the_machine():
    peaks = {"float32": 1e11, "bfloat16": 1e11, "bytes_per_s": 1e10}
    one = predict(Cost(ops=(matmul(),)), "cpu", cpu_peaks=peaks)
    eight = predict(Cost(ops=(matmul(),)), "cpu:8", cpu_peaks=peaks)
    assert eight.step_s == pytest.approx(8 * one.step_s)


@pytest.mark.parametrize(
    ("target", "group", "bandwidth"),
    [
        ("tpu-v5e:4x4", 16, 2 * 45e9),  # a ring, both ways
        ("tpu-v5e:4x4", 2, 45e9),  # two devices share one link
        ("tpu-v6e:16x16*2", 512, 12.5e9),  # across slices
        ("gpu-h100:8", 8, 450e9),  # NVLink
        ("gpu-h100:4x8", 32, 50e9),  # across hosts
    ],
)
def test_collective_takes_the_link_that_its_group_crosses(target, group, bandwidth):
    assert collective_s(1e9, group, parse_target(target)) == pytest.approx(1e9 / bandwidth)


def test_collective_across_a_network_without_a_figure_is_refused():
    with pytest.raises(UnknownPeakError, match=r"network_bytes_per_s.*tpu-v4"):
        collective_s(1e9, 128, parse_target("tpu-v4:4x4x4*2"))
