"""The store on disk: what damage, a full disk and a second process do to it."""

import errno
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import start, wait_for

from jaxbench.cache import cache_dir, key_of, locked, read_entry, storage_errors, write_entry
from jaxbench.errors import StorageError

KEY = key_of("tests")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def entry(folder: Path) -> Path:
    """The one file that an entry is."""
    (path,) = (path for path in folder.rglob("*") if path.is_file())
    return path


def failing(code: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def test_cache_dir_without_a_setting_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAXBENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/jaxbench")


def test_key_of_depends_on_values_not_on_the_order_of_keys() -> None:
    assert key_of({"a": 1, "b": 2}, "x") == key_of({"b": 2, "a": 1}, "x")
    keys = {key_of("a", "b"), key_of("ab"), key_of(["a", "b"]), key_of("a", 1), key_of("a", "1")}
    assert len(keys) == 5


@pytest.mark.parametrize("payload", [b"", b"x", bytes(range(256)) * 5000])
def test_write_entry_reads_back(payload: bytes) -> None:
    write_entry("kind", KEY, payload)
    assert read_entry("kind", KEY) == payload


def test_read_entry_absent_is_none() -> None:
    assert read_entry("kind", KEY) is None
    write_entry("kind", KEY, b"payload")
    assert read_entry("other", KEY) is None
    assert read_entry("kind", key_of("another")) is None


def test_write_entry_again_replaces() -> None:
    write_entry("kind", KEY, b"one")
    write_entry("kind", KEY, b"two")
    assert read_entry("kind", KEY) == b"two"


@pytest.mark.parametrize("place", [0, 31, 32, 40, -1])
def test_read_entry_flipped_byte_is_none_and_removed(folder: Path, place: int) -> None:
    write_entry("kind", KEY, b"payload" * 100)
    path = entry(folder)
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x40
    path.write_bytes(raw)
    assert read_entry("kind", KEY) is None
    assert not path.exists()
    write_entry("kind", KEY, b"anew")
    assert read_entry("kind", KEY) == b"anew"


@pytest.mark.parametrize("size", [0, 5, 32, 33, -1])
def test_read_entry_truncated_is_none_and_removed(folder: Path, size: int) -> None:
    write_entry("kind", KEY, b"payload" * 100)
    path = entry(folder)
    path.write_bytes(path.read_bytes()[:size])
    assert read_entry("kind", KEY) is None
    assert not path.exists()


def test_write_entry_folder_that_is_a_file_names_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("JAXBENCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match=f"{tmp_path}/file/cache.*Not a directory"):
        write_entry("kind", KEY, b"payload")
    with (
        pytest.raises(StorageError, match=f"{tmp_path}/file/cache.*Not a directory"),
        locked("kind", KEY),
    ):
        raise AssertionError("entered without the lock")


def test_read_entry_folder_that_is_a_file_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("JAXBENCH_CACHE", str(tmp_path / "file" / "cache"))
    assert read_entry("kind", KEY) is None


def test_read_entry_unreadable_names_the_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_entry("kind", KEY, b"payload")
    monkeypatch.setattr(Path, "read_bytes", failing(errno.EACCES))
    with pytest.raises(StorageError, match=f"{folder}.*Permission denied"):
        read_entry("kind", KEY)


@pytest.mark.parametrize("call", ["replace", "mkdir"])
@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "choose a folder that you may write"),
        (errno.EIO, "choose another folder"),
    ],
)
def test_write_entry_failing_disk_leaves_nothing_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, advice: str
) -> None:
    monkeypatch.setattr(os, call, failing(code))
    with pytest.raises(StorageError, match=f"{folder}.*{os.strerror(code)}.*{advice}"):
        write_entry("kind", KEY, b"payload")
    monkeypatch.undo()
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_write_entry_full_disk_keeps_the_entry_that_was_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_entry("kind", KEY, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing(errno.ENOSPC))
        with pytest.raises(StorageError, match="No space left"):
            write_entry("kind", KEY, b"new")
    assert read_entry("kind", KEY) == b"old"


def test_write_entry_disk_full_in_the_middle_leaves_nothing_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = tempfile.NamedTemporaryFile

    def make_full(**options: Any) -> Any:
        file = make(**options)
        file.write(b"the first bytes")
        monkeypatch.setattr(file, "write", failing(errno.ENOSPC), raising=False)
        return file

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", make_full)
    with pytest.raises(StorageError, match="No space left on device"):
        write_entry("kind", KEY, b"payload")
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    assert read_entry("kind", KEY) is None


def test_storage_errors_lets_other_errors_through() -> None:
    with pytest.raises(ZeroDivisionError), storage_errors(Path("/x")):
        _ = 1 / 0


_HOLD = """
import sys, time
from pathlib import Path
from jaxbench.cache import locked
with locked("kind", sys.argv[1]):
    Path(sys.argv[2]).touch()
    time.sleep(float(sys.argv[3]))
    Path(sys.argv[2]).write_text(str(time.monotonic()))
"""


def test_locked_second_process_waits_for_the_first(tmp_path: Path, folder: Path) -> None:
    note = tmp_path / "note"
    holder = start("-c", _HOLD, KEY, note, "1.0", cache=folder)
    wait_for(note.exists, timeout_s=20)
    with locked("kind", key_of("another entry")):
        assert not note.read_text()
    with locked("kind", KEY):
        entered = time.monotonic()
    assert holder.finish()[0] == 0
    assert entered >= float(note.read_text())


def test_locked_holder_that_is_killed_frees_it(tmp_path: Path, folder: Path) -> None:
    note = tmp_path / "note"
    holder = start("-c", _HOLD, KEY, note, "600", cache=folder)
    wait_for(note.exists, timeout_s=20)
    holder.process.kill()
    holder.finish()
    started = time.monotonic()
    with locked("kind", KEY):
        assert time.monotonic() - started < 5
