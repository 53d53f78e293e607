"""Records: nothing is lost, nothing stands twice, whatever happens to the writer."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from commands import read_lines, start
from records import make_measurement, make_record

from jaxbench.errors import StorageError, UsageError
from jaxbench.record import FILE_NAME, SCHEMA, Record, append_record, read_records, record_id

LOST = {"stage": "worker", "error": "Timeout", "text": "stopped"}
FAILED = {"stage": "compile", "error": "XlaRuntimeError", "text": "no"}
TESTS = Path(__file__).parent


def make(id: str, **fields: Any) -> Record:
    return make_record(id=id, **fields)


def ids(folder: Path) -> list[str]:
    return [record.id for record in read_records(folder)]


def test_append_record_makes_the_folder_and_reads_back(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    record = make("one", config={"widths": [1, 2], "kind": "é"}, timings={"compile_s": 0.5})
    assert append_record(folder, record)
    assert read_records(folder) == [record]
    (line,) = read_lines(folder)
    assert line == json.loads(json.dumps(record.to_json()))
    assert line["schema"] == SCHEMA


def test_read_records_no_folder_gives_none(tmp_path: Path) -> None:
    assert read_records(tmp_path / "absent") == []


def test_append_record_same_id_is_refused(tmp_path: Path) -> None:
    assert append_record(tmp_path, make("one", size="first"))
    assert not append_record(tmp_path, make("one", size="second"))
    assert [record.size for record in read_records(tmp_path)] == ["first"]
    assert len(read_lines(tmp_path)) == 1


@pytest.mark.parametrize("failure", [None, FAILED])
def test_append_record_after_a_lost_one_takes_its_place(
    tmp_path: Path, failure: dict[str, Any] | None
) -> None:
    assert append_record(tmp_path, make("one", failure=LOST))
    assert append_record(tmp_path, make("two"))
    assert append_record(tmp_path, make("one", failure=failure))
    assert not append_record(tmp_path, make("one", failure=LOST))
    assert {record.id: record.failure for record in read_records(tmp_path)} == {
        "one": failure,
        "two": None,
    }


def test_append_record_failure_of_the_network_itself_is_kept(tmp_path: Path) -> None:
    assert append_record(tmp_path, make("one", failure=FAILED))
    assert not append_record(tmp_path, make("one"))
    assert read_records(tmp_path)[0].failure == FAILED


@pytest.mark.parametrize("ended", ["precise", "budget", "failed"])
def test_append_record_after_an_interrupted_measurement_takes_its_place(
    tmp_path: Path, ended: str
) -> None:
    broken = make("one", measurement=make_measurement(0.01, ended="interrupted"))
    whole = make("one", measurement=make_measurement(0.02, ended=ended))
    assert broken.is_lost
    assert not whole.is_lost
    assert append_record(tmp_path, broken)
    assert read_records(tmp_path) == [broken]
    assert append_record(tmp_path, whole)
    assert not append_record(tmp_path, broken)
    assert read_records(tmp_path) == [whole]


def test_append_record_interrupted_twice_counts_once(tmp_path: Path) -> None:
    for step_s in (0.01, 0.02):
        measurement = make_measurement(step_s, ended="interrupted")
        assert append_record(tmp_path, make("one", measurement=measurement))
    (record,) = read_records(tmp_path)
    assert record.measurement == make_measurement(0.02, ended="interrupted")


def test_append_record_lost_twice_counts_once(tmp_path: Path) -> None:
    append_record(tmp_path, make("one", failure=LOST))
    append_record(tmp_path, make("one", failure=LOST))
    assert ids(tmp_path) == ["one"]


@pytest.mark.parametrize("keep", [1, 30, -1])
def test_append_record_after_a_half_written_line_starts_a_new_one(
    tmp_path: Path, keep: int
) -> None:
    append_record(tmp_path, make("one"))
    append_record(tmp_path, make("two"))
    path = tmp_path / FILE_NAME
    first, second = path.read_bytes().splitlines(keepends=True)
    # Even all but its last byte: that one is whole JSON and lacks only its end of line.
    path.write_bytes(first + second[:keep])
    expected = ["one"] if keep > 0 else ["one", "two"]
    assert ids(tmp_path) == expected
    assert append_record(tmp_path, make("three"))
    assert ids(tmp_path) == [*expected, "three"]
    assert append_record(tmp_path, make("two")) == (keep > 0)
    assert sorted(ids(tmp_path)) == ["one", "three", "two"]
    for line in path.read_bytes().splitlines(keepends=True):
        assert line.endswith(b"\n")


@pytest.mark.parametrize("noise", [b"\n", b"{}\n", b"[1]\n", b"null\n", b"\xff\xfe\n", b"\0" * 50])
def test_read_records_passes_over_what_is_no_record(tmp_path: Path, noise: bytes) -> None:
    append_record(tmp_path, make("one"))
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes() + noise)
    append_record(tmp_path, make("two"))
    assert ids(tmp_path) == ["one", "two"]


def test_read_records_other_schema_is_a_usage_error(tmp_path: Path) -> None:
    append_record(tmp_path, make("one", schema=SCHEMA + 1))
    with pytest.raises(UsageError, match=rf"{tmp_path}.*schema {SCHEMA + 1}.*reads {SCHEMA}"):
        read_records(tmp_path)


def test_append_record_other_schema_there_is_a_usage_error_and_adds_nothing(
    tmp_path: Path,
) -> None:
    append_record(tmp_path, make("one", schema=SCHEMA + 1))
    before = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(UsageError, match="schema"):
        append_record(tmp_path, make("two"))
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_append_record_disk_full_in_the_middle_truncates_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_record(tmp_path, make("one"))
    before = (tmp_path / FILE_NAME).read_bytes()
    write, calls = os.write, []

    def write_some(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:20])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_some)
        with pytest.raises(StorageError, match=f"{tmp_path}.*No space left.*free some space"):
            append_record(tmp_path, make("two"))
    assert calls == [calls[0], calls[0] - 20, calls[0] - 40]
    assert (tmp_path / FILE_NAME).read_bytes() == before
    assert append_record(tmp_path, make("two"))
    assert ids(tmp_path) == ["one", "two"]


def test_append_record_short_writes_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
        append_record(tmp_path, make("one"))
    assert read_records(tmp_path) == [make("one")]


def test_append_record_folder_that_is_a_file_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match=f"{tmp_path}/file"):
        append_record(tmp_path / "file", make("one"))


def test_append_record_number_that_json_lacks_raises_and_adds_nothing(tmp_path: Path) -> None:
    append_record(tmp_path, make("one"))
    with pytest.raises(ValueError, match="JSON"):
        append_record(tmp_path, make("two", samples_per_s=math.nan))
    assert ids(tmp_path) == ["one"]


_APPEND = """
import sys
from pathlib import Path
from jaxbench.record import append_record
from records import make_measurement, make_record
for index in range(int(sys.argv[2]), int(sys.argv[2]) + 50):
    append_record(Path(sys.argv[1]), make_record(id=f"id {index}", source="x" * 5000))
