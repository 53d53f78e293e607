"""What every test runs under: the compilers' environment, 8 CPU devices, a cache of its own."""

import os

import pytest

from jaxbench.compiler import apply_environment

apply_environment()

import jax  # noqa: E402  (reads the environment when it is imported)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    """Keeps what the real compilers made beside pytest's own cache, for the next run."""
    cache = config.cache
    assert cache is not None
    os.environ["JAXBENCH_CACHE"] = str(cache.mkdir("jaxbench"))


# Files that take minutes: begun first, none of them is waited for at the end.
LONG = ("test_cli.py", "test_quality.py", "test_search.py", "test_cost.py", "test_measure.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps the tests of a file in one process, when several run them, unless they say otherwise.

    They share traced programs and fixtures. One process takes one group after the other too.
    """
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))
    first: dict[tuple[str, str], int] = {}
    for place, item in enumerate(items):
        first.setdefault(_group(item), place)
    items.sort(key=lambda item: first[_group(item)])


def _group(item: pytest.Item) -> tuple[str, str]:
    marker = item.get_closest_marker("xdist_group")
    return item.path.name, marker.args[0] if marker else ""
