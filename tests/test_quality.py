"""The verdict's protocol with a fake trainer, and the real trainer on the data that ships."""

import dataclasses
import json
import math
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import error_line, jaxbench, shared_cache
from flax import nnx

from jaxbench.discovery import describe_candidates, load_described
from jaxbench.errors import DataError, Failure, UsageError
from jaxbench.lines import read_lines
from jaxbench.models import bev, planner
from jaxbench.quality import bench, protocol_worker, training
from jaxbench.quality.judged import Judged, Plan
from jaxbench.quality.protocol import judge, judge_named
from jaxbench.quality.protocol_worker import describe_task, output_shapes
from jaxbench.quality.runs import RUNS
from jaxbench.quality.shards import packaged_folder, read_data
from jaxbench.quality.static import check_rewrite
from jaxbench.quality.tasks import find_task, fit_to_data
from jaxbench.quality.tokens import draw_tokens
from jaxbench.report.quality import quality_tables
from jaxbench.run import Limits

__all__ = ["shared_cache"]
DATA = packaged_folder()
NAMES = {one["name"]: one for one in describe_candidates(["jaxbench.models.bev"])}
BASE, REWRITE = NAMES["bev-drive-gather"], NAMES["bev-drive-product"]
THIN, FLAT = NAMES["bev-drive-thin"], NAMES["bev-drive-flat"]
QUICK = Limits(num_workers=1)


class FakeTrainer:
    """Stands for workers: metrics are a network's level and a noise that pairs share in part."""

    def __init__(self, levels: dict[str, float], *, noise: float = 0.002) -> None:
        self.levels, self.noise, self.num_runs = levels, noise, 0
        self.diverging: set[tuple[str, int]] = set()
        self.digest = "a" * 64
        self.is_exact, self.drives = True, False

    def __call__(self, jobs: list[Any], *, num_workers: int) -> Iterator[tuple[Any, Any]]:
        for job in jobs:
            function = job.function.rpartition(":")[2]
            yield job, getattr(self, function)(**job.arguments)

    def describe_task(self, **_: Any) -> dict[str, Any]:
        task = {"task": "map", "metric": "IoU", "drives": self.drives}
        return {**task, "data_digest": self.digest}

    def output_shapes(self, **_: Any) -> list[list[int]]:
        return [[], [], []]

    def check_rewrite(self, **_: Any) -> dict[str, Any]:
        return {"exact": self.is_exact, "reason": "loss within 1e-7"}

    def train_network(
        self,
        *,
        described: Any,
        seeds: list[int],
        learning_rate: float,
        rollout: Any = None,
        **_: Any,
    ) -> list[dict[str, Any]]:
        name = described["name"].removesuffix("-half")
        half = 0.2 if described["name"].endswith("-half") else 0.0
        rate = described["workload"]["learning_rate"]
        tuned = 0.0 if math.isclose(learning_rate, 2 * rate) else 0.01
        runs = []
        for seed in seeds:
            self.num_runs += 1
            shared = random.Random(seed).gauss(0, 10 * self.noise)
            own = random.Random(f"{described['name']} {seed}").gauss(0, self.noise)
            metric = self.levels.get(name, 0.8) - half * self.levels.get("damage", 1) - tuned
            diverged = (described["name"], seed) in self.diverging
            value = None if diverged else metric + shared + own
            curve = [] if diverged else [[100, metric - 0.3], [200, value]]
            runs.append(
                {"seed": seed, "metric": value, "curve": curve, "diverged": diverged, "seconds": 1}
            )
            if rollout:
                driven = {"completion": metric + shared, "crashed": 0.25}
                runs[-1]["rollout"] = None if diverged else driven
        return runs


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> FakeTrainer:
    fake = FakeTrainer({"bev-drive-gather": 0.8})
    monkeypatch.setattr(bench, "run_jobs", fake)
    return fake


def run(out: Path, *variants: Any, rewrite: Any = REWRITE, **plan: Any) -> Judged:
    return judge(
        BASE,
        variants,
        rewrite=rewrite,
        data=DATA,
        out=out,
        plan=Plan(**plan),
        limits=QUICK,
        progress=lambda *_: None,
    )


def words(judged: Judged) -> dict[str, str]:
    return {verdict.name: verdict.word for verdict in judged.verdicts}


