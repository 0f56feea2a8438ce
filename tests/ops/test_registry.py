"""The ledger: whoever promotes at the same time, and wherever one of them dies, no champion has failed the gate."""

import itertools
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.ops.registry import BEST, CHALLENGER, CHAMPION, Registry, RegistryError
from pipeline.retrieval.gate import Verdict

NAMES = (f"model{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    """A database of its own: making its tables takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('registry') / 'mlflow.db'}"
    return MlflowClient(uri, registry_uri=uri)


@pytest.fixture(scope="module")
def run(client: MlflowClient, tmp_path_factory: pytest.TempPathFactory) -> str:
    experiment = client.create_experiment("e", tmp_path_factory.mktemp("artifacts").as_uri())
    return str(client.create_run(experiment).info.run_id)


@pytest.fixture
def registry(client: MlflowClient) -> Registry:
    return Registry(client, next(NAMES))


def publish(registry: Registry, run: str, folder: Path, quality: float) -> str:
    """A release that is no more than its list of files: nothing is opened here."""
    folder.mkdir(exist_ok=True)
    (folder / "SHA256SUMS").write_text(f"{quality}\n")
    return registry.publish(folder, lambda: run, {"quality": str(quality)})


def gate(registry: Registry, version: str) -> Callable[[str | None, str | None], tuple[Verdict, bool]]:
    """Passes what is not more than 1 worse than the champion and the best."""

    def quality(of: str) -> float:
        return float(registry.client.get_model_version(registry.name, of).tags["quality"])

    def judge(champion: str | None, best: str | None) -> tuple[Verdict, bool]:
        rivals = [quality(of) for of in (champion, best) if of is not None]
        return Verdict(all(quality(version) > rival - 1 for rival in rivals), "by quality"), quality(version) > max(
            rivals, default=-1
        )

    return judge


def promote(registry: Registry, version: str) -> bool:
    return registry.promote(version, gate(registry, version)).passed


def alias(registry: Registry, name: str) -> str:
    return str(registry.client.get_model_version_by_alias(registry.name, name).version)


def test_a_release_is_registered_once_and_promoted_if_it_passes(registry: Registry, run: str, tmp_path: Path) -> None:
    first = publish(registry, run, tmp_path, 5)
    assert publish(registry, run, tmp_path, 5) == first == alias(registry, CHALLENGER)
    with pytest.raises(RegistryError, match="has no `champion`; `smaller-student publish`"):
        registry.version_of(CHAMPION)
    assert promote(registry, first)
    assert promote(registry, first)  # again: nothing more to do
    worse = publish(registry, run, tmp_path, 3)
    assert not promote(registry, worse)
    assert [line.version for line in registry.ledger()] == [first]
    assert (alias(registry, CHAMPION), alias(registry, CHALLENGER)) == (first, worse)
    tags = registry.client.get_model_version(registry.name, worse).tags
    assert tags["gate"] == "failed"


def test_small_losses_do_not_add_up(registry: Registry, run: str, tmp_path: Path) -> None:
    versions = [publish(registry, run, tmp_path, quality) for quality in (5, 4.5, 4.2, 3.9)]
    assert [promote(registry, version) for version in versions] == [True, True, True, False]
    assert alias(registry, BEST) == versions[0]
    assert alias(registry, CHAMPION) == versions[2]


def test_rollback_goes_one_champion_back_each_time_and_keeps_the_withdrawn_out(
    registry: Registry, run: str, tmp_path: Path
) -> None:
    first, second, third = (publish(registry, run, tmp_path, quality) for quality in (5, 6, 7))
    assert promote(registry, first) and promote(registry, second)
    assert registry.roll_back() == (second, first)
    assert (alias(registry, CHAMPION), alias(registry, BEST)) == (first, first)
    with pytest.raises(RegistryError, match="no champion before"):
        registry.roll_back()
    assert not promote(registry, second)
    assert promote(registry, third)
    assert registry.roll_back() == (third, first)
    assert [line.action for line in registry.ledger()] == ["promote", "promote", "rollback", "promote", "rollback"]


