"""The wheel: what it installs runs a user's file beside a package that is called models."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import CANDIDATES, read_lines, shared_cache, start

__all__ = ["shared_cache"]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel of this tree is installed, without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("jaxbench", "models"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignore, symlinks=True)
    _call("uv", "build", "--quiet", "--wheel", "--out-dir", folder / "dist", source)
    (wheel,) = (folder / "dist").glob("*.whl")
    target = folder / "installed"
    _call(
        "uv", "pip", "install", "--quiet", "--no-deps", "--python", sys.executable,
        "--target", target, wheel,
    )  # fmt: skip
    return target


def _call(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _write_project(folder: Path) -> Path:
    """A user's project: my_net.py, and its own package models that it imports from."""
    network, made = (CANDIDATES / "tiny.py").read_text().split("def _candidate(")
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "__init__.py").write_text("")
    (folder / "models" / "layers.py").write_text(network)
    (folder / "my_net.py").write_text(
        "from jaxbench.candidate import Candidate, Input, Workload\n"
        "from models.layers import FEATURES, Tiny, TinyConfig, loss\n\n\n"
        f"def _candidate({made}"
    )
    return folder / "models" / "layers.py"


def test_wheel_holds_every_module_and_data_file(installed: Path) -> None:
    def names(folder: Path) -> set[str]:
        kept = {".py", ".toml"}
        files = (path for path in folder.rglob("*") if path.suffix in kept and path.is_file())
        return {str(path.relative_to(folder)) for path in files}

    expected = names(ROOT / "jaxbench") | {f"models/{name}" for name in names(ROOT / "models")}
    assert names(installed / "jaxbench") == expected
    assert {path.name for path in installed.iterdir() if not path.name.startswith(".")} == {
        "bin",
        "jaxbench",
        next(installed.glob("jaxbench-*.dist-info")).name,
    }


def test_wheel_runs_a_users_file_that_has_its_own_models(
    installed: Path, tmp_path: Path, shared_cache: Path
) -> None:
    project = tmp_path / "project"
    layers = _write_project(project)
    arguments = (installed / "bin" / "jaxbench", "run", "my_net.py", "--targets", "tpu-v6e:4x4")
    for round_trip in (1, 2):
        command = start(*arguments, cache=shared_cache, cwd=project, PYTHONPATH=str(installed))
        code, stdout, stderr = command.finish()
        assert (code, stderr) == (0, "")
        assert "tiny-cpu-deep" in stdout
        assert "tpu-v6e:4x4" in stdout
        assert len(read_lines(project / "out" / "my_net")) == 2 * round_trip
        layers.write_text(layers.read_text() + "\nCHANGED = True\n")
    records = read_lines(project / "out" / "my_net")
    assert {record["failure"] for record in records} == {None}
    assert {(record["num_devices"], record["layout"]) for record in records} == {(16, "data=16")}
    for record in records:
        assert record["cost"]["collective_bytes"] > 0
    digests = [record["source_sha256"] for record in records]
    assert digests[0] == digests[1] != digests[2] == digests[3]


def test_wheel_code_is_what_ran_not_the_tree(installed: Path, tmp_path: Path) -> None:
    code = (
        "import jaxbench.cli, importlib.util\n"
        "print(jaxbench.cli.__file__)\n"
        "print(importlib.util.find_spec('jaxbench.models').origin)\n"
    )
    command = start("-c", code, cache=tmp_path, cwd=tmp_path, PYTHONPATH=str(installed))
    exit_code, stdout, stderr = command.finish()
    assert (exit_code, stderr) == (0, "")
    assert stdout.splitlines() == [
        str(installed / "jaxbench" / "cli.py"),
        str(installed / "jaxbench" / "models" / "__init__.py"),
    ]