def test_judge_tells_equal_from_worse_and_from_open(trainer: FakeTrainer, tmp_path: Path) -> None:
    trainer.levels.update({THIN["name"]: 0.8, FLAT["name"]: 0.72})
    early = NAMES["bev-drive-early"]
    trainer.levels[early["name"]] = 0.8 - 0.05
    judged = run(tmp_path, THIN, FLAT, early)
    assert judged.complaint == ""
    assert judged.margin == pytest.approx(0.05, abs=0.003)  # a quarter of 0.2
    found = words(judged)
    assert found[THIN["name"]] == "equivalent"
    assert found[FLAT["name"]] == "inferior"
    assert found[early["name"]] in ("inconclusive", "inferior")
    assert found["bev-drive-gather-half"] == "inferior"
    assert found[REWRITE["name"]] in ("equivalent", "non-inferior")
    # Twice the base's rate is best for all, and all were given the same three.
    assert {verdict.learning_rate for verdict in judged.verdicts} <= {16e-3, None}


def test_judge_exact_rewrite_is_valid_without_training(
    trainer: FakeTrainer, tmp_path: Path
) -> None:
    judged = run(tmp_path, REWRITE)
    assert words(judged) == {REWRITE["name"]: "exact"}
    assert trainer.num_runs == 0


def test_judge_screens_out_what_is_far_worse_and_does_not_confirm_it(
    trainer: FakeTrainer, tmp_path: Path
) -> None:
    trainer.noise = 0.0005
    trainer.levels[THIN["name"]] = 0.5
    judged = run(tmp_path, THIN)
    verdict = judged.verdicts[0]
    assert (verdict.word, verdict.paired) == ("inferior", None)
    assert verdict.reason.startswith("screened out: 0.")
    runs = [one for one in list(read_lines(tmp_path / RUNS)) if one["network"] == THIN["name"]]
    assert len(runs) == 3


def test_judge_run_that_diverges_counts_as_infinitely_bad(
    trainer: FakeTrainer, tmp_path: Path
) -> None:
    trainer.diverging = {(THIN["name"], 3)}
    judged = run(tmp_path, THIN)
    verdict = judged.verdicts[0]
    assert (verdict.word, verdict.reason) == ("inferior", "1 of 6 runs diverged")


@pytest.mark.parametrize(
    ("damage", "rewrite", "says"),
    [
        (-0.1, REWRITE, "half width.* was no worse"),
        (0.004, REWRITE, "was not found inferior|was not found non-inferior"),
        (1.0, None, "no exact rewrite"),
    ],
)
def test_judge_whose_controls_fail_says_nothing(
    trainer: FakeTrainer, tmp_path: Path, damage: float, rewrite: Any, says: str
) -> None:
    trainer.levels["damage"] = damage
    judged = run(tmp_path, THIN, rewrite=rewrite)
    assert re.search(says, judged.complaint)
    assert words(judged)[THIN["name"]] == "the test cannot tell"


def test_judge_rewrite_that_is_none_is_no_control_and_is_trained(
    trainer: FakeTrainer, tmp_path: Path
) -> None:
    trainer.is_exact = False
    judged = run(tmp_path, REWRITE)
    (verdict, *_) = judged.verdicts
    assert (verdict.word, judged.verdicts[-1].role) == ("the test cannot tell", "negative control")
    assert verdict.reason.startswith("no exact rewrite: loss within 1e-7; ")
    assert "bev-drive-product is declared an exact rewrite: loss" in judged.complaint


def test_judge_control_or_base_that_diverges_gives_no_verdict(
    trainer: FakeTrainer, tmp_path: Path
) -> None:
    trainer.diverging = {("bev-drive-gather", seed) for seed in (1, 2)}
    with pytest.raises(DataError, match="The base bev-drive-gather diverged in 2 of 6 runs"):
        run(tmp_path / "base", THIN)
    trainer.diverging = {("bev-drive-gather-half", 2)}
    judged = run(tmp_path / "control", THIN)
    assert "(half width) diverged in 1 runs: no margin follows" in judged.complaint
    assert words(judged)[THIN["name"]] == "the test cannot tell"


