"""Sizes of candidates: counted exactly, once."""

from pathlib import Path

import pytest

from jaxbench.discovery import describe_candidates
from jaxbench.sizes import count_sizes, size_candidates


def test_count_sizes_of_a_decoder_equal_the_formula() -> None:
    name = "decoder-cpu-head64"
    (size,) = count_sizes(source="jaxbench.models.decoder", names=[name]).values()
    T, D, F, N, K, H, V, L = 64, 128, 256, 8, 4, 64, 256, 2
    layer = 2 * T * D * (2 * N * H + 2 * K * H) + 2 * 2 * T * T * N * H + 3 * 2 * T * D * F
    assert size["forward_flops"] == L * layer + 2 * T * D * V
    weights = D * (2 * N * H + 2 * K * H) + 3 * D * F + 2 * D
    assert size["num_params"] == L * weights + V * D + D


def test_size_candidates_counts_once_and_then_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXBENCH_CACHE", str(tmp_path))
    described = describe_candidates(["jaxbench.models.decoder"])[:2]
    told: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        told.append(done)
        assert total == len(described)

    first = size_candidates(described, progress)
    assert told == [2]
    assert size_candidates(described, progress) == first
    assert told == [2]
    assert all(one["num_params"] and one["forward_flops"] for one in first)
