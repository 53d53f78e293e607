"""Executables handed from one process to another, and what cannot be handed over."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxbench import cache
from jaxbench.executable import compile_init, has_executables, keep_executables, load_executables
from jaxbench.target import parse_target

KEY = "0" * 64
CPU = parse_target("cpu")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXBENCH_CACHE", str(tmp_path))


def _step(state: Any, batch: Any) -> tuple[Any, Any]:
    return {"w": state["w"] - 0.1 * batch}, jnp.sum(state["w"] * batch)


def _compiled() -> Any:
    arguments = ({"w": jax.ShapeDtypeStruct((8,), jnp.float32)}, jnp.ones(8))
    return jax.jit(_step, donate_argnums=0).lower(*arguments).compile()


def test_load_executables_of_kept_ones_compute_the_same_and_donate() -> None:
    init = compile_init(lambda key: jax.random.normal(key, (8,)), CPU)
    assert keep_executables(KEY, _compiled(), init)
    loaded = load_executables(KEY, jax.devices()[:1])
    assert loaded is not None
    step, make = loaded
    start = make(jax.random.key(0))
    assert jnp.array_equal(start, jax.random.normal(jax.random.key(0), (8,)))
    state = {"w": start + 0.0}
    expected, loss = _step({"w": start}, jnp.ones(8))
    after, value = step(state, jnp.ones(8))
    assert jnp.allclose(after["w"], expected["w"], rtol=1e-6)
    assert float(value) == pytest.approx(float(loss), rel=1e-6)
    assert state["w"].is_deleted()


def test_load_executables_over_two_devices_keep_their_shards() -> None:
    devices = jax.devices()[:2]
    mesh = jax.sharding.Mesh(devices, "data", axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    init = compile_init(lambda key: jax.random.normal(key, (8,)), CPU, split)
    assert keep_executables(KEY, init)
    loaded = load_executables(KEY, devices)
    assert loaded is not None
    made = loaded[0](jax.random.key(0))
    assert made.sharding == split
    assert jnp.array_equal(made, jax.random.normal(jax.random.key(0), (8,)))


def test_load_executables_without_any_is_none() -> None:
    assert not has_executables(KEY)
    assert load_executables(KEY, jax.devices()[:1]) is None


def test_load_executables_of_a_damaged_entry_is_none() -> None:
    assert keep_executables(KEY, _compiled())
    (path,) = [path for path in (cache.cache_dir() / "executables").rglob("*") if path.is_file()]
    path.write_bytes(path.read_bytes()[:-1])
    assert load_executables(KEY, jax.devices()[:1]) is None


def test_keep_executables_that_call_python_are_not_kept() -> None:
    def by_host(x: Any) -> Any:
        return jax.pure_callback(lambda y: y, jax.ShapeDtypeStruct((), jnp.float32), x)

    assert not keep_executables(KEY, jax.jit(by_host).lower(1.0).compile())
    assert not has_executables(KEY)
