"""Discovery: what a candidate's identity follows, and which families a request reads."""

import importlib
import json
from pathlib import Path

import pytest
from commands import CANDIDATES

from jaxbench import discovery
from jaxbench.discovery import describe_candidates, family_modules
from jaxbench.run import families_of


def digest_of(path: Path, text: str) -> str:
    path.write_text(text)
    return discovery._code(path)


def test_code_of_a_file_stays_when_comments_and_docstrings_change(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    text = '"""A net."""\n\n\nclass Net:\n    """One."""\n\n    width: int = 4\n'
    other = '"""Another text."""\n# why\n\nclass Net:\n    """Two."""\n    width: int = 4\n'
    assert digest_of(path, text) == digest_of(path, other)


def test_code_of_a_file_changes_with_a_value(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    assert digest_of(path, '"""A net."""\nWIDTH = 4\n') != digest_of(
        path, '"""A net."""\nWIDTH = 8\n'
    )


def test_source_digest_of_a_family_follows_the_blocks_it_imports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = importlib.import_module("jaxbench.models.vit")
    files = {path.name for path in discovery._shipped_blocks(module)}
    # The layers that it imports, and the weights that only those import.
    assert {"attention.py", "stack.py", "weights.py"} <= files
    before = discovery.source_digest(module)
    code = discovery._code
    monkeypatch.setattr(
        discovery, "_code", lambda path: code(path) + ("x" if path.name == "weights.py" else "")
    )
    assert discovery.source_digest(module) != before


def test_families_of_reads_only_what_a_name_can_be_in() -> None:
    assert families_of(["decoder-cpu-head64"]) == ["jaxbench.models.decoder"]
    assert families_of(["bev-paper-*"]) == ["jaxbench.models.bev"]
    assert families_of(["*-cpu-*"]) == family_modules()
    assert families_of(["nonsense"]) == []


def test_describe_candidates_gives_a_users_file_its_path_as_module() -> None:
    path = CANDIDATES / "tiny.py"
    assert {one["module"] for one in describe_candidates([str(path)])} == {str(path)}


RESULTS = Path(__file__).parents[1] / "results"


@pytest.mark.parametrize(
    "folder",
    ["quality-bev", "quality-search", "search-bev", "search-decoder", "search-decoder-tpu"],
)
def test_networks_beside_results_are_those_of_the_records(folder: str) -> None:
    files = sorted((RESULTS / folder / "networks").glob("*.py"))
    listed = json.loads(json.dumps(describe_candidates(list(map(str, files)))))
    described = {one["name"]: one for one in listed}
    text = (RESULTS / folder / "records.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    found = [record for record in records if record["candidate"] in described]
    # Those of a search with few changes are composed from blocks: they stand on the page alone.
    page = (RESULTS / folder / "README.md").read_text()
    composed = page.partition("## The fastest with so many changes")[2].partition("## ")[0]
    without = set(described) - {record["candidate"] for record in found}
    assert found
    assert not [name for name in without if name not in composed]
    for record in found:
        one = described[record["candidate"]]
        assert record["config"] == one["config"]
        assert record["base"] == one["base"]
