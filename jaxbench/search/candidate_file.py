"""A found network as a Python file that every command takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxbench.cache import storage_errors
from jaxbench.search.resolved import Resolved

_TEXT = '''"""{name}, found by `jaxbench search`.

Against {base}: {changes}.

    jaxbench run {file}
    jaxbench compare {base} {name} --from {file}
"""

import dataclasses

from jaxbench.discovery import load_candidate

BASE = load_candidate({module!r}, {base!r})

CANDIDATES = (
    dataclasses.replace(
        BASE,
        name={name!r},
        config=dataclasses.replace(
            BASE.config,
{config}
        ),
        workload=dataclasses.replace(
            BASE.workload,
            global_batch={global_batch},
            inputs=tuple(
                (name, dataclasses.replace(given, shape={shapes}[name]))
                for name, given in BASE.workload.inputs
            ),
        ),
        base={base!r},
        replaces={changes!r},
        validity={validity!r},
    ),
)
'''


def write_candidate(folder: Path, network: Resolved) -> Path | None:
    """Writes the file of a network, and returns its path; None for the base, which has one."""
    if network.validity == "base":
        return None
    described = network.described
    path = folder / f"{network.name}.py"
    text = _TEXT.format(
        name=network.name,
        file=path.name,
        base=described["of"],
        module=described["module"],
        changes=network.changes,
        validity=network.validity,
        config=_fields(described["config"]),
        global_batch=described["workload"]["global_batch"],
        shapes={name: tuple(given["shape"]) for name, given in described["workload"]["inputs"]},
    )
    with storage_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path


def _fields(config: Mapping[str, Any]) -> str:
    return "\n".join(f"            {name}={_literal(value)}," for name, value in config.items())


def _literal(value: Any) -> str:
    if isinstance(value, list | tuple):
        inner = ", ".join(map(_literal, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, str):
        return json.dumps(value)
    return repr(value)
