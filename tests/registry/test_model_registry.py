"""However concurrent promoters interleave, and wherever one is killed, no champion has failed the promotion rule."""

import itertools
import random
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.files import Files
from pipeline.registry.errors import RegistryError
from pipeline.registry.lineage import BEST, CHALLENGER, CHAMPION
from pipeline.registry.model_registry import Decide, Registry
from pipeline.registry.policy import Decision
from pipeline.registry.upload import DIGEST, release_digest, upload_release
from pipeline.tracking.errors import TrackingError

NAMES = (f"model{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    """One database for all tests of this file, since creating its tables takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('registry') / 'mlflow.db'}"
    return MlflowClient(uri, registry_uri=uri)


@pytest.fixture(scope="module")
def run(client: MlflowClient, tmp_path_factory: pytest.TempPathFactory) -> str:
    experiment = client.create_experiment("e", tmp_path_factory.mktemp("artifacts").as_uri())
    return str(client.create_run(experiment).info.run_id)


@pytest.fixture
def registry(client: MlflowClient) -> Registry:
    return Registry(client, next(NAMES))


def release(folder: Path, quality: float) -> Path:
    """Write a release that consists of SHA256SUMS only."""
    folder.mkdir(exist_ok=True)
    (folder / "SHA256SUMS").write_text(f"{quality}\n")
    return folder


def quality(registry: Registry, version: str) -> float:
    return float(registry.client.get_model_version(registry.name, version).tags["quality"])


def promotion_rule(registry: Registry, own: float) -> Decide:
    """Pass a quality that is not more than 1 below that of champion and best."""

    def decide(champion: str | None, best: str | None) -> tuple[Decision, bool]:
        rivals = [quality(registry, version) for version in (champion, best) if version is not None]
        return Decision(all(own > rival - 1 for rival in rivals), "by quality"), own > max(rivals, default=-1)

    return decide


def publish(registry: Registry, run: str, folder: Path, own: float) -> tuple[str, bool]:
    """Publish a release; return its version, and whether it passed."""
    version, decision = registry.publish(
        release(folder, own), lambda: run, {"quality": str(own)}, promotion_rule(registry, own)
    )
    return version, decision.passed


def alias(registry: Registry, name: str) -> str | None:
    found = registry.client.get_registered_model(registry.name).aliases.get(name)
    return None if found is None else str(found)


def champions(registry: Registry) -> list[str]:
    return [promotion.version for promotion in registry.lineage().promotions]


def test_a_release_is_registered_once_and_promoted_if_it_passes(registry: Registry, run: str, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="has no `champion`; `smaller-student publish`"):
        registry.version_of(CHAMPION)
    assert publish(registry, run, tmp_path, 5) == ("1", True)
    assert publish(registry, run, tmp_path, 5) == ("1", True)  # again: nothing changes
    assert publish(registry, run, tmp_path, 3) == ("2", False)
    assert publish(registry, run, tmp_path, 3) == ("2", False)
    assert champions(registry) == ["1"]
    assert list(registry.lineage().versions) == ["1", "2"]
    assert (registry.version_of(CHAMPION), alias(registry, CHAMPION), alias(registry, CHALLENGER)) == ("1", "1", "2")
    tags = registry.client.get_model_version(registry.name, "2").tags
    assert (tags["gate"], tags["reason"], tags["replaces"]) == ("failed", "by quality", "1")


def test_small_losses_do_not_accumulate(registry: Registry, run: str, tmp_path: Path) -> None:
    passed = [publish(registry, run, tmp_path, own)[1] for own in (5, 4.5, 4.2, 3.9)]
    assert passed == [True, True, True, False]
    assert (alias(registry, BEST), registry.version_of(BEST)) == ("1", "1")
    assert alias(registry, CHAMPION) == "3"


def test_rollback_restores_the_previous_champion_and_withdrawn_versions_stay_out(
    registry: Registry, run: str, tmp_path: Path
) -> None:
    assert publish(registry, run, tmp_path, 5) == ("1", True)
    assert publish(registry, run, tmp_path, 6) == ("2", True)
    assert registry.roll_back() == (["2"], "1")
    assert (registry.version_of(CHAMPION), alias(registry, CHAMPION), alias(registry, BEST)) == ("1", "1", "1")
    with pytest.raises(RegistryError, match="no champion before"):
        registry.roll_back()
    assert publish(registry, run, tmp_path, 6) == ("2", False)
    third, passed = publish(registry, run, tmp_path, 7)
    fourth, passed_too = publish(registry, run, tmp_path, 8)
    assert passed and passed_too
    assert registry.roll_back() == ([fourth], third)
    assert registry.roll_back() == ([third], "1")
    assert (registry.version_of(CHAMPION), alias(registry, CHAMPION), alias(registry, BEST)) == ("1", "1", "1")
    actions = [promotion.action for promotion in registry.lineage().promotions]
    assert actions == ["promote", "promote", "rollback", "promote", "promote", "rollback", "rollback"]
    assert champions(registry) == ["1", "2", "1", third, fourth, third, "1"]
    assert registry.roll_back("2") == (["1"], "2")  # a user may decide otherwise
    assert registry.version_of(CHAMPION) == "2"


