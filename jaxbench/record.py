"""Records: a JSON line for each candidate on each target, appended as soon as it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxbench.cache import key_of
from jaxbench.errors import UsageError
from jaxbench.lines import append_line, read_lines

SCHEMA = 1
FILE_NAME = "records.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """Everything that was found out about one candidate on one target. JSON-ready throughout.

    The nested values are those of the stages: `compiled` (compile_s, memory, and options that the
    compiler needed beyond the target's own), `cost`, `prediction`, `compiler` (the vendor's own
    estimate), `measurement`, `failure`; None where a stage gave none.
    Costs are per device and per step; `samples_per_s` is for the whole mesh.
    """

    id: str
    candidate: str
    family: str
    size: str
    base: str
    replaces: str
    validity: str
    source: str
    source_sha256: str
    config: Mapping[str, Any]
    workload: Mapping[str, Any]
    layout: str
    target: str
    num_devices: int
    versions: Mapping[str, str]
    schema: int = SCHEMA
    num_params: int | None = None
    program_sha256: str | None = None
    hlo_sha256: str | None = None
    compiled: Mapping[str, Any] | None = None
    cost: Mapping[str, Any] | None = None
    prediction: Mapping[str, Any] | None = None
    compiler: Mapping[str, Any] | None = None
    measurement: Mapping[str, Any] | None = None
    samples_per_s: float | None = None
    samples_per_s_from: str | None = None
    failure: Mapping[str, Any] | None = None
    timings: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_lost(self) -> bool:
        """Whether a worker ended without saying anything, or timing was broken off.

        The next run tries again.
        """
        if self.failure is not None and self.failure["stage"] == "worker":
            return True
        return self.measurement is not None and self.measurement.get("ended") == "interrupted"

    def to_json(self) -> dict[str, Any]:
        """Returns the record as one JSON-ready dict, every key present."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def record_id(
    described: Mapping[str, Any],
    layout: str,
    target: str,
    versions: Mapping[str, str],
    measured: bool | str,
) -> str:
    """Returns the identity of a record: the same request gives the same id, in any run.

    A measured and an unmeasured record are two, and one that was profiled as well is a third.
    """
    asked = [described[key] for key in ("name", "config", "workload", "source_sha256")]
    return key_of(SCHEMA, asked, layout, target, dict(versions), measured)[:16]


def append_record(folder: Path, record: Record) -> bool:
    """Appends a record unless one with its id is there; returns whether it was appended.

    Several processes may append at once. A line is written whole or, if the disk is full, not at
    all.

    Raises:
      StorageError: if the line cannot be written.
    """
    return append_line(
        folder / FILE_NAME,
        record.to_json(),
        unless=lambda: any(
            known.id == record.id and not known.is_lost for known in read_records(folder)
        ),
    )


def read_records(folder: Path) -> list[Record]:
    """Reads a folder's records; a half-written line is passed over.

    Of several with one id the first counts, but a lost one gives way to what came after it.

    Raises:
      UsageError: if the records are of another schema.
    """
    path = folder / FILE_NAME
    found: dict[str, Record] = {}
    for values in read_lines(path):
        if "id" not in values:
            continue
        if values.get("schema") != SCHEMA:
            raise UsageError(
                f"{path} has records of schema {values.get('schema')}, this jaxbench reads "
                f"{SCHEMA}. "
                "Use another folder, or the jaxbench that wrote it."
            )
        if set(values) != set(Record.__dataclass_fields__):
            raise UsageError(
                f"{path} has a record whose keys are not those of schema {SCHEMA}: it was "
                "edited, or written by another jaxbench. Use another folder."
            )
        record = Record(**values)
        if record.id not in found or found[record.id].is_lost:
            found[record.id] = record
    return list(found.values())
