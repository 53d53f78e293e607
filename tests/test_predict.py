"""Predictions against arithmetic done by hand."""

import pytest

from jaxbench.cost import Cost, Loop, OpCost, Wait
from jaxbench.errors import ImpossibleError, UnknownPeakError
from jaxbench.hlo.groups import ReplicaGroups
from jaxbench.predict import predict_step
from jaxbench.predict.gemm import kernel_s, product_s
from jaxbench.target import chip_table, parse_target

SIDE = 4096
MATMUL_FLOPS = 2 * SIDE**3
MATMUL_BYTES = 3 * SIDE**2 * 2


def matmul(**changes):
    values = {
        "name": "dot",
        "opcode": "dot",
        "scope": "net",
        "flops": (("bf16", MATMUL_FLOPS),),
        "matmul_flops": MATMUL_FLOPS,
        "padded_flops": MATMUL_FLOPS,
        "product_dtype": "bf16",
        "sizes": (1, SIDE, SIDE, SIDE),
        "hbm_bytes": MATMUL_BYTES,
    }
    return OpCost(**{**values, **changes})


def gather(size_bytes=1_000_000, **changes):
    groups = ReplicaGroups(num_groups=1, group_size=8, dims=(8,), perm=(0,))
    values = {
        "name": "ag",
        "opcode": "all-gather",
        "scope": "",
        "collective": "all-gather",
        "buffer_bytes": size_bytes,
        "group_size": 8,
        "groups": groups,
        "stream": "collective",
    }
    return OpCost(**{**values, **changes})


def predict(steps, target, **options):
    options = {"model_flops": MATMUL_FLOPS, "dtype": "bfloat16", **options}
    return predict_step(Cost(steps=tuple(steps)), parse_target(target), **options)


def test_prediction_of_a_product_on_a_gpu_is_that_of_a_library_kernel():
    chip = chip_table()["gpu-h100"]
    prediction = predict([matmul()], "gpu-h100")
    alone_s = product_s(SIDE, SIDE, SIDE, dtype="bfloat16", chip=chip)
    assert prediction.step_s == pytest.approx(alone_s / chip.sustained)
    assert prediction.hlo_s == pytest.approx(MATMUL_FLOPS / 989.4e12 + chip.launch_s)
    assert prediction.bound == "compute"
    assert prediction.mfu == pytest.approx(MATMUL_FLOPS / (prediction.step_s * 989.4e12))


def test_prediction_of_a_copy_is_its_bytes_over_the_bandwidth():
    chip = chip_table()["tpu-v5e"]
    copy = OpCost(name="copy", opcode="copy", scope="", hbm_bytes=819_000_000)
    prediction = predict([copy], "tpu-v5e", model_flops=0)
    assert prediction.step_s == pytest.approx(1e-3 / chip.hbm_efficiency)
    assert prediction.bound == "memory"


def test_prediction_on_tpu_takes_the_compilers_cycles_over_its_clock():
    chip = chip_table()["tpu-v5p"]
    prediction = predict([matmul(cycles=1_750_000)], "tpu-v5p")
    assert prediction.step_s == pytest.approx(1e-3 * chip.cycle_scale)
    assert prediction.compiler_s == pytest.approx(1e-3)
    assert prediction.hlo_s == pytest.approx(MATMUL_FLOPS / 459e12)


def test_prediction_on_tpu_takes_the_roofline_of_ops_without_cycles():
    chip = chip_table()["tpu-v5p"]
    prediction = predict([matmul(cycles=1_750_000), matmul()], "tpu-v5p")
    assert prediction.step_s == pytest.approx(1e-3 * chip.cycle_scale + MATMUL_FLOPS / 459e12)
    assert prediction.compiler_s == pytest.approx(1e-3)


def test_prediction_pads_products_and_takes_each_at_its_own_dtype():
    padded = predict([matmul(padded_flops=2 * MATMUL_FLOPS)], "tpu-v5p")
    assert padded.step_s == pytest.approx(2 * MATMUL_FLOPS / 459e12)
    wide = matmul(flops=(("f32", MATMUL_FLOPS),), product_dtype="f32")
    assert predict([wide], "gpu-h100").hlo_s > 1.9 * predict([matmul()], "gpu-h100").hlo_s