def test_a_failed_version_may_pass_after_a_rollback(registry: Registry, run: str, tmp_path: Path) -> None:
    publish(registry, run, tmp_path, 5)
    publish(registry, run, tmp_path, 6)
    failed, passed = publish(registry, run, tmp_path, 4.5)
    assert not passed
    with pytest.raises(RegistryError, match=f"version {failed} of .* did not pass the promotion rule; these did: 1, 2"):
        registry.roll_back(failed)
    registry.roll_back()
    version, passed = publish(registry, run, tmp_path, 4.5)
    assert passed
    assert registry.version_of(CHAMPION) == version


def test_versions_registered_by_other_tools_are_ignored(registry: Registry, run: str, tmp_path: Path) -> None:
    publish(registry, run, tmp_path, 5)
    for tags in ({}, {"gate": "passed"}, {"replaces": "1"}, {"gate": "passed", "replaces": "none"}):
        strange = registry.client.create_model_version(registry.name, tmp_path.as_uri(), run, tags).version
    assert champions(registry) == ["1"]
    better, passed = publish(registry, run, tmp_path, 6)
    assert passed
    assert champions(registry) == ["1", better]
    with pytest.raises(RegistryError, match=f"version {strange} of .* was not created by `smaller-student publish`"):
        registry.download(str(strange), tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


# --- manual changes in MLflow -----------------------------------------------------------------------------------------


def delete(*versions: str) -> Callable[[Registry], None]:
    def remove(registry: Registry) -> None:
        for version in versions:
            registry.client.delete_model_version(registry.name, version)

    return remove


def delete_alias(registry: Registry) -> None:
    registry.client.delete_registered_model_alias(registry.name, CHAMPION)


def move_alias(version: str) -> Callable[[Registry], None]:
    return lambda registry: registry.client.set_registered_model_alias(registry.name, CHAMPION, version)


def forget(registry: Registry) -> None:
    registry.client.delete_model_version_tag(registry.name, "3", "gate")


REMEDY = r"; name the champion \(one of {}\) by `smaller-student rollback --to VERSION`"


@pytest.mark.parametrize(
    ("change", "message", "left"),
    [
        (delete("3"), "version 3, the last one that was promoted, was deleted in MLflow", "1, 2"),
        (delete("2"), "version 2, which version 3 replaced, was deleted in MLflow", "1, 3"),
        (delete("1"), "version 1, which version 2 replaced, was deleted in MLflow", "2, 3"),
        (delete("2", "3"), "version 3, the last one that was promoted, was deleted", "1"),
        (forget, "version 3, the last one that was promoted, was deleted in MLflow, or its tags were", "1, 2"),
        (delete_alias, "alias `champion` was deleted in MLflow, but version 3 was promoted last", "1, 2, 3"),
        (move_alias("1"), "alias `champion` was moved to version 1 in MLflow, but version 3 was promoted", "1, 2, 3"),
        (move_alias("4"), "alias `champion` was moved to version 4 in MLflow, but version 3 was promoted", "1, 2, 3"),
    ],
)
def test_after_a_manual_change_nothing_is_promoted_until_the_champion_is_named(
    registry: Registry, run: str, tmp_path: Path, change: Callable[[Registry], None], message: str, left: str
) -> None:
    for own in (5, 6, 5.5, 4):  # the second one is the best, the fourth fails
        publish(registry, run, tmp_path, own)
    change(registry)
    versions = list(registry.lineage().versions)
    for call in (
        lambda: publish(registry, run, tmp_path, 9),
        lambda: registry.version_of(CHAMPION),
        lambda: registry.version_of(BEST),
        registry.roll_back,
    ):
        with pytest.raises(RegistryError, match=message + ".*" + REMEDY.format(left)):
            call()
    assert list(registry.lineage().versions) == versions
    chosen = left.split(", ")[-1]
    with pytest.raises(RegistryError, match=f"version 4 of .* did not pass the promotion rule; these did: {left}"):
        registry.roll_back("4")
    assert registry.roll_back(chosen)[1] == chosen
    assert registry.version_of(CHAMPION) == alias(registry, CHAMPION) == chosen
    assert not publish(registry, run, tmp_path, 3.5)[1]
    better, passed = publish(registry, run, tmp_path, 9)
    assert passed
    assert alias(registry, CHAMPION) == better


@pytest.mark.parametrize("also", [delete_alias, lambda registry: None])
def test_nothing_is_promoted_if_all_passed_versions_were_deleted(
    registry: Registry, run: str, tmp_path: Path, also: Callable[[Registry], None]
) -> None:
    publish(registry, run, tmp_path, 5)
    publish(registry, run, tmp_path, 3)
    delete("1")(registry)
    also(registry)
    with pytest.raises(
        RegistryError, match="no version that passed the promotion rule is left, so choose another `tracking"
    ):
        publish(registry, run, tmp_path, 9)
    assert list(registry.lineage().versions) == ["2"]


def test_deleting_a_rollback_does_not_restore_the_withdrawn_champion(
    registry: Registry, run: str, tmp_path: Path
) -> None:
    publish(registry, run, tmp_path, 5)
    publish(registry, run, tmp_path, 6)
    registry.roll_back()
    delete("3")(registry)
    with pytest.raises(RegistryError, match="version 3, the last one that was promoted, was deleted"):
        registry.version_of(CHAMPION)


def test_a_withdrawn_release_stays_out_although_its_version_and_the_rollback_were_deleted(
    registry: Registry, run: str, tmp_path: Path
) -> None:
    publish(registry, run, tmp_path, 5)
    publish(registry, run, tmp_path, 6)
    registry.roll_back()
    delete("2")(registry)
    again, passed = publish(registry, run, tmp_path, 6)
    assert (passed, champions(registry)) == (False, ["1", "1"])
    assert publish(registry, run, tmp_path, 6) == (again, False)
    reason = registry.tags(again)["reason"]
    tag = re.fullmatch(
        r"it was withdrawn by `rollback`; .* delete tag (withdrawn\.\w{16}) of the model in MLflow", reason
    )
    assert tag is not None
    delete(again, "3")(registry)  # the version that records the rollback, too
    registry.roll_back("1")
    again, passed = publish(registry, run, tmp_path, 6)
    assert not passed and registry.version_of(CHAMPION) == "1"
    registry.client.delete_registered_model_tag(registry.name, tag[1])  # as the reason says
    version, passed = publish(registry, run, tmp_path, 6)
    assert passed and registry.version_of(CHAMPION) == version


@pytest.mark.parametrize("call", ["set_registered_model_alias", "set_registered_model_tag", "set_model_version_tag"])
def test_a_rollback_whose_aliases_or_tags_fail_is_not_an_error_and_can_be_completed(
    registry: Registry,
    run: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
) -> None:
    for own in (5, 6, 7):
        publish(registry, run, tmp_path, own)

    def fail(*words: object) -> None:
        raise MlflowException("the server is down")

    with monkeypatch.context() as outage:
        outage.setattr(registry.client, call, fail)
        assert registry.roll_back()[1] == "2"
    (message,) = caplog.messages
    assert message.startswith("version 2 is champion again, but its aliases or the tags of withdrawn versions are inc")
    assert message.endswith("(the server is down); `smaller-student rollback --to 2` completes them")
    assert registry.version_of(CHAMPION) == "2"
    registry.roll_back("2")
    assert (registry.version_of(CHAMPION), alias(registry, CHAMPION), alias(registry, BEST)) == ("2", "2", "2")
    delete("3")(registry)
    assert not publish(registry, run, tmp_path, 7)[1]


def test_a_withdrawn_version_that_is_named_may_be_published_again(registry: Registry, run: str, tmp_path: Path) -> None:
    publish(registry, run, tmp_path, 5)
    publish(registry, run, tmp_path, 6)
    registry.roll_back()
    registry.roll_back("2")
    publish(registry, run, tmp_path, 6.5)
    delete("2")(registry)
    assert publish(registry, run, tmp_path, 6)[1]


def test_a_champion_of_version_0_1_0_is_named_once(registry: Registry, run: str, tmp_path: Path) -> None:
    client = registry.client
    client.create_registered_model(registry.name)
    for own in ("5", "4.5"):
        tags = {"quality": own, "gate": "passed", DIGEST: own}
        client.create_model_version(registry.name, tmp_path.as_uri(), run, tags)
    client.set_registered_model_alias(registry.name, CHAMPION, "2")
    client.set_registered_model_alias(registry.name, BEST, "1")
    message = "alias `champion` is at version 2, whose promotion is not recorded" + REMEDY.format("1, 2")
    with pytest.raises(RegistryError, match=message):
        publish(registry, run, tmp_path, 9)
    assert registry.roll_back("2") == ([], "2")
    assert (registry.version_of(CHAMPION), registry.version_of(BEST)) == ("2", "1")
    assert not publish(registry, run, tmp_path, 3.9)[1]


# --- files ------------------------------------------------------------------------------------------------------------


def test_only_downloads_of_champion_and_best_are_kept(registry: Registry, run: str, tmp_path: Path) -> None:
    models = tmp_path / "models"
    for own in (5, 4.5, 3):
        version, _ = (
            publish(registry, run, tmp_path / "release", own)
            if own != 5
            else publish(registry, run, release(tmp_path / "release", own), own)
        )
        folder = models / registry.tags(version)[DIGEST][:16]
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_text(str(own))
    (models / ".download-killed").mkdir()
    registry.prune(models)
    assert sorted((path / "model.onnx").read_text() for path in models.iterdir()) == ["4.5", "5"]


def test_a_release_is_uploaded_once_unless_its_run_is_incomplete_or_deleted(
    client: MlflowClient, tmp_path: Path
) -> None:
    files, folder, name = Files(tmp_path, tmp_path), release(tmp_path / "release", 5), next(NAMES)
    client.create_experiment(name, (tmp_path / "artifacts").as_uri())
    first = upload_release(client, files, folder, name)
    assert upload_release(client, files, folder, name) == first
    client.update_run(first, status="RUNNING")  # the upload may be incomplete
    second = upload_release(client, files, folder, name)
    client.delete_run(second)
    third = upload_release(client, files, folder, name)
    assert len({first, second, third}) == 3
    (folder / "SHA256SUMS").write_text("another\n")
    assert (whole := upload_release(client, files, folder, name)) != third
    (folder / "model.onnx").write_text("not uploaded")
    assert upload_release(client, files, folder, name) != whole
    client.delete_experiment(client.get_experiment_by_name(name).experiment_id)
    with pytest.raises(RegistryError, match=f"experiment {name} was deleted in MLflow; restore it"):
        upload_release(client, files, folder, name)


def test_a_release_goes_to_the_run_that_exported_it(client: MlflowClient, tmp_path: Path) -> None:
    files, folder, name = Files(tmp_path, tmp_path), release(tmp_path / "release", 5), next(NAMES)
    experiment = client.create_experiment(name, (tmp_path / "artifacts").as_uri())
    tags = {"stage": "export", DIGEST: release_digest(folder)}
    runs = {}
    for cached in ("false", "true"):
        runs[cached] = client.create_run(experiment, tags={**tags, "cached": cached}).info.run_id
        client.set_terminated(runs[cached])
    assert upload_release(client, files, folder, name) == runs["false"]
    assert [file.path for file in client.list_artifacts(runs["false"], "export")] == ["export/SHA256SUMS"]
    assert upload_release(client, files, folder, name) == runs["false"]
    assert client.get_run(runs["false"]).info.status == "FINISHED"
    assert len(client.search_runs([experiment])) == 2


def test_nothing_is_registered_if_the_artifact_store_fails(
    registry: Registry, client: MlflowClient, tmp_path: Path
) -> None:
    files, folder = Files(tmp_path, tmp_path), release(tmp_path / "release", 5)
    (tmp_path / "a file").write_text("")
    experiment = client.create_experiment(registry.name, (tmp_path / "a file" / "artifacts").as_uri())
    for _ in range(2):
        with pytest.raises(
            TrackingError, match=r"^the artifact store of MLflow .* failed \(.*\); nothing was register"
        ):
            registry.publish(
                folder,
                lambda: upload_release(client, files, folder, registry.name),
                {"quality": "5"},
                promotion_rule(registry, 5),
            )
    assert client.search_registered_models(f"name = '{registry.name}'") == []
    assert client.search_runs([experiment]) == []


def test_a_version_that_is_missing_or_has_lost_its_files_is_one_error(
    registry: Registry, run: str, tmp_path: Path
) -> None:
    with pytest.raises(RegistryError, match=f"{registry.name} has no version 7; `smaller-student history`"):
        registry.download("7", tmp_path / "fetched")
    with pytest.raises(RegistryError, match=f"{registry.name} has no `challenger`; `smaller-student publish`"):
        registry.version_of(CHALLENGER)
    publish(registry, run, tmp_path, 5)
    with pytest.raises(
        RegistryError, match=r"version 1 of .* cannot be downloaded .*; repair the artifact store, or n"
    ):
        registry.download("1", tmp_path / "fetched")


# --- concurrent promoters ---------------------------------------------------------------------------------------------


class Died(BaseException):
    """A promoter is killed between two calls of MLflow."""


class Turns:
    """Lets one thread at a time make one call of MLflow, in random order; some threads die before a call."""

    def __init__(self, seed: int, promoters: int) -> None:
        self._random = random.Random(seed)
        self._semaphores = [threading.Semaphore(0) for _ in range(promoters)]
        self._back = threading.Semaphore(0)
        self._dies = {
            number: self._random.randrange(3, 30) for number in range(promoters) if self._random.random() < 0.5
        }
        self._calls = [0] * promoters
        self.living = set(range(promoters))

    def take(self, number: int) -> None:
        """Wait for the turn of a thread."""
        self._back.release()
        self._semaphores[number].acquire()
        self._calls[number] += 1
        if self._calls[number] == self._dies.get(number):
            raise Died

    def run(self, look: Callable[[], None]) -> None:
        """Let the threads take turns until all have ended; `look` is called after each turn."""
        for _ in range(len(self._semaphores)):
            self._back.acquire()
        while self.living:
            self._semaphores[self._random.choice(sorted(self.living))].release()
            self._back.acquire()
            look()

    def leave(self, number: int) -> None:
        """End a thread."""
        self.living.discard(number)
        self._back.release()


class TurnClient:
    """Client of MLflow in which each call waits for its turn."""

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
    publish(real, run, tmp_path / "first", 5.0)
    turns, errors, seen = Turns(seed, 2), [], ["1"]

    def promoter(number: int, own: float) -> None:
        mine = Registry(TurnClient(client, turns, number), real.name)  # type: ignore[arg-type]
        try:
            publish(mine, run, tmp_path / str(own), own)
        except Died:
            pass
        except BaseException as error:
            errors.append(error)
        finally:
            turns.leave(number)

    def look() -> None:
        """Check that the champion passes against all earlier champions, and that the alias points to one of them."""
        now = real.version_of(CHAMPION)
        if now != seen[-1]:
            assert all(quality(real, now) > quality(real, before) - 1 for before in seen), (now, seen)
            seen.append(now)
        assert alias(real, CHAMPION) in seen

    # The second passes against version 1, and fails once the first one is champion.
    threads = [threading.Thread(target=promoter, args=pair) for pair in enumerate((7.0, 4.5))]
    for thread in threads:
        thread.start()
    turns.run(look)
    for thread in threads:
        thread.join()
    assert not errors
    assert champions(real) == seen
    last = publish(real, run, tmp_path / "last", 7.5)  # a later promoter
    assert last[1]
    assert alias(real, CHAMPION) == real.version_of(CHAMPION) == last[0]


@pytest.mark.parametrize("seed", range(10))
def test_a_version_is_compared_again_if_the_champion_was_withdrawn_meanwhile(
    client: MlflowClient, run: str, tmp_path: Path, seed: int
) -> None:
    real = Registry(client, next(NAMES))
    for own in (5.0, 6.0):
        publish(real, run, tmp_path / "first", own)
    turns, errors = Turns(seed, 2), []

    def decide(champion: str | None, best: str | None) -> tuple[Decision, bool]:
        return Decision(champion == "2", "by rival"), False

    def worker(number: int) -> None:
        mine = Registry(TurnClient(client, turns, number), real.name)  # type: ignore[arg-type]
        try:
            if number:
                mine.roll_back()
            else:
                mine.publish(release(tmp_path / "second", 7.0), lambda: run, {}, decide)
        except Died:
            pass
        except BaseException as error:
            errors.append(error)
        finally:
            turns.leave(number)

    threads = [threading.Thread(target=worker, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    turns.run(lambda: real.version_of(CHAMPION))
    for thread in threads:
        thread.join()
    assert not errors
    for before, line in itertools.pairwise(real.lineage().promotions):
        if (
            line.action == "promote"
        ):  # the second one replaced the first, and the last one passes against the second only
            assert before.version == ("1" if line.version == "2" else "2")