def test_what_others_register_is_neither_a_promotion_nor_a_release(
    registry: Registry, run: str, tmp_path: Path
) -> None:
    first = publish(registry, run, tmp_path, 5)
    assert promote(registry, first)
    for tags in ({}, {"follows": "1"}, {"follows": "x", "version": "9", "best": "9", "action": "a", "reason": "r"}):
        registry.client.create_model_version(registry.ledger_name, tmp_path.as_uri(), run, tags)
    strange = registry.client.create_model_version(registry.name, tmp_path.as_uri(), run).version
    assert [line.version for line in registry.ledger()] == [first]
    assert promote(registry, publish(registry, run, tmp_path, 6))
    with pytest.raises(RegistryError, match=f"version {strange} of .* was not made by `smaller-student publish`"):
        registry.download(str(strange), tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


# --- two at once ------------------------------------------------------------------------------------------------------


class Died(BaseException):
    """A promoter was killed between two calls of MLflow."""


class Turns:
    """Lets one thread at a time make one call of MLflow, in a random order; some die before a call."""

    def __init__(self, seed: int, promoters: int) -> None:
        self._random = random.Random(seed)
        self._gates = [threading.Semaphore(0) for _ in range(promoters)]
        self._back = threading.Semaphore(0)
        self._dies = {
            number: self._random.randrange(3, 30) for number in range(promoters) if self._random.random() < 0.5
        }
        self._calls = [0] * promoters
        self.living = set(range(promoters))

    def take(self, number: int) -> None:
        """Wait for the turn."""
        self._back.release()
        self._gates[number].acquire()
        self._calls[number] += 1
        if self._calls[number] == self._dies.get(number):
            raise Died

    def run(self) -> None:
        """Let them take turns until all have ended."""
        for _ in range(len(self._gates)):
            self._back.acquire()
        while self.living:
            self._gates[self._random.choice(sorted(self.living))].release()
            self._back.acquire()

    def leave(self, number: int) -> None:
        """End."""
        self.living.discard(number)
        self._back.release()


class Slow:
    """MLflow's client, each of whose calls waits for its turn."""

    def __init__(self, client: MlflowClient, turns: Turns, number: int) -> None:
        self._client, self._turns, self._number = client, turns, number

    def __getattr__(self, name: str) -> Any:
        def call(*words: Any, **named: Any) -> Any:
            self._turns.take(self._number)
            return getattr(self._client, name)(*words, **named)

        return call


@pytest.mark.parametrize("seed", range(40))
def test_no_interleaving_of_two_promoters_makes_a_champion_that_failed(
    client: MlflowClient, run: str, tmp_path: Path, seed: int
) -> None:
    real = Registry(client, next(NAMES))
    first = publish(real, run, tmp_path, 5.0)
    assert promote(real, first)
    good = publish(real, run, tmp_path, 7.0)
    stale = publish(real, run, tmp_path, 4.5)  # passes against the first, fails once the good one is champion
    turns = Turns(seed, 2)
    errors: list[BaseException] = []

    def promoter(number: int, version: str) -> None:
        mine = Registry(Slow(client, turns, number), real.name)  # type: ignore[arg-type]
        try:
            mine.promote(version, gate(mine, version))
        except Died:
            pass
        except BaseException as error:
            errors.append(error)
        finally:
            turns.leave(number)

    def lawful() -> None:
        """Each champion passed against the one before it and the best until then; the alias was champion once."""
        lines = real.ledger()
        for before, line in itertools.pairwise(lines):
            verdict, _ = gate(real, line.version)(before.version, before.best)
            assert verdict.passed, lines
        assert alias(real, CHAMPION) in {line.version for line in lines}

    threads = [threading.Thread(target=promoter, args=pair) for pair in enumerate((good, stale))]
    for thread in threads:
        thread.start()
    turns.run()
    for thread in threads:
        thread.join()
    assert not errors
    lawful()
    real.show()  # whoever comes next
    assert alias(real, CHAMPION) == real.ledger()[-1].version