def test_prediction_hides_a_collective_that_the_schedule_hides_and_no_other():
    alone = predict([matmul(cycles=1_500_000)], "tpu-v5e:2x4").step_s
    hidden = predict(
        [gather(starts="ag"), matmul(cycles=1_500_000), Wait(token="ag")], "tpu-v5e:2x4"
    )
    shown = predict([gather(), matmul(cycles=1_500_000)], "tpu-v5e:2x4")
    assert hidden.step_s == pytest.approx(alone)
    assert shown.step_s > alone
    assert dict(shown.terms)["collective"] == pytest.approx(shown.step_s - alone)


def test_prediction_terms_add_up_to_the_step():
    steps = [gather(), Loop(trips=7, steps=(gather(starts="ag"), matmul(), Wait(token="ag")))]
    for target in ("tpu-v5p:2x2x2", "gpu-h100:8"):
        prediction = predict(steps, target)
        assert sum(seconds for _, seconds in prediction.terms) == pytest.approx(prediction.step_s)


def test_prediction_interval_holds_the_step_and_says_what_it_rests_on():
    prediction = predict([matmul()], "gpu-a100")
    assert prediction.low_s < prediction.step_s < prediction.high_s
    assert "published steps" in prediction.status


def test_prediction_faster_than_the_peak_is_refused():
    with pytest.raises(ImpossibleError, match="20.%"):
        predict([matmul()], "tpu-v5e", model_flops=2.02 * MATMUL_FLOPS)


def test_prediction_of_a_product_without_a_peak_names_dtype_and_chip():
    odd = matmul(flops=(("f8e4m3fn", 8),), product_dtype="f8e4m3fn")
    with pytest.raises(UnknownPeakError, match="float8_e4m3fn.*tpu-v5e.*chips.toml"):
        predict([odd], "tpu-v5e")


def test_prediction_on_fake_cpu_devices_shares_the_machine():
    peaks = {"float32": 1e11, "bfloat16": 1e11, "bytes_per_s": 1e10}
    one = predict([matmul()], "cpu", cpu_peaks=peaks)
    eight = predict([matmul()], "cpu:8", cpu_peaks=peaks)
    assert eight.step_s == pytest.approx(8 * one.step_s)


# --- Kernels on GPUs ---

# Measured on H100 and B200 in bfloat16: (chip, m, n, k, TFLOP/s).
PRODUCTS = [
    ("gpu-h100", 1024, 2048, 1024, 384.0),
    ("gpu-h100", 2048, 2048, 2048, 641.0),
    ("gpu-h100", 4096, 4096, 4096, 780.2),
    ("gpu-b200", 1024, 2048, 1024, 492.5),
    ("gpu-b200", 4096, 4096, 1024, 1075.6),
    ("gpu-b200", 4096, 4096, 4096, 1416.9),
]


@pytest.mark.parametrize(("name", "m", "n", "k", "tflops"), PRODUCTS)
def test_product_takes_what_it_was_measured_to_take(name, m, n, k, tflops):
    seconds = product_s(m, n, k, dtype="bfloat16", chip=chip_table()[name])
    # The fit's 90th percentile of errors is 5 %.
    assert seconds == pytest.approx(2 * m * n * k / (tflops * 1e12), rel=0.05)


@pytest.mark.parametrize("name", ["gpu-a100", "gpu-h100", "gpu-h200", "gpu-b200", "gpu-gb200"])
@pytest.mark.parametrize("side", [1, 64, 1000, 8192])
def test_product_never_beats_the_peak_and_grows(name, side):
    chip = chip_table()[name]
    seconds = product_s(side, side, side, dtype="bfloat16", chip=chip)
    assert seconds > 2 * side**3 / chip.peak("bfloat16")
    assert product_s(side, side, 2 * side, dtype="bfloat16", chip=chip) >= seconds
    assert product_s(side, side, side, batch=64, dtype="bfloat16", chip=chip) >= seconds


def test_product_with_one_row_more_than_its_tiles_pays_for_another():
    chip = chip_table()["gpu-h100"]
    whole, more = (product_s(m, 8192, 8192, dtype="bfloat16", chip=chip) for m in (8192, 8193))
    assert more > 1.005 * whole


def test_product_of_an_unknown_dtype_is_refused():
    with pytest.raises(UnknownPeakError, match="int4"):
        product_s(8, 8, 8, dtype="int4", chip=chip_table()["gpu-h100"])


def test_small_kernels_cost_their_launch_and_large_ones_their_bytes():
    chip = chip_table()["gpu-h100"]
    assert kernel_s(1.0, chip=chip) == pytest.approx(chip.launch_s, rel=1e-3)
    large = kernel_s(1e9, chip=chip)
    assert large == pytest.approx(1e9 / (chip.hbm_bytes_per_s * chip.hbm_efficiency), rel=0.02)