"""


def test_append_record_two_processes_lose_and_double_nothing(tmp_path: Path) -> None:
    writers = [
        start("-c", _APPEND, tmp_path / "out", first, cache=tmp_path, PYTHONPATH=str(TESTS))
        for first in (0, 25)
    ]
    assert [writer.finish()[0] for writer in writers] == [0, 0]
    found = [line["id"] for line in read_lines(tmp_path / "out")]
    assert sorted(found) == sorted(f"id {index}" for index in range(75))


DESCRIBED = {"name": "a", "config": {"x": 1}, "workload": {"b": 2}, "source_sha256": "0"}


def test_record_id_same_request_same_id() -> None:
    one = record_id(DESCRIBED, "data=1", "cpu", {"jax": "1"}, False)
    again = record_id({**DESCRIBED, "base": "any"}, "data=1", "cpu", {"jax": "1"}, False)
    assert one == again


@pytest.mark.parametrize(
    "other",
    [
        ({**DESCRIBED, "name": "b"}, "data=1", "cpu", {"jax": "1"}, False),
        ({**DESCRIBED, "config": {"x": 2}}, "data=1", "cpu", {"jax": "1"}, False),
        ({**DESCRIBED, "workload": {"b": 3}}, "data=1", "cpu", {"jax": "1"}, False),
        ({**DESCRIBED, "source_sha256": "1"}, "data=1", "cpu", {"jax": "1"}, False),
        (DESCRIBED, "fsdp=1", "cpu", {"jax": "1"}, False),
        (DESCRIBED, "data=1", "tpu-v5e", {"jax": "1"}, False),
        (DESCRIBED, "data=1", "cpu", {"jax": "2"}, False),
        (DESCRIBED, "data=1", "cpu", {"jax": "1"}, True),
    ],
)
def test_record_id_changes_with_all_that_decides_the_result(other: tuple) -> None:
    assert record_id(*other) != record_id(DESCRIBED, "data=1", "cpu", {"jax": "1"}, False)
