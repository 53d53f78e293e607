"""Trials in an Optuna journal: asked for, told, shared by processes, none lost or done twice.

Every process holds the lock of a file named by its token, for as long as it lives. A trial belongs
to the process that asked for it; those of a process whose lock is free are taken over by the next
one that looks.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxbench.cache import storage_errors
from jaxbench.errors import UsageError

SamplerName = Literal["nsga2", "tpe", "random"]
WORST_S = 1e9  # told for what has no price
_POPULATION = 100
_MUTATED = 2.0  # choices of a child, on average: with one, half of all children are known already


class Trials:
    """The trials of one search in a folder."""

    def __init__(
        self,
        folder: Path,
        described: Mapping[str, Any],
        targets: Sequence[str],
        *,
        sampler: SamplerName,
        seed: int | None,
        violations: Callable[[Mapping[str, Any]], Sequence[float]],
    ) -> None:
        """Opens the journal of `folder`, or begins it.

        Raises:
          UsageError: if the folder holds the search of another space or of other targets.
        """
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._folder = folder
        _check_same(folder, {"space": described["digest"], "targets": list(targets)})
        self._choices = described["choices"]
        self._distributions = {
            choice["name"]: _distribution(choice["values"]) for choice in self._choices
        }
        journal = str(folder / "journal.log")
        storage = optuna.storages.JournalStorage(
            JournalFileBackend(journal, lock_obj=JournalFileOpenLock(journal))
        )
        self._study = optuna.create_study(
            storage=storage,
            study_name=described["name"],
            directions=[optuna.study.StudyDirection.MINIMIZE for _ in targets],
            load_if_exists=True,
            sampler=_sampler(
                sampler,
                len(self._choices),
                seed,
                lambda trial: violations(self._point(trial.params)),
            ),
        )
        self._token, self._held = secrets.token_hex(8), None
        self._hold()
        if sampler != "random":
            self._begin_near(described["base_point"])

    def ask(self, most: int) -> list[tuple[int, dict[str, Any]]]:
        """Returns (number, point) of up to `most` trials: first those that their process left."""
        with self._alone():
            taken = self._orphans()[:most]
            for number, _ in taken:
                self._study.set_user_attr(f"owner of {number}", self._token)
            while len(taken) < most:
                trial = self._study.ask(self._distributions)
                trial.set_user_attr("owner", self._token)
                taken.append((trial.number, self._point(trial.params)))
        return taken

    def tell(self, number: int, values: Sequence[float] | None) -> None:
        """Keeps seconds of a sample by target, or that a trial has none."""
        values = [WORST_S] * len(self._study.directions) if values is None else values
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constraints are experimental in Optuna
            self._study.tell(number, list(values))

    def finished(self) -> list[tuple[int, dict[str, Any], tuple[float, ...] | None]]:
        """Returns (number, point, values) of all trials told, None where a trial has none."""
        return [
            (
                trial.number,
                self._point(trial.params),
                tuple(trial.values) if trial.values[0] < WORST_S else None,
            )
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state.is_finished() and trial.values
        ]

    def enqueue(self, points: Iterable[Mapping[str, Any]]) -> None:
        """Puts points before those that the sampler draws; it learns from them as from its own."""
        for point in points:
            self._study.enqueue_trial(
                {
                    choice["name"]: list(choice["values"]).index(point[choice["name"]])
                    for choice in self._choices
                }
            )

    def _begin_near(self, base: Mapping[str, Any]) -> None:
        """Puts first, once, the base with each choice changed alone: what every change buys."""
        with self._alone():
            if not self._study.get_trials(deepcopy=False):
                self.enqueue(changed_from(base, self._choices))

    def _orphans(self) -> list[tuple[int, dict[str, Any]]]:
        import optuna

        running = [
            trial
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state == optuna.trial.TrialState.RUNNING
        ]
        claims, found = self._study.user_attrs, []
        for trial in running:
            owner = claims.get(f"owner of {trial.number}", trial.user_attrs.get("owner"))
            if owner == self._token or (owner and self._is_alive(owner)):
                continue
            if len(trial.params) < len(self._distributions):  # killed while it was drawn
                self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            else:
                found.append((trial.number, self._point(trial.params)))
        return found

    def _point(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {
            choice["name"]: choice["values"][int(params[choice["name"]])]
            for choice in self._choices
        }

    def _hold(self) -> None:
        path = self._owner_path(self._token)
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._held = path.open("w")
        fcntl.flock(self._held, fcntl.LOCK_EX)

    def _is_alive(self, owner: str) -> bool:
        try:
            with self._owner_path(owner).open("r") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def close(self) -> None:
        """Gives up what this process has asked for and not told."""
        if self._held:
            self._held.close()
            self._owner_path(self._token).unlink(missing_ok=True)
            self._held = None

    def _owner_path(self, token: str) -> Path:
        return self._folder / "owners" / token

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        path = self._folder / "owners" / "ask.lock"
        with storage_errors(path), path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def changed_from(
    point: Mapping[str, Any], choices: Sequence[Mapping[str, Any]], num_changes: int = 1
) -> Iterator[dict[str, Any]]:
    """Yields the points that differ from one in so many choices."""
    for changed in itertools.combinations(choices, num_changes):
        others = [
            [value for value in choice["values"] if value != point[choice["name"]]]
            for choice in changed
        ]
        for values in itertools.product(*others):
            yield {**point, **dict(zip((one["name"] for one in changed), values, strict=True))}


def _distribution(values: Sequence[Any]) -> Any:
    """Places among the values: ordered where they are numbers, else without order."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    numbers = all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )
    if numbers and len(values) > 1 and list(values) == sorted(values):
        return IntDistribution(0, len(values) - 1)
    return CategoricalDistribution(list(range(len(values))))


def _sampler(
    name: SamplerName, num_choices: int, seed: int | None, violations: Callable[[Any], Any]
) -> Any:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constraints are experimental in Optuna
        if name == "nsga2":
            return optuna.samplers.NSGAIISampler(
                population_size=_POPULATION,
                mutation_prob=min(1.0, _MUTATED / num_choices),
                seed=seed,
                constraints_func=violations,
            )
        if name == "tpe":
            return optuna.samplers.TPESampler(
                seed=seed, multivariate=True, constraints_func=violations
            )
        return optuna.samplers.RandomSampler(seed=seed)


def _check_same(folder: Path, asked: Mapping[str, Any]) -> None:
    path = folder / "search.json"
    with storage_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(asked))
            return
    kept = json.loads(path.read_text())
    for what, value in asked.items():
        if kept.get(what) != value:
            raise UsageError(
                f"{folder} holds a search with another {what}: {_short(kept.get(what))}, now "
                f"{_short(value)}. Give another --out, or remove that folder."
            )


def _short(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)[:12]
