"""The promotion rule rejects networks that may have been trained on test identities of the checkout."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from pipeline.config import Params
from pipeline.data.layout import UNASSIGNED
from pipeline.data.manifest import UNLABELLED, Item, Manifest
from pipeline.data.splits import draw_test, split_test
from pipeline.export.metadata import finish
from pipeline.export.model import Model, load_model
from pipeline.export.release import write_release
from pipeline.export.sample import EXPECTED, PICTURE, as_png, expected, picture
from pipeline.export.to_onnx import to_onnx
from pipeline.files import Files
from pipeline.registry.errors import RegistryError
from pipeline.registry.lineage import CHAMPION
from pipeline.registry.policy import Decision
from pipeline.registry.promotion import SPLIT, TEST_SET, PromotionPolicy, common_batch
from pipeline.registry.publish import open_registry
from pipeline.registry.upload import upload_release
from pipeline.stage.presets import load_preset
from tests import layouts
from tests.export.tiny_network import METADATA, SIZE, tiny_net

ROOT = Path(__file__).parents[2]
SIZES = {0: SIZE, 1: SIZE[::-1]}
Rule = Callable[[list[Item], Params], list[Item]]


@pytest.fixture(scope="module")
def networks() -> dict[int, bytes]:
    """Two networks with different input sizes, so that latencies are not compared."""
    return {seed: to_onnx(tiny_net(seed), SIZES[seed], 18).SerializeToString() for seed in SIZES}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)  # the artifact folder of runs
    return Files(tmp_path, tmp_path)


def params(source: str = "folder", seed: int = 0, share: float = 0.5) -> Params:
    found = load_preset(ROOT, "smoke")
    custom = found.data.custom.model_copy(update={"test": share})
    data = found.data.model_copy(update={"source": source, "custom": custom})
    promotion = found.tracking.promotion.model_copy(update={"margin": 1.0})
    tracking = found.tracking.model_copy(update={"promotion": promotion})
    return found.model_copy(update={"seed": seed, "data": data, "tracking": tracking})


def drawn(items: list[Item], settings: Params) -> list[Item]:
    """Split items as for source folder."""
    return split_test(items, settings.data.custom.test, settings.seed, settings.data.protocol)


def listed(*tested: int) -> Rule:
    """Return a rule that splits items as a table does."""

    def place(items: list[Item], settings: Params) -> list[Item]:
        test = {str(number) for number in tested}
        query = {item.path for item in items if item.identity in test and item.camera == "1"}
        return [
            replace(one, split="query" if one.path in query else "gallery" if one.identity in test else "train")
            for one in items
        ]

    return place


def prepare(files: Files, settings: Params, identities: int, rule: Rule = drawn) -> Manifest:
    """Write the images and the manifest of so many identities, each seen by two cameras."""
    items = []
    for identity, camera, view in layouts.views(1, identities, 2, 1):
        path = f"{identity}/{camera}/{view}.png"
        items.append(Item(path, str(identity), str(camera), UNASSIGNED))
        if not (files.root / "data" / path).exists():
            layouts.picture(files.root / "data" / path, identity, camera, view)
    manifest = Manifest(rule(items, settings), files.root / "data", settings.data.closed_set)
    manifest.write(files.manifest)
    return manifest


def trained(folder: Path, networks: dict[int, bytes], seed: int, manifest: Manifest) -> Path:
    """Write a release of a network that was trained on a manifest."""
    size = SIZES[seed]
    about = replace(METADATA, data_digest=manifest.digest, image_size=size)
    models = {"model.onnx": finish(onnx.load_from_string(networks[seed]), about)}
    folder.mkdir(exist_ok=True)
    write_release(folder, models | {EXPECTED: expected(models, size), PICTURE: as_png(picture(size))})
    return folder


def publish(files: Files, settings: Params, folder: Path) -> tuple[str, Decision]:
    with open_registry(files, settings) as registry:
        policy = PromotionPolicy(files, settings, registry, folder)
        return registry.publish(
            folder, lambda: upload_release(registry.client, files, folder, "e"), policy.tags, policy
        )


def champion(files: Files, settings: Params) -> str:
    with open_registry(files, settings) as registry:
        return registry.version_of(CHAMPION)


def test_a_larger_test_set_of_the_same_split_is_compared_and_downloads_are_pruned(
    files: Files, networks: dict[int, bytes]
) -> None:
    settings = params()
    first = publish(files, settings, trained(files.root / "one", networks, 0, prepare(files, settings, 20)))
    assert first == ("1", Decision(True, "there is no earlier version"))
    version, decision = publish(files, settings, trained(files.root / "two", networks, 1, prepare(files, settings, 26)))
    assert decision.passed and " against the champion (" in decision.reason
    assert champion(files, settings) == version == "2"
    with open_registry(files, settings) as registry:
        one, two = registry.tags("1"), registry.tags("2")
        assert len(list((files.tracking / "models").iterdir())) == 1
        registry.cached_download("2", files.tracking / "models")
        registry.prune(files.tracking / "models")
    assert one[SPLIT] == two[SPLIT]
    assert one[TEST_SET] != two[TEST_SET]


def test_latencies_are_compared_in_a_batch_that_both_files_take() -> None:
    def model(batch: int | None) -> Model:
        return load_model("model.onnx", finish(to_onnx(tiny_net(0), SIZE, 18, batch), METADATA))

    dynamic, two, four = model(None), model(2), model(4)
    assert common_batch(dynamic, dynamic) == 1
    assert common_batch(dynamic, four) == common_batch(four, dynamic) == common_batch(four, four) == 4
    assert common_batch(two, four) is None  # another batch was chosen on purpose, as another image size is


@pytest.mark.parametrize(
    ("before", "after", "rules"),
    [
        (params(seed=0), params(seed=1), (drawn, drawn)),
        (params(share=0.4), params(share=0.6), (drawn, drawn)),
        (params("csv"), params("csv"), (listed(1, 2, 3), listed(3, 4, 5))),
        (params("csv"), params("market1501"), (listed(1, 2, 3), listed(3, 4, 5))),
        (params(seed=0), params(seed=1), (drawn, lambda items, _: drawn(items, params(seed=2)))),  # not yet prepared
    ],
)
def test_a_champion_that_may_have_been_trained_on_test_identities_is_rejected(
    files: Files, networks: dict[int, bytes], before: Params, after: Params, rules: tuple[Rule, Rule]
) -> None:
    publish(files, before, trained(files.root / "one", networks, 0, prepare(files, before, 20, rules[0])))
    folder = trained(files.root / "two", networks, 1, prepare(files, after, 20, rules[1]))
    with pytest.raises(RegistryError, match=r"version 1 may have been trained on identities of this test set.*`seed`"):
        publish(files, after, folder)
    assert champion(files, after) == "1"
    with open_registry(files, after) as registry:
        assert list(registry.lineage().versions) == ["1"]
    prepare(files, before, 20, rules[0])  # the original test set again
    again = trained(files.root / "two", networks, 1, Manifest.read(files.manifest, files.root / "data"))
    assert publish(files, before, again)[1].passed


def test_open_and_closed_sets_are_never_compared(files: Files, networks: dict[int, bytes]) -> None:
    """The test images are the same; in the closed set two of their identities are trained on too."""

    def closed(items: list[Item], settings: Params) -> list[Item]:
        more = [Item(f"{one.path}#", one.identity, one.camera, "train") for one in items if one.identity in ("1", "2")]
        return [*listed(1, 2, 3)(items, settings), *more]

    before = params("csv")
    after = before.model_copy(update={"data": before.data.model_copy(update={"closed_set": True})})
    sets = [(before, listed(1, 2, 3)), (after, closed)]
    for number, (one, two) in enumerate((sets, sets[::-1])):
        name = {"tracking": before.tracking.model_copy(update={"model_name": f"m{number}"})}
        first, second = (settings.model_copy(update=name) for settings, _ in (one, two))
        publish(files, first, trained(files.root / "one", networks, 0, prepare(files, first, 20, one[1])))
        folder = trained(files.root / "two", networks, 1, prepare(files, second, 20, two[1]))
        with pytest.raises(RegistryError, match="version 1 may have been trained on identities of this test set"):
            publish(files, second, folder)


def test_a_table_may_get_new_training_identities(files: Files, networks: dict[int, bytes]) -> None:
    settings, rule = params("csv"), listed(1, 2, 3)
    publish(files, settings, trained(files.root / "one", networks, 0, prepare(files, settings, 20, rule)))
    assert publish(files, settings, trained(files.root / "two", networks, 1, prepare(files, settings, 26, rule)))[
        1
    ].passed


def test_the_split_digest_of_the_rendered_set_depends_on_seed_and_training_identities(
    files: Files, networks: dict[int, bytes]
) -> None:
    manifest = prepare(files, params(), 20, listed(1, 2, 3))
    folder, tags = trained(files.root / "one", networks, 0, manifest), []
    for seed, train, test, unlabelled, used in (
        (0, 17, 3, 0, 0), (0, 17, 6, 0, 8), (0, 17, 6, 9, 0),
        (1, 17, 3, 0, 0), (0, 14, 3, 0, 0), (0, 17, 3, 9, 8), (0, 17, 6, 9, 8),
    ):  # fmt: skip
        content = params("vehicles", seed).model_dump()
        content["data"]["vehicles"] |= {
            "train_identities": train, "test_identities": test, "unlabelled_identities": unlabelled
        }  # fmt: skip
        content["student"]["batch"]["unlabelled"] = used
        with open_registry(files, params()) as registry:
            tags.append(PromotionPolicy(files, Params.model_validate(content), registry, folder).tags[SPLIT])
    assert tags[0] == tags[1] == tags[2]
    assert len(set(tags)) == 5


def test_unlabelled_images_leave_the_digests_of_split_and_test_set_as_they_are(
    files: Files, networks: dict[int, bytes]
) -> None:
    """For this seed, an identity called `unlabelled` would be drawn for the test set."""
    settings = params(seed=next(seed for seed in range(99) if draw_test({UNLABELLED}, 0.5, seed)))

    def with_unlabelled(items: list[Item], settings: Params) -> list[Item]:
        more = [Item(f"{one.path}#", UNLABELLED, "unknown", UNLABELLED) for one in items]
        return [*drawn(items, settings), *more]

    tags = []
    for rule in (drawn, with_unlabelled):
        folder = trained(files.root / "one", networks, 0, prepare(files, settings, 20, rule))
        with open_registry(files, settings) as registry:
            tags.append(PromotionPolicy(files, settings, registry, folder).tags)
    assert tags[0] == tags[1]


def test_a_challenger_trained_on_another_manifest_is_rejected(files: Files, networks: dict[int, bytes]) -> None:
    folder = trained(files.root / "one", networks, 0, prepare(files, params(), 20))
    prepare(files, params(), 21)
    with pytest.raises(RegistryError, match=r"one was trained on another manifest than .*; run `dvc repro`"):
        publish(files, params(), folder)


def test_a_version_without_a_split_tag_is_compared_on_the_same_test_set_only(
    files: Files, networks: dict[int, bytes]
) -> None:
    settings = params()
    publish(files, settings, trained(files.root / "one", networks, 0, prepare(files, settings, 20)))
    with open_registry(files, settings) as registry:
        registry.client.delete_model_version_tag(registry.name, "1", SPLIT)  # as 0.1.0 left it
    folder = trained(files.root / "two", networks, 1, prepare(files, settings, 26))
    with pytest.raises(RegistryError, match="split None, here they are"):
        publish(files, settings, folder)
    assert publish(files, settings, trained(folder, networks, 1, prepare(files, settings, 20)))[1].passed
