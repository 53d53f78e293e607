"""Finding candidates: in the families that ship with jaxbench, and in the user's own files.

Importing a candidate file imports JAX and runs the user's code, so everything here is called in a
worker.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxbench.candidate import Candidate, Input, Workload
from jaxbench.errors import CandidateError

_FAMILIES = "jaxbench.models"
_BLOCKS = "jaxbench.models.blocks"
_SPACES = "jaxbench.spaces"


def family_modules() -> list[str]:
    """Returns the module names of the shipped families, without importing them."""
    files = (item.name for item in resources.files(_FAMILIES).iterdir())
    return sorted(
        f"{_FAMILIES}.{name[:-3]}"
        for name in files
        if name.endswith(".py") and name != "__init__.py"
    )


def describe_candidates(sources: list[str]) -> list[dict[str, Any]]:
    """Describes the candidates of modules or files, JSON-ready, each with its source's digest.

    Raises:
      CandidateError: if a source cannot be loaded, or holds no candidates.
    """
    described = []
    for source in sources:
        module = load_module(source)
        digest = source_digest(module)
        for candidate in _candidates(module, source):
            described.append({**candidate.describe(), "module": source, "source_sha256": digest})
    return described


def space_modules() -> dict[str, str]:
    """Returns the module of each shipped search space, by the space's name."""
    files = (item.name for item in resources.files(_SPACES).iterdir())
    names = sorted(name[:-3] for name in files if name.endswith(".py") and name != "__init__.py")
    return {name.replace("_", "-"): f"{_SPACES}.{name}" for name in names}


def load_candidate(source: str, name: str) -> Candidate:
    """Loads one candidate by the source and name that `describe_candidates` gave."""
    for candidate in _candidates(load_module(source), source):
        if candidate.name == name:
            return candidate
    raise CandidateError(f"{source} holds no candidate {name!r} any more. Start again.")


def load_described(described: Mapping[str, Any]) -> Candidate:
    """Loads the candidate of a description, with the config and the workload that it gives.

    A network that a search made has the key `of`: the candidate of the file that it was made from.
    """
    candidate = load_candidate(described["module"], described.get("of", described["name"]))
    workload = dict(described["workload"])
    workload["inputs"] = tuple(
        (name, Input(**{**given, "shape": tuple(given["shape"])}))
        for name, given in workload["inputs"]
    )
    return dataclasses.replace(
        candidate,
        name=described["name"],
        config=dataclasses.replace(candidate.config, **described["config"]),
        workload=Workload(**workload),
    )


def load_module(source: str) -> ModuleType:
    """Imports a shipped module by name, or a file by path.

    Raises:
      CandidateError: if that fails, with how.
    """
    try:
        return (
            importlib.import_module(source)
            if source.startswith((_FAMILIES, _SPACES))
            else _load_file(Path(source))
        )
    except CandidateError:
        raise
    except SyntaxError as error:
        raise CandidateError(
            f"{source} is not Python: {error.msg} at line {error.lineno}. Give a Python file with "
            f"a tuple CANDIDATES."
        ) from error
    except (Exception, SystemExit) as error:
        text = (str(error).splitlines() or [""])[0]
        raise CandidateError(
            f"{source} raised {type(error).__name__} on import: {text}. Make `python {source}` run "
            f"without error."
        ) from error


def _load_file(path: Path) -> ModuleType:
    """Imports a file under a name of its own, so that it clashes with nothing."""
    name = f"jaxbench_candidates_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise CandidateError(
            f"{path} is not Python: its name must end in .py. Give a file with a tuple CANDIDATES."
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))  # its neighbours, as when Python runs the file
    spec.loader.exec_module(module)
    return module


def _candidates(module: ModuleType, source: str) -> tuple[Candidate, ...]:
    found = getattr(module, "CANDIDATES", None)
    if not isinstance(found, tuple | list) or not found:
        raise CandidateError(
            f"{source} has no candidates. Give it a tuple CANDIDATES of jaxbench.Candidate."
        )
    for item in found:
        if not isinstance(item, Candidate):
            raise CandidateError(
                f"{source} has a {type(item).__name__} in CANDIDATES. Each entry is a "
                f"jaxbench.Candidate."
            )
    names = [candidate.name for candidate in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CandidateError(
            f"{source} names {', '.join(twice)} twice. Each candidate's name is its own."
        )
    return tuple(found)


def source_digest(module: ModuleType) -> str:
    """Returns the digest of the candidate file's code and of that of its own modules it imports."""
    path = Path(module.__file__ or "")
    files = {path}
    if module.__name__.startswith((_FAMILIES, _SPACES)):
        files |= _shipped_blocks(module)
    else:
        loaded = (getattr(other, "__file__", None) for other in list(sys.modules.values()))
        files |= {Path(file) for file in loaded if file and _is_neighbour(Path(file), path.parent)}
    texts = [_code(file) for file in sorted(files) if file.suffix == ".py"]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _code(file: Path) -> str:
    """Returns what of a file decides its programs: a new comment or docstring changes nothing."""
    return _without_texts(file.read_bytes())


@functools.cache  # families share most blocks
def _without_texts(source: bytes) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        )
        if documented and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.dump(tree)


def _shipped_blocks(module: ModuleType) -> set[Path]:
    """Returns the files of the shared blocks that a family imports, directly or through others."""
    found: set[Path] = set()
    waiting = [Path(module.__file__ or "")]
    while waiting:
        for name in _imported_blocks(waiting.pop().read_bytes()):
            file = Path(sys.modules[name].__file__ or "")
            if file not in found:
                found.add(file)
                waiting.append(file)
    return found


@functools.cache
def _imported_blocks(text: bytes) -> tuple[str, ...]:
    """Returns the modules of shared blocks that a file imports from."""
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    names = (node.module or "" for node in imports)
    return tuple(name for name in names if name.startswith(_BLOCKS))


def _is_neighbour(file: Path, folder: Path) -> bool:
    return (
        file.is_relative_to(folder)
        and not file.is_relative_to(sys.prefix)
        and "site-packages" not in file.parts
    )
