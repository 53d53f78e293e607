"""T5: published sizes and operations, exact rewrites, position biases by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rewrites import (
    Path,
    check_rewrites,
    count_parameters,
    draw,
    forward_flops,
    run,
)

from jaxbench.models import t5
from jaxbench.models.blocks.relative import PositionBias, position_buckets
from jaxbench.program import make_batch

BY_NAME = {candidate.name: candidate for candidate in t5.CANDIDATES}


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        # Hugging Face's count of each checkpoint's parameters.
        ("t5-paper-small", 60_506_624),
        ("t5-paper-base", 222_903_552),
        ("t5-paper-large", 737_668_096),
        ("t5-paper-v11small", 76_961_152),
        ("t5-paper-v11large", 783_150_080),
        ("t5-fleet-11b", 11_307_321_344),
    ],
)
def test_parameters_are_as_many_as_published(name: str, exact: int) -> None:
    assert count_parameters(BY_NAME[name]) == exact


@pytest.mark.parametrize(
    ("change", "exact", "published"),
    [
        ("", 222_951_168, 223e6),
        ("-geglu", 222_951_168, 223e6),
        ("-rms", 222_903_552, 223e6),
        ("-rezero", 222_855_996, 223e6),
        ("-deepest", 223_042_944, 224e6),
        ("-deeper", 222_996_992, 223e6),
        ("-shallower", 222_920_832, 223e6),
        ("-shallowest", 222_905_856, 223e6),
        ("-tiedinputs", 247_625_472, 248e6),
        ("-tieddecoder", 247_625_472, 248e6),
        ("-untied", 272_299_776, 273e6),
        ("-thin", 227_161_856, 227e6),
        ("-thinshared", 202_487_552, 202e6),
        ("-block", 65_875_200, 65e6),
        ("-blockthin", 45_411_584, 45e6),
        ("-blockthinshared", 20_737_280, 20e6),
        ("-encoderblock", 169_734_912, 170e6),
        ("-decoderblock", 143_765_760, 144e6),
    ],
)
def test_modifications_have_the_parameters_of_the_table(
    change: str, exact: int, published: float
) -> None:
    found = count_parameters(BY_NAME[f"t5-paper-vanilla{change}"])
    assert found == exact
    # Narang et al., table 1, give whole millions, some rounded and some cut.
    assert abs(found - published) < 1e6


@pytest.mark.parametrize(
    ("change", "width", "published"),
    [("", 768, 11.1e12), ("-thin", 128, 9.4e12), ("-thinshared", 128, 9.1e12)],
)
def test_forward_operations_of_64_sequences_are_those_of_the_table(
    change: str, width: int, published: float
) -> None:
    given = BY_NAME[f"t5-paper-vanilla{change}"]
    flops = forward_flops(given, ((64, 512), jnp.int32), ((64, 114), jnp.int32))
    # Mesh TensorFlow looks tokens up by a product with one-hot rows, which the table counts.
    lookups = 2 * 64 * (512 + 114) * given.config.vocab_size * width
    # Two digits, or three, of the table: half of the last one.
    assert flops + lookups == pytest.approx(published, abs=0.05e12)


def test_exact_rewrites_agree_in_value_and_gradient() -> None:
    rivals = [
        rival for rival in t5.CANDIDATES if (rival.base, rival.validity) == ("t5-cpu-base", "T0")
    ]
    assert len(rivals) == 3
    check_rewrites(t5, BY_NAME["t5-cpu-base"], rivals)


def test_scores_in_bfloat16_are_the_same_function_but_for_rounding() -> None:
    base, half = BY_NAME["t5-cpu-base"], BY_NAME["t5-cpu-base-halfscores"]
    values, batch = draw(base), make_batch(base.workload, jax.random.key(1))
    (value, slopes), (other, other_slopes) = (run(t5, one, values, batch) for one in (base, half))
    assert other != value
    assert other == pytest.approx(value, rel=2**-8)
    for path, slope in slopes.items():
        assert np.linalg.norm(other_slopes[path] - slope) < 0.1 * np.linalg.norm(slope) + 1e-6


def test_shared_layers_are_layers_with_equal_parameters() -> None:
    shared = BY_NAME["t5-cpu-vanilla-block"]
    config = dataclasses.replace(shared.config, sharing="none")
    apart = dataclasses.replace(shared, config=config)

    def place(path: Path) -> Path:
        """The stack's path for that of the one layer: encoder, stack, once, layers, 0, ..."""
        return (*path[:2], "layers", *path[5:]) if "once" in path else path

    values, batch = draw(shared), make_batch(shared.workload, jax.random.key(1))
    stacked = {
        place(path): np.stack([value] * config.num_layers) if "once" in path else value
        for path, value in values.items()
    }
    value, slopes = run(t5, shared, values, batch)
    other_value, other_slopes = run(t5, apart, stacked, batch)
    assert other_value == pytest.approx(value, rel=1e-5)
    for path, slope in slopes.items():
        other = other_slopes[place(path)]
        found = other.sum(axis=0) if "once" in path else other
        # Sums in another order, in float32.
        np.testing.assert_allclose(found, slope, rtol=1e-3, atol=1e-4 * np.abs(slope).max())


def test_position_buckets_of_both_directions_by_hand() -> None:
    # 16 buckets a direction, 8 of one distance each; then 8 for 8 ... 128, two for each doubling.
    offset = np.array([0, -1, -7, -8, -16, -127, -1000, 1, 7, 8, 16, 32, 1000])
    found = position_buckets(offset, both=True, num_buckets=32, max_distance=128)
    assert found.tolist() == [0, 1, 7, 8, 10, 15, 15, 17, 23, 24, 26, 28, 31]


def test_position_buckets_of_one_direction_by_hand() -> None:
    # 16 of one distance each; 16 for 16 ... 128, that is 16/3 for each doubling.
    offset = np.array([5, 0, -1, -15, -16, -32, -64, -128, -1000])
    found = position_buckets(offset, both=False, num_buckets=32, max_distance=128)
    assert found.tolist() == [0, 0, 1, 15, 16, 21, 26, 31, 31]


@pytest.mark.parametrize("both", [True, False])
def test_position_bias_is_the_tables_row_for_key_minus_query(both: bool) -> None:
    T, N = 5, 3
    with nnx.use_eager_sharding(False):
        module = PositionBias(
            8, N, both=both, num_buckets=8, max_distance=16, rngs=nnx.Rngs(params=0)
        )
    found = module(jnp.zeros((1, T, 8), jnp.float32))
    offset = np.arange(T)[None] - np.arange(T)[:, None]
    buckets = position_buckets(offset, both=both, num_buckets=8, max_distance=16)
    wanted = np.asarray(module.table[...])[buckets].transpose(2, 0, 1)
    np.testing.assert_array_equal(found[0], wanted)
