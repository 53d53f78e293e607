"""What blocks cost on each target: kept in the cache, so that each is compiled once."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jaxbench import cache
from jaxbench.compiler import versions_for
from jaxbench.errors import Failure
from jaxbench.layout import parse_layout, resolve_layout
from jaxbench.search.resolved import Resolved
from jaxbench.target import Target
from jaxbench.worker import Job, run_jobs

_CODE = ("cost.py", "network.py", "network.toml", "chips.toml", "program.py", "layout.py")


_TOGETHER = 8  # blocks in a worker


@dataclass(frozen=True, slots=True)
class _Missing:
    """A block without a price, and a network that has it."""

    network: Resolved
    block: str
    kind: str
    target: Target


class PriceBook:
    """Prices of blocks by target, from memory, the cache, or a compile."""

    def __init__(
        self,
        source: str,
        digest: str,
        targets: Sequence[Target],
        *,
        cpu_peaks: Mapping[str, float] | None,
        limits: Any,
    ) -> None:
        self._source, self._digest, self._targets = source, digest, targets
        self._cpu_peaks, self._limits = cpu_peaks, limits
        self._known: dict[str, dict[str, Any] | Failure] = {}
        self.num_compiled = 0

    def fill(
        self,
        networks: Iterable[Resolved],
        progress: Callable[[str, int, int], None],
        *,
        forward: bool = False,
    ) -> None:
        """Compiles what blocks of the networks have no price yet, a few of a target in a worker."""
        missing: dict[str, _Missing] = {}
        for network in networks:
            for target in self._targets:
                for block, kind, _ in network.blocks:
                    key = self._key(network, block, target, forward)
                    if key not in missing and self._find(key) is None:
                        missing[key] = _Missing(network, block, kind, target)
        jobs = {}
        for group in _groups(missing):
            job = self._job(group, missing, forward)
            jobs[id(job)] = (job, group)
        done, made = 0, [job for job, _ in jobs.values()]
        for job, result in run_jobs(made, num_workers=self._limits.num_workers):
            _, group = jobs[id(job)]
            for key in group:
                self._known[key] = _price_of(key, result)
            done += len(group)
            self.num_compiled += len(group)
            progress(job.name, done, len(missing))

    def by_kind(
        self, network: Resolved, target: Target, *, forward: bool = False
    ) -> dict[str, float] | str:
        """Returns the seconds of each kind of block of a priced network, or why there are none."""
        found: dict[str, float] = {}
        for block, kind, count in network.blocks:
            price = self._find(self._key(network, block, target, forward))
            if price is None or isinstance(price, Failure):
                why = "it was not priced" if price is None else f"{price.error}: {price.text}"
                return f"{kind} on {target.name}: {why}"
            found[kind] = found.get(kind, 0.0) + price["step_s"] * count
        return found

    def _find(self, key: str) -> dict[str, Any] | Failure | None:
        if key not in self._known:
            known = find_price(key)
            if known is None:
                return None
            self._known[key] = known
        return self._known[key]

    def _key(self, network: Resolved, block: str, target: Target, forward: bool) -> str:
        work = network.described["workload"]
        asked = [
            self._digest,
            block,
            [work[name] for name in ("kind", "dtype", "optimizer", "learning_rate")],
            self._layout(network, target),
            target.name,
            forward,
        ]
        peaks = self._cpu_peaks if target.kind == "cpu" else None
        return cache.key_of(asked, peaks, _versions(target), pricing_digest())

    def _layout(self, network: Resolved, target: Target) -> str:
        return resolve_layout(parse_layout(network.layout), target.num_devices).name

    def _job(self, group: Sequence[str], missing: Mapping[str, _Missing], forward: bool) -> Job:
        first = missing[group[0]]
        return Job(
            name=f"{first.kind} on {first.target.name}",
            function="jaxbench.search.server:price_in_worker",
            arguments={
                "source": self._source,
                "wanted": [
                    {
                        "point": dict(missing[key].network.point),
                        "block": missing[key].block,
                        "layout": self._layout(missing[key].network, missing[key].target),
                        "key": key,
                    }
                    for key in group
                ],
                "target": first.target.name,
                "cpu_peaks": self._cpu_peaks if first.target.kind == "cpu" else None,
                "forward_only": forward,
            },
            limit_s=self._limits.limit_s * len(group),
            limit_bytes=self._limits.limit_bytes,
        )


def _groups(missing: Mapping[str, _Missing]) -> list[list[str]]:
    """A target's blocks, `_TOGETHER` at a time: loading a compiler takes seconds."""
    by_target: dict[str, list[str]] = {}
    for key, one in missing.items():
        by_target.setdefault(one.target.name, []).append(key)
    return [
        keys[start : start + _TOGETHER]
        for keys in by_target.values()
        for start in range(0, len(keys), _TOGETHER)
    ]


def _price_of(key: str, result: Any) -> dict[str, Any] | Failure:
    """What a worker gave of one block; what it priced before it crashed is kept."""
    given = result if isinstance(result, Failure) else result[key]
    if isinstance(given, Failure):
        return find_price(key) or given
    return given


@functools.cache
def _versions(target: Target) -> dict[str, str]:
    return versions_for(target)


def find_price(key: str) -> dict[str, Any] | None:
    """Returns a price that the cache keeps."""
    known = cache.read_entry("blocks", key)
    return None if known is None else json.loads(known)


def keep_price(key: str, price: Mapping[str, Any]) -> None:
    """Keeps a price in the cache."""
    cache.write_entry("blocks", key, json.dumps(price).encode())


@functools.cache
def pricing_digest() -> str:
    """Returns the digest of the code that decides what a block costs."""
    package = resources.files("jaxbench")
    files = [
        *(package / name for name in (*_CODE, "compiler.py")),
        package / "search" / "blockstep.py",
        *sorted((package / "predict").iterdir(), key=lambda item: item.name),
        *sorted((package / "hlo").iterdir(), key=lambda item: item.name),
    ]
    texts = [file.read_bytes() for file in files if file.is_file()]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()