@pytest.mark.parametrize(
    ("plan", "says"), [({"pairs": 1}, "--pairs 2 or more"), ({"margin": 0.0}, "positive --margin")]
)
def test_plan_that_cannot_tell_anything_is_refused(plan: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Plan(**plan)


def test_judge_again_trains_nothing_and_more_pairs_only_what_is_missing(
    trainer: FakeTrainer, tmp_path: Path
) -> None:
    first = run(tmp_path, THIN, pairs=4)
    done = trainer.num_runs
    assert run(tmp_path, THIN, pairs=4) == first
    assert trainer.num_runs == done
    run(tmp_path, THIN, pairs=5)
    assert trainer.num_runs == done + 4  # base, half width, rewrite, variant


def test_judge_lets_confirmed_planners_drive_and_compares_pairs(
    trainer: FakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "simulator_python", lambda progress: Path("python"))
    with pytest.raises(DataError, match="--rollout asks networks that plan .* is map"):
        run(tmp_path, FLAT, rollout=3)
    trainer.drives = True
    trainer.levels[FLAT["name"]] = 0.79
    run(tmp_path, FLAT)
    before = trainer.num_runs
    judged = run(tmp_path, FLAT, rollout=3)
    # Runs that did not drive are done once more, screening is not.
    assert trainer.num_runs == before + 4 * 6
    run(tmp_path, FLAT, rollout=3)
    assert trainer.num_runs == before + 4 * 6
    (table,) = (one for one in quality_tables([judged]) if one.title.startswith("Closed loop"))
    rows = {row[0]: row for row in table.rows}
    assert rows[BASE["name"]][-1] == "-"
    assert rows[FLAT["name"]][-1].startswith("-1.0% [-1.0%, -1.0%]")
    assert rows[FLAT["name"]][2] == "25.0%"
    assert "of 3 scenes" in table.notes[0]


def test_judge_on_other_data_than_the_runs_is_refused(trainer: FakeTrainer, tmp_path: Path) -> None:
    run(tmp_path, THIN, pairs=2)
    trainer.digest = "b" * 64
    with pytest.raises(DataError, match="holds runs on data aaaaaaaaaaaa, and this is data bbb"):
        run(tmp_path, THIN, pairs=2)


def test_judge_training_that_fails_is_one_line_and_keeps_what_was_done(
    trainer: FakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer.train_network

    def fail(**arguments: Any) -> Any:
        if arguments["described"]["name"] == THIN["name"]:
            return Failure(stage="worker", error="Crash", text="worker ended with SIGKILL")
        return whole(**arguments)

    monkeypatch.setattr(trainer, "train_network", fail)
    with pytest.raises(DataError, match="bev-drive-thin with seeds .* SIGKILL"):
        run(tmp_path, THIN, pairs=2)
    assert list(read_lines(tmp_path / RUNS))


def test_judge_at_several_scales_says_how_the_damage_goes(
    trainer: FakeTrainer, tmp_path: Path
) -> None:
    trainer.levels[THIN["name"]] = 0.8 - 0.02
    small, large = judge_named(
        BASE["name"],
        [THIN["name"]],
        files=(),
        data=DATA,
        out=tmp_path,
        plan=Plan(),
        limits=QUICK,
        progress=lambda *_: None,
        scales=(0.5, 1.0),
    )
    assert (small.base, large.base) == ("bev-drive-gather-x0.5", BASE["name"])
    assert words(small)["bev-drive-thin-x0.5"] == "equivalent"
    table = next(one for one in quality_tables((small, large)) if "by scale" in one.title)
    assert table.rows[0][0] == "bev-drive-thin-x0.5"
    assert table.rows[0][3].startswith("grows: +0.")
    with pytest.raises(UsageError, match="A scale of 0 leaves no network"):
        judge_named(
            BASE["name"],
            [THIN["name"]],
            files=(),
            data=DATA,
            out=tmp_path,
            plan=Plan(),
            limits=QUICK,
            progress=lambda *_: None,
            scales=(0.0,),
        )


# The real trainer and data.


@pytest.fixture(scope="module")
def frames() -> Any:
    return read_data(DATA)


def test_packaged_data_is_small_and_scenes_are_not_shared(frames: Any) -> None:
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 16 * 2**20
    assert not set(frames.train["scene"]) & set(frames.test["scene"])
    assert len(frames.train["scene"]) > 500
    road = frames.train["drivable"].mean()
    assert 0.05 < road < 0.6
    assert 0.001 < frames.train["vehicles"].mean() < 0.1
    # The ego vehicle stands on the road, in the middle of the map.
    assert frames.train["drivable"][:, 31:33, 31:33].mean() > 0.9


def _bases() -> dict[str, Any]:
    found = {}
    for family in ("bev", "pull", "occupancy", "forecast", "planner", "decoder"):
        for one in describe_candidates([f"jaxbench.models.{family}"]):
            if one["size"] == "cpu" and one["validity"] == "base":
                found.setdefault(family, one)
    return found


BASES = _bases()
TASKS = {
    "bev": "map",
    "pull": "map",
    "occupancy": "occupancy",
    "forecast": "forecast",
    "planner": "planning",
    "decoder": "tokens",
}


@pytest.mark.parametrize("family", sorted(TASKS))
def test_each_task_feeds_its_networks_and_scores_them(family: str, frames: Any) -> None:
    candidate = load_described(BASES[family])
    task = find_task(candidate)
    assert task.name == TASKS[family]
    fitted = fit_to_data(candidate, frames.train, frames.about)
    few = {name: array[:2] for name, array in frames.train.items()}
    batch = task.prepare(few, frames.about, fitted)
    shapes = {name: given.shape for name, given in fitted.workload.inputs}
    assert {name: array.shape[1:] for name, array in batch.items()} == shapes
    graph, params, rest = training.initial_parameters(fitted, fitted, 0)

    @jax.jit
    def both(params: Any, rest: Any, batch: Any) -> Any:
        module = nnx.merge(graph, params, rest)
        return fitted.loss(module, batch), task.score(module, batch)

    value, sums = both(params, rest, batch)
    assert math.isfinite(float(value))
    assert math.isfinite(task.finish({name: np.asarray(part) for name, part in sums.items()}))


def test_forecast_and_planner_paths_are_the_recorded_way(frames: Any) -> None:
    """What the networks rebuild from their inputs is where the ego vehicle went."""
    few = {name: array[:40] for name, array in frames.train.items()}
    for family in ("forecast", "planner"):
        candidate = fit_to_data(load_described(BASES[family]), frames.train, frames.about)
        batch = find_task(candidate).prepare(few, frames.about, candidate)
        if family == "forecast":
            velocity = batch["history"][:, 0, -1:, 2:4]
            path = np.cumsum(velocity + 0.1 * batch["walk"], axis=1)
            assert path == pytest.approx(few["way"][:, : path.shape[1], :2], abs=1e-3)
            continue
        edge = 64
        places, _, _ = planner.true_path(jnp.swapaxes(batch["path"], 0, 1), edge)
        cell_m = planner.EXTENT_M / edge
        forward = (planner.START * edge - np.asarray(places[..., 0])) * cell_m
        way = np.swapaxes(few["way"][:, : len(places)], 0, 1)
        # It drives along headings where the car slips a little: within half a metre.
        assert np.abs(forward - way[..., 0]).max() < 0.5


def test_check_rewrite_proves_a_rewrite_and_refuses_another_function() -> None:
    exact = check_rewrite(described=REWRITE, base=BASE, data=str(DATA))
    assert exact["exact"], exact["reason"]
    other = check_rewrite(described=THIN, base=BASE, data=str(DATA))
    assert not other["exact"]
    assert "no exact rewrite of it" in other["reason"]


def test_output_shapes_of_a_network_that_answers_another_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert describe_task(described=BASE, data=str(DATA))["task"] == "map"
    wanted = output_shapes(described=BASE, data=str(DATA))
    assert output_shapes(described=THIN, data=str(DATA)) == wanted

    class Cut(bev.BevNet):
        """Puts out a part of the cells."""

        part: Any = np.s_[:, ::2, ::2]

        def __call__(self, images: Any, edge: int) -> Any:
            return super().__call__(images, edge)[self.part]

    def load(described: Any) -> Any:
        return dataclasses.replace(
            load_described(described), build=lambda config, rngs: Cut(config, rngs=rngs)
        )

    monkeypatch.setattr(protocol_worker, "load_described", load)
    with pytest.raises(DataError, match="does not go with the labels of the task map"):
        output_shapes(described=BASE, data=str(DATA))
    # One column goes with any labels, as arrays broadcast; it is another question all the same.
    monkeypatch.setattr(Cut, "part", np.s_[:, :, :1])
    assert output_shapes(described=BASE, data=str(DATA)) == [[2, 64, 1]]
    assert wanted == [[2, 64, 64]]


def test_initial_parameters_are_shared_where_names_and_shapes_agree(frames: Any) -> None:
    base, thin = (
        fit_to_data(load_described(one), frames.train, frames.about) for one in (BASE, THIN)
    )
    own = dict(nnx.to_flat_state(training.initial_parameters(thin, base, 3)[1]))
    theirs = dict(nnx.to_flat_state(training.initial_parameters(base, base, 3)[1]))
    same = [path for path in own if own[path].shape == theirs[path].shape]
    assert len(same) > 0.8 * len(own)
    for path in same:
        np.testing.assert_array_equal(own[path][...], theirs[path][...])


def train(seeds: list[int], steps: int = 6, **more: Any) -> list[dict[str, Any]]:
    tiny = NAMES["bev-cpu-gather"]
    return training.train_network(
        described=tiny, base=tiny, data=str(DATA), seeds=seeds, learning_rate=3e-3,
        schedule={"steps": steps, "batch": 2, "checks": 2}, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    return train([1])[0]


def test_train_network_gives_a_curve_and_the_same_again(trained: dict[str, Any]) -> None:
    assert [samples for samples, _ in trained["curve"]] == [6, 12]
    assert trained["metric"] == trained["curve"][-1][1]
    assert 0 <= trained["metric"] <= 1
    assert not trained["diverged"]
    assert train([1])[0]["losses"] == trained["losses"]


def test_train_network_seeds_side_by_side_are_those_one_by_one(trained: dict[str, Any]) -> None:
    both = train([1, 2])
    assert [run["seed"] for run in both] == [1, 2]
    # One program for both orders its sums differently, in bfloat16.
    assert both[0]["losses"] == pytest.approx(trained["losses"], rel=0.05)
    assert both[0]["losses"] != both[1]["losses"]


def test_train_network_killed_goes_on_from_its_checkpoint(
    trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps_done = []
    whole = training._Run._batch

    def stop(self: Any, step: int) -> Any:
        steps_done.append(step)
        if len(steps_done) == 5:
            raise KeyboardInterrupt
        return whole(self, step)

    monkeypatch.setattr(training._Run, "_batch", stop)
    folder = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        train([1], checkpoints=str(folder))
    monkeypatch.setattr(training._Run, "_batch", whole)
    (again,) = train([1], checkpoints=str(folder))
    assert again["losses"] == trained["losses"]
    assert again["curve"] == trained["curve"]
    assert not folder.exists()


def test_tokens_repeat_phrases_and_are_the_same_for_a_seed() -> None:
    first = draw_tokens(np.arange(3), 300, vocab_size=256)
    assert first.shape == (3, 300)
    assert first.max() < 256
    np.testing.assert_array_equal(first, draw_tokens(np.arange(3), 300, vocab_size=256))
    assert (first[0] != first[1]).any()


def test_quality_command_on_exact_rewrites_and_bad_input(
    shared_cache: Path, tmp_path: Path
) -> None:
    out, page = tmp_path / "out", tmp_path / "page.md"
    code, stdout, stderr = jaxbench(
        "quality", "bev-drive-gather", "bev-drive-product", "--json", "--out", out,
        "--scales", "2,1", "--page", page, cache=shared_cache,
    )  # fmt: skip
    assert (code, stderr) == (0, "")
    values = json.loads(stdout)
    (verdict,) = values["verdicts"]
    assert (verdict["name"], verdict["word"]) == ("bev-drive-product", "exact")
    assert values["scales"] == [1, 2]
    assert [one["base"] for one in values["ladder"]] == ["bev-drive-gather", "bev-drive-gather-x2"]
    assert page.read_text().startswith("# Verdicts against bev-drive-gather\n")
    code, _, stderr = jaxbench("quality", "bev-cpu-segsum", "bev-cpu-none", cache=shared_cache)
    assert code == 2
    assert "No candidate 'bev-cpu-none'" in error_line(stderr)
    damaged = tmp_path / "damaged"
    shutil.copytree(DATA, damaged)
    path = damaged / "test-000.npz"
    path.write_bytes(path.read_bytes()[:-1])
    code, _, stderr = jaxbench(
        "quality", "bev-cpu-segsum", "bev-cpu-gather", "--data", damaged, "--out", out,
        cache=shared_cache,
    )  # fmt: skip
    assert code == 1
    assert "test-000.npz is damaged: its digest is" in error_line(stderr)
