"""The search: fronts, composition, Optuna's journal and its owners, and one small search."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import CANDIDATES, error_line, jaxbench, shared_cache, start_jaxbench, wait_for

from jaxbench.errors import UsageError
from jaxbench.search.compose import fit_composition
from jaxbench.search.front import (
    choose_near_front,
    coverage,
    least_worst,
    pareto_front,
    regret_table,
    winners,
)
from jaxbench.search.trials import Trials

__all__ = ["shared_cache"]
FILE = CANDIDATES / "space.py"
TIMES = {
    "base": {"cpu": 4.0, "tpu": 4.0},
    "left": {"cpu": 1.0, "tpu": 5.0},
    "right": {"cpu": 5.0, "tpu": 1.0},
    "middle": {"cpu": 2.0, "tpu": 2.0},
    "beaten": {"cpu": 2.0, "tpu": 2.1},
}


def test_pareto_front_is_what_nothing_beats() -> None:
    assert pareto_front(TIMES) == ["left", "right", "middle"]
    assert pareto_front({"one": {"cpu": 1.0}, "twin": {"cpu": 1.0}}) == ["one", "twin"]


def test_pareto_front_with_slack_keeps_what_is_beaten_by_little() -> None:
    assert pareto_front(TIMES, slack=0.06) == ["left", "right", "middle", "beaten"]


def test_regret_of_each_targets_winner_on_the_others() -> None:
    assert winners(TIMES) == {"cpu": "left", "tpu": "right"}
    table = regret_table(TIMES)
    assert (table["cpu", "cpu"], table["cpu", "tpu"], table["tpu", "cpu"]) == (1, 5, 5)
    assert least_worst(TIMES) == "middle"
    assert coverage(["left", "middle"], ["left", "beaten"]) == 0.5


def networks(noise: float, num: int, seed: int = 0) -> tuple[list[dict[str, float]], list[float]]:
    """Steps of 5 ms and blocks whose isolated prices are 20 % too high and 10 % too low."""
    generator = np.random.default_rng(seed)
    blocks, whole = [], []
    for _ in range(num):
        a, b = generator.uniform(0.01, 0.05, 2)
        blocks.append({"a": 1.2 * a, "b": 0.9 * b})
        whole.append((0.005 + a + b) * math.exp(noise * generator.normal()))
    return blocks, whole


def test_fit_composition_finds_what_blocks_miss() -> None:
    blocks, whole = networks(0.0, 20)
    found = fit_composition(blocks, whole)
    assert found.median_error < 1e-3
    assert float(np.median(found.plain_errors)) > 0.03
    new, truth = networks(0.0, 5, seed=9)
    for one, step_s in zip(new, truth, strict=True):
        assert found.step_s(one) == pytest.approx(step_s, rel=0.01)


def test_fit_composition_errors_are_those_of_networks_that_a_fit_has_not_seen() -> None:
    blocks, whole = networks(0.05, 24)
    found = fit_composition(blocks, whole)
    errors = []
    for at in range(len(whole)):
        others = [i for i in range(len(whole)) if i != at]
        refit = fit_composition([blocks[i] for i in others], [whole[i] for i in others])
        errors.append(abs(refit.step_s(blocks[at]) / whole[at] - 1))
    # The ridge is chosen once, on all, and by each refit anew.
    assert np.median(found.errors) == pytest.approx(np.median(errors), rel=0.2)


def test_fit_composition_of_few_networks_is_the_sum_of_blocks() -> None:
    blocks, whole = networks(0.0, 3)
    found = fit_composition(blocks, whole)
    assert found.step_s({"a": 1.0, "new": 2.0}) == 3.0
    assert found.errors == found.plain_errors


DESCRIBED = {
    "name": "toy",
    "digest": "d" * 64,
    "choices": [
        {"name": "width", "values": [1, 2, 3, 4], "validity": "T1"},
        {"name": "kind", "values": ["a", "b"], "validity": "T2"},
    ],
    "base_point": {"width": 3, "kind": "a"},
}


def open_trials(folder: Path, **changes: Any) -> Trials:
    settings: dict[str, Any] = {"sampler": "nsga2", "seed": 1, "violations": lambda point: [0.0]}
    described = {**DESCRIBED, **changes.pop("described", {})}
    targets = changes.pop("targets", ("cpu", "tpu"))
    return Trials(folder, described, targets, **{**settings, **changes})


def test_trials_are_asked_told_and_read_again(tmp_path: Path) -> None:
    trials = open_trials(tmp_path)
    asked = trials.ask(3)
    assert len({number for number, _ in asked}) == 3
    for number, point in asked:
        assert point["width"] in (1, 2, 3, 4)
        assert point["kind"] in ("a", "b")
        trials.tell(number, [1.0, 2.0])
    trials.close()
    again = open_trials(tmp_path)
    assert [(number, point) for number, point, _ in again.finished()] == asked
    assert {values for _, _, values in again.finished()} == {(1.0, 2.0)}
    again.close()


def test_trials_begin_with_each_change_of_the_base_alone(tmp_path: Path) -> None:
    trials, beside = open_trials(tmp_path), open_trials(tmp_path)
    points = [point for _, point in (*trials.ask(2), *beside.ask(2))]
    assert sorted((point["width"], point["kind"]) for point in points) == [
        (1, "a"),
        (2, "a"),
        (3, "b"),
        (4, "a"),
    ]
    trials.close()
    beside.close()
    # What random search is compared with is random from the first point on.
    points = []
    for seed in (1, 2):
        trials = open_trials(tmp_path / str(seed), sampler="random", seed=seed)
        points.append([point for _, point in trials.ask(4)])
        trials.close()
    assert points[0] != points[1]


def test_trials_of_a_living_process_are_its_own(tmp_path: Path) -> None:
    one, two = open_trials(tmp_path), open_trials(tmp_path)
    first = one.ask(2)
    second = two.ask(2)
    assert not {number for number, _ in first} & {number for number, _ in second}
    one.close()
    # Its process is gone, as far as others can tell: they take over what it left.
    third = two.ask(3)
    assert third[:2] == first
    assert third[2][0] not in {number for number, _ in (*first, *second)}
    two.close()


def test_trials_of_a_killed_process_are_taken_over_once(tmp_path: Path) -> None:
    script = (
        "import sys, time, json; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "from test_search import open_trials\n"
        "print(json.dumps(open_trials(Path(sys.argv[1])).ask(2)), flush=True); time.sleep(600)\n"
    )
    folder = str(Path(__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), folder], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    left = json.loads(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    trials = open_trials(tmp_path)
    taken = trials.ask(2)
    assert [[number, point] for number, point in taken] == left
    assert not {number for number, _ in trials.ask(2)} & {number for number, _ in taken}
    trials.close()


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"targets": ("cpu",)}, "targets"), ({"described": {"digest": "e" * 64}}, "space")],
)
def test_trials_of_another_search_are_refused(
    tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    open_trials(tmp_path).close()
    with pytest.raises(UsageError, match=f"holds a search with another {what}"):
        open_trials(tmp_path, **changes)


@pytest.mark.parametrize(
    ("most", "slack", "chosen"),
    [
        (4, 0.06, ["middle", "left", "right", "beaten"]),
        (4, 0.0, ["middle", "left", "right"]),
        (1, 0.06, ["middle", "left", "right"]),
        (9, 9.0, ["middle", "left", "right", "beaten"]),
    ],
)
def test_what_is_compiled_whole_is_the_front_and_what_is_near(
    most: int, slack: float, chosen: list[str]
) -> None:
    assert choose_near_front(TIMES, base="base", most=most, slack=slack) == chosen


# One small search by the command line, with the real compilers.


def search(out: Path, cache: Path, *more: object) -> tuple[int, str, str]:
    return jaxbench(
        "search", FILE, "--targets", "cpu,tpu-v5e", "--budget", 8, "--sample", 5, "--whole", 2,
        "--seed", 1, "--bound", "60%", "--json", "--out", out, *more, cache=cache,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("search")
    code, stdout, stderr = search(out, shared_cache)
    assert (code, stderr) == (0, "")
    return out, json.loads(stdout)


def test_search_prices_networks_within_the_bands(found: tuple[Path, Any]) -> None:
    _, values = found
    base = values["networks"][0]
    assert base["name"] == values["base"] == "pair-cpu-base"
    networks = values["networks"][1:]
    assert len({one["name"] for one in networks}) == len(networks) == 8
    for one in networks:
        ratio = one["quantities"]["num_params"] / base["quantities"]["num_params"]
        assert 0.2 <= ratio <= 1.2
        assert set(one["composed_s"]) == {"cpu", "tpu-v5e"}
        assert one["point"]["kind"] != "broken"
    assert values["num_points"] == 48
    # The fastest with one change, with two, each no slower than any other with as many.
    point = base["point"]
    changes = {
        one["name"]: sum(one["point"][name] != point[name] for name in point) for one in networks
    }
    times = {one["name"]: math.prod(one["composed_s"].values()) for one in networks}
    for name in values["few_changes"]:
        assert times[name] == min(times[one] for one in times if changes[one] == changes[name])
    assert [changes[name] for name in values["few_changes"]] == sorted(set(changes.values()))


def test_search_compiles_the_front_whole_and_writes_its_candidates(
    found: tuple[Path, Any], shared_cache: Path, tmp_path: Path
) -> None:
    out, values = found
    whole = values["whole_s"]
    assert {"pair-cpu-base", *values["front"]} == set(whole)
    assert set(values["whole_front"]) <= set(whole)
    assert {Path(file).stem for file in values["files"]} == {
        *values["front"],
        *values["few_changes"],
    }
    # What is no further from the front than composed steps are off is compiled whole too.
    times = {one["name"]: one["composed_s"] for one in values["networks"]}
    slack = max(abs(error) for one in values["composition"].values() for error in one["errors"])
    near = set(pareto_front(times, slack=slack)) - {"pair-cpu-base"}
    assert set(values["front"]) <= near
    assert len(values["front"]) >= min(2, len(near))
    # The file is a candidate like any other: the same program, so nothing is compiled again.
    file, name = values["files"][0], values["front"][0]
    code, stdout, stderr = jaxbench(
        "run", file, "--targets", "cpu", "--json", "--out", tmp_path, cache=shared_cache
    )
    assert (code, stderr) == (0, "")
    (record,) = [one for one in json.loads(stdout)["records"] if one["candidate"] == name]
    step_s = record["prediction"]["step_s"] / record["workload"]["global_batch"]
    assert step_s == pytest.approx(whole[name]["cpu"], rel=1e-9)
    assert (out / "records.jsonl").exists()


def test_search_again_does_nothing_twice(found: tuple[Path, Any], shared_cache: Path) -> None:
    out, values = found
    before = (out / "records.jsonl").read_bytes()
    code, stdout, stderr = search(out, shared_cache)
    again = json.loads(stdout)
    assert (code, stderr) == (0, "")
    assert (out / "records.jsonl").read_bytes() == before
    assert again["blocks_compiled"] == 0
    assert again["num_trials"] == values["num_trials"]
    for name in ("front", "networks", "whole_s"):
        assert again[name] == values[name]


def test_search_times_its_front_where_a_target_is_attached(
    found: tuple[Path, Any], shared_cache: Path, tmp_path: Path
) -> None:
    copy, values = tmp_path / "timed", found[1]
    shutil.copytree(found[0], copy)
    page = tmp_path / "page.md"
    more = ("--measure", "--measure-s", 2, "--page", page)
    code, stdout, stderr = search(copy, shared_cache, *more)
    assert (code, stderr) == (0, "")
    timed = json.loads(stdout)
    assert timed["front"] == values["front"]
    assert {one["second"] for one in timed["measured"]} == set(values["front"])
    for one in timed["measured"]:
        assert (one["first"], one["target"]) == ("pair-cpu-base", "cpu")
        assert [ratio["low"] for ratio in one["ratios"] if ratio["signal"] == "measured"]
    text = page.read_text()
    assert "and measured on cpu" in text
    composed = {one["name"]: one["composed_s"] for one in timed["networks"]}
    whole = {name: timed["whole_s"][name] for name in timed["front"]}
    for target in ("cpu", "tpu-v5e"):
        errors = [composed[name][target] / whole[name][target] - 1 for name in whole]
        (row,) = [
            row for row in text.splitlines() if row.startswith(f"| {target} |") and "blocks" in row
        ]
        assert f"| {max(errors, key=abs):+.1%} | blocks |" in row
    before = (copy / "records.jsonl").read_bytes()
    assert search(copy, shared_cache, *more)[0] == 0
    assert (copy / "records.jsonl").read_bytes() == before, "timed once"


def test_search_killed_goes_on_and_loses_nothing(shared_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = start_jaxbench(
        "search", FILE, "--targets", "cpu", "--budget", 12, "--sample", 4, "--whole", 1,
        "--bound", "60%", "--json", "--out", out, cache=shared_cache,
    )  # fmt: skip
    journal = out / "journal.log"
    wait_for(
        lambda: journal.exists() and journal.read_bytes().count(b'"owner"') >= 4, timeout_s=120
    )
    time.sleep(0.3)
    os.kill(command.process.pid, signal.SIGKILL)
    command.finish()
    code, stdout, stderr = jaxbench(
        "search", FILE, "--targets", "cpu", "--budget", 12, "--sample", 4, "--whole", 1,
        "--bound", "60%", "--json", "--out", out, cache=shared_cache,
    )  # fmt: skip
    assert (code, stderr) == (0, "")
    values = json.loads(stdout)
    assert len(values["networks"]) == 13
    told = [
        json.loads(line)["trial_id"]
        for line in journal.read_text().splitlines()
        if json.loads(line).get("values") is not None
    ]
    assert len(told) == len(set(told)) == values["num_trials"]


def changed_space(folder: Path, *changes: tuple[str, str]) -> Path:
    """The space with some of its text replaced."""
    text = FILE.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file = folder / "changed.py"
    file.write_text(text)
    return file


def test_search_without_blocks_compiles_every_network_whole_and_goes_on(
    shared_cache: Path, tmp_path: Path
) -> None:
    file = changed_space(tmp_path, ("    blocks=blocks,\n", ""))
    call = (
        "search", file, "--targets", "cpu", "--budget", 4, "--sample", 1, "--whole", 1, "--json",
        "--out", tmp_path / "out",
    )  # fmt: skip
    code, stdout, stderr = jaxbench(*call, cache=shared_cache)
    assert (code, stderr) == (0, "")
    values = json.loads(stdout)
    assert len(values["networks"]) == 5
    for one in values["networks"]:
        if one["name"] in values["whole_s"]:
            assert one["composed_s"] == values["whole_s"][one["name"]]
    assert (values["composition"], values["blocks_compiled"]) == ({}, 0)
    records = (tmp_path / "out" / "records.jsonl").read_bytes()
    code, stdout, stderr = jaxbench(*call, cache=shared_cache)
    assert (code, stderr) == (0, "")
    again = json.loads(stdout)
    assert (tmp_path / "out" / "records.jsonl").read_bytes() == records
    assert (again["networks"], again["refusals"]) == (values["networks"], values["refusals"])


def test_search_whose_blocks_do_not_compile_says_so_and_compiles_whole(
    shared_cache: Path, tmp_path: Path
) -> None:
    picky = (
        "class Picky(Last):\n"
        "    def __call__(self, x):\n"
        "        if jax.sharding.get_abstract_mesh().shape:\n"
        "            raise ValueError('no mesh wanted')\n"
        "        return super().__call__(x)\n\n\n"
        "def blocks(candidate"
    )
    file = changed_space(
        tmp_path, ("def blocks(candidate", picky), ("        build=Last,", "        build=Picky,")
    )
    code, stdout, stderr = jaxbench(
        "search", file, "--targets", "cpu", "--budget", 2, "--sample", 1, "--whole", 1, "--json",
        "--out", tmp_path / "out", cache=shared_cache,
    )  # fmt: skip
    assert (code, stderr) == (0, "")
    values = json.loads(stdout)
    assert len(values["networks"]) == 3
    assert values["composition"]["cpu"]["errors"] == []
    assert values["whole_targets"]["cpu"].startswith("no block: last on cpu: ")
    assert "no mesh wanted" in values["whole_targets"]["cpu"]


def test_search_band_on_the_forward_pass_keeps_networks_within_it(
    shared_cache: Path, tmp_path: Path
) -> None:
    band = 'bands=(Band("num_params", 0.2, 1.2), Band("forward_s", 0.0, 0.6))'
    file = changed_space(tmp_path, ('bands=(Band("num_params", 0.2, 1.2),)', band))
    code, stdout, stderr = jaxbench(
        "search", file, "--targets", "cpu", "--budget", 4, "--sample", 5, "--whole", 1, "--json",
        "--bound", "60%", "--seed", 3, "--out", tmp_path / "out", cache=shared_cache,
    )  # fmt: skip
    assert (code, stderr) == (0, "")
    values = json.loads(stdout)
    assert len(values["networks"]) == 5
    base = values["networks"][0]["quantities"]["forward_flops"]
    for one in values["networks"][1:]:
        # A product here takes time by its FLOPs or by its weights' bytes: both are fewer.
        assert one["quantities"]["forward_flops"] < base
    assert values["refusals"]["a block does not compile, or forward_s is out of band"] > 0


def test_search_whose_cache_is_gone_keeps_what_was_told(
    found: tuple[Path, Any], tmp_path: Path
) -> None:
    out, values = found
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    code, stdout, stderr = search(copy, tmp_path / "empty")
    assert (code, stderr) == (0, "")
    again = json.loads(stdout)
    assert again["num_trials"] == values["num_trials"]
    names = ("name", "composed_s")
    told = [[one[name] for name in names] for one in values["networks"][1:]]
    assert [[one[name] for name in names] for one in again["networks"][1:]] == told


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ('bands=(Band("num_params", 50.0),)', "has no valid point among"),
        ('bands=(Band("num_params", 2.0), Band("num_params", 0.0, 1.0))', "contradict each other"),
    ],
)
def test_search_of_a_space_that_cannot_be_says_why(
    shared_cache: Path, tmp_path: Path, change: str, says: str
) -> None:
    file = changed_space(tmp_path, ('bands=(Band("num_params", 0.2, 1.2),)', change))
    code, stdout, stderr = jaxbench(
        "search", file, "--targets", "cpu", "--out", tmp_path / "out", cache=shared_cache
    )
    assert (code, stdout) == (2, "")
    assert says in error_line(stderr)


def test_search_unknown_space_names_those_there_are(shared_cache: Path, tmp_path: Path) -> None:
    code, _, stderr = jaxbench("search", "roads", "--out", tmp_path, cache=shared_cache)
    assert code == 2
    assert "Unknown space 'roads'. Shipped: bev, decoder" in error_line(stderr)
