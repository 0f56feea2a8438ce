"""A teacher from elsewhere: it is loaded with a report, checked against chance and wrong preprocessing."""

import logging
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from pipeline import checkpoint
from pipeline.compress.compactor import attach
from pipeline.config import Params
from pipeline.data.augment import MEAN, STD, normalise
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec
from pipeline.models.toolkits import relative_input
from pipeline.retrieval import scoring
from pipeline.retrieval.scoring import Side
from pipeline.stage.presets import load_preset
from pipeline.teachers.checks import USUAL, Preprocessing, TeacherError, check_retrieval, compare_settings, probes
from pipeline.teachers.given import LOADERS, larger_student, load, save
from pipeline.teachers.state_dict import class_directions, load_checkpoint, with_classifier, with_preprocessing
from tests.imports import ROOT
from tests.models.other_toolkits import FastReid, TorchReid, randomised

PIXELS = torch.randint(0, 256, (4, 3, 48, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def params() -> Params:
    return load_preset(ROOT, "smoke")


def section(params: Params, path: Path, **values: object):
    return params.teacher.model_validate(
        params.teacher.model_dump() | {"source": "checkpoint", "weights": str(path), **values}
    )


def test_a_checkpoint_of_fast_reid_gives_its_embeddings(params: Params, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    theirs = randomised(FastReid((1, 1, 1, 1), 8, ibn=True))
    torch.save({"model": theirs.state_dict(), "iteration": 9}, tmp_path / "model_best.pth")
    net = load_checkpoint(section(params, tmp_path / "model_best.pth"))
    with torch.no_grad():
        torch.testing.assert_close(net(normalise(PIXELS)).embedding, theirs(PIXELS.float()), atol=1e-3, rtol=1e-3)
    assert "a ResNet-14" in caplog.text
    assert "embedding of 256 numbers" in caplog.text
    assert "tensors that are not used: heads.weight" in caplog.text


def test_the_input_of_params_yaml_is_that_of_the_network(params: Params, tmp_path: Path) -> None:
    theirs = randomised(TorchReid((1, 1, 1, 1), 8, 2, ibn=False))
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "model.pth.tar")
    given = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "bgr": True, "size": [], "layout": "auto"}
    net = load_checkpoint(section(params, tmp_path / "model.pth.tar", last_stride=2, input=given))
    mean, std = (torch.tensor(given[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        expected = theirs(((PIXELS / 255 - mean) / std).flip(1))
        torch.testing.assert_close(net(normalise(PIXELS)).embedding, expected, atol=1e-3, rtol=1e-3)


def test_the_order_of_the_channels_alone_keeps_the_normalisation_of_the_file(params: Params, tmp_path: Path) -> None:
    theirs = randomised(FastReid((1, 1, 1, 1), 8, ibn=False))
    theirs.pixel_mean.fill_(127.5)
    theirs.pixel_std.fill_(100.0)
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    net = load_checkpoint(section(params, tmp_path / "model.pth", input={"mean": [], "std": [], "bgr": True, "size": [],
                                                                         "layout": "auto"}))  # fmt: skip
    with torch.no_grad():
        expected = theirs(PIXELS.flip(1).float())
        torch.testing.assert_close(net(normalise(PIXELS)).embedding, expected, atol=1e-3, rtol=1e-3)


def test_a_network_of_this_project_is_a_folder(params: Params, tmp_path: Path) -> None:
    teacher = RetrievalNet(ArchSpec.full(14, 8, 24, identities=5))
    checkpoint.save(tmp_path / "own", teacher)
    net = load_checkpoint(section(params, tmp_path / "own"))
    assert net.classifier is None
    assert torch.equal(net.conv1.weight, teacher.conv1.weight)
    with pytest.raises(TeacherError, match=r"`teacher\.pool` is gem, but .*spec\.json decides it; set it to auto"):
        load_checkpoint(section(params, tmp_path / "own", pool="gem"))
    checkpoint.save(tmp_path / "student", attach(teacher, ["layer1"]))
    with pytest.raises(TeacherError, match="is a student before surgery; set it to artifacts/surgery"):
        load_checkpoint(section(params, tmp_path / "student"))


def test_a_damaged_folder_is_named(params: Params, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "own", RetrievalNet(ArchSpec.full(14, 8, 24)))
    for name, content in (("weights.safetensors", b"half"), ("spec.json", b"{}")):
        (tmp_path / "own" / name).write_bytes(content)
        with pytest.raises(TeacherError, match=r"`teacher\.weights` .*own is damaged \(.*\); copy the folder") as error:
            load_checkpoint(section(params, tmp_path / "own"))
        assert "\n" not in str(error.value)


def test_params_may_change_a_part_of_the_input_of_a_network_of_this_project(params: Params, tmp_path: Path) -> None:
    spec = ArchSpec.full(14, 8, 24)
    net = with_preprocessing(RetrievalNet(spec), Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), bgr=True))
    checkpoint.save(tmp_path / "own", net)
    given = {"mean": [], "std": [0.25] * 3, "bgr": False, "size": [], "layout": "auto"}
    loaded = load_checkpoint(section(params, tmp_path / "own", input=given)).spec.input
    assert loaded is not None
    assert loaded.bgr
    expected = relative_input((MEAN, STD), (0.5, 0.4, 0.3), (0.25, 0.25, 0.25), bgr=True)
    assert expected is not None
    np.testing.assert_allclose([*loaded.scale, *loaded.shift], [*expected.scale, *expected.shift], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("layer2.0.conv1.weight", torch.tensor(1.0)),
        ("layer1.0.bn1.IN.weight", torch.ones(9)),
        ("fc.0.weight", torch.ones(4)),
    ],
)
def test_tensors_of_impossible_shapes_are_refused_in_one_line(
    params: Params, tmp_path: Path, name: str, tensor: torch.Tensor
) -> None:
    state = TorchReid((1, 1, 1, 1), 8, 2, ibn=True).state_dict() | {name: tensor}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(TeacherError, match=r"a\.pth cannot be used: .*; export the network as ONNX") as error:
        load_checkpoint(section(params, tmp_path / "a.pth"))
    assert "\n" not in str(error.value)


def test_a_folder_without_a_spec_is_named(params: Params, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"is a folder without spec\.json; set it to a state dict, or to a copy of"):
        load_checkpoint(section(params, tmp_path))


def test_what_is_no_resnet_is_refused_by_name(params: Params, tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 4).state_dict(), tmp_path / "mlp.pth")
    with pytest.raises(TeacherError, match=r"mlp\.pth cannot be used: it is not a ResNet"):
        load_checkpoint(section(params, tmp_path / "mlp.pth"))


def test_the_classifier_has_the_mean_direction_of_each_identity() -> None:
    net = RetrievalNet(ArchSpec.full(14, 8, 24)).eval()
    random = np.random.default_rng(0)
    vectors = random.standard_normal((6, 24)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    whole = with_classifier(net, class_directions(vectors, np.array([0, 1, 2, 2, 1, 2])))
    assert whole.classifier is not None
    assert (whole.spec.identities, whole.spec.cosine) == (3, True)
    for number, rows in enumerate(([0], [1, 4], [2, 3, 5])):
        mean = vectors[rows].mean(axis=0)
        np.testing.assert_allclose(whole.classifier.weight[number].detach(), mean / np.linalg.norm(mean), atol=1e-6)
    torch.testing.assert_close(whole(normalise(PIXELS)).embedding, net(normalise(PIXELS)).embedding)


def scored(vectors: npt.NDArray[np.float32], names: npt.NDArray[np.str_]):
    return scoring.evaluate("loo", Side(vectors, names))


def test_a_teacher_no_better_than_chance_is_refused() -> None:
    random = np.random.default_rng(0)
    names = np.repeat([f"{n}" for n in range(20)], 5)
    centres = np.repeat(random.standard_normal((20, 16)), 5, axis=0)
    noise = random.standard_normal((100, 16)).astype(np.float32)
    good = (centres + noise).astype(np.float32)
    check_retrieval(scored(good, names), [scored(random.permutation(good), names) for _ in range(3)], "")
    lucky = noise.copy()  # one identity of twenty is found, which may be chance
    lucky[:5] = lucky[:1]
    for useless in (noise, lucky, np.ones((100, 16), np.float32)):
        with pytest.raises(TeacherError, match=r"cannot be distinguished from chance .*: set it"):
            check_retrieval(scored(useless, names), [scored(random.permutation(useless), names)], "set it")


def test_a_better_preprocessing_is_found_and_named(caplog) -> None:
    """Identities differ in red; the network expects blue first, and embeds its third channel."""
    random = np.random.default_rng(0)
    names = np.repeat([f"{n}" for n in range(12)], 6)
    red = np.repeat(np.linspace(0, 1, 12), 6) + random.normal(0, 0.01, 72)
    pixels = np.stack([red, random.random(72), random.random(72)], axis=1)
    ours = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]

    net = RetrievalNet(ArchSpec.full(14, 8, 24))

    def embed(kind: Preprocessing) -> npt.NDArray[np.float32]:
        image, adapter = torch.from_numpy(ours).float()[:, :, None, None], with_preprocessing(net, kind).adapter
        x = (image if adapter is None else adapter(image))[:, 2, 0, 0].numpy()
        return np.exp(-((x[:, None] - np.linspace(-3, 3, 40)) ** 2) / 0.02).astype(np.float32) + 1e-6

    others = {str(kind): partial(embed, kind) for kind in USUAL}
    advice = compare_settings(embed(Preprocessing(MEAN, STD)), others, names)
    assert "set `teacher.input.mean` [0.485, 0.456, 0.406], `std` [0.229, 0.224, 0.225] and `bgr` true: on" in advice
    assert "On training images it has mAP" in caplog.text
    caplog.clear()
    right = embed(Preprocessing(MEAN, STD, bgr=True))
    assert compare_settings(right, others, names).startswith("check `teacher.input`")
    assert not caplog.text


def test_if_no_other_preprocessing_gives_embeddings_nothing_is_compared() -> None:
    def embed() -> npt.NDArray[np.float32]:
        raise TeacherError

    present = np.eye(4, dtype=np.float32)
    assert compare_settings(present, {"a": embed}, np.array(["a", "a", "b", "b"])).startswith("check `teacher.input`")


def test_the_other_stride_and_max_pooling_of_a_state_dict_are_tried(params: Params, tmp_path: Path) -> None:
    torch.save(randomised(TorchReid((1, 1, 1, 1), 8, 2, ibn=False)).state_dict(), tmp_path / "a.pth")
    given = params.model_copy(update={"teacher": section(params, tmp_path / "a.pth", last_stride=1)})
    net, variants = LOADERS["checkpoint"](given)
    assert isinstance(net, RetrievalNet)
    assert [name for name in variants if "input" not in name] == [
        "`teacher.last_stride` 2", "`teacher.max_pool` unpadded"
    ]  # fmt: skip
    with torch.no_grad():
        expected = randomised(TorchReid((1, 1, 1, 1), 8, 2, ibn=False))
        expected.load_state_dict(torch.load(tmp_path / "a.pth"))
        embedding = variants["`teacher.last_stride` 2"]()(normalise(PIXELS)).embedding
        torch.testing.assert_close(embedding, expected(normalise(PIXELS)), atol=1e-4, rtol=1e-3)
    checkpoint.save(tmp_path / "own", net)
    own = params.model_copy(update={"teacher": section(params, tmp_path / "own")})
    assert all("input" in name for name in LOADERS["checkpoint"](own)[1])  # spec.json has them


def test_a_student_that_needs_more_than_its_teacher_is_named(params: Params) -> None:
    teacher, full = RetrievalNet(ArchSpec.full(14, 8, 24)), ArchSpec.full(50, 16, 24)
    budget = params.student.budget.model_copy(update={"reduction": 0.0})
    given = params.model_copy(update={"student": params.student.model_copy(update={"budget": budget})})
    warning = larger_student(teacher, full, given)
    assert warning is not None
    assert "its teacher needs" in warning and warning.endswith("or raise `student.budget.reduction`")
    assert larger_student(teacher, teacher.spec, given) is None


def test_without_a_probe_nothing_is_compared() -> None:
    def embed() -> npt.NDArray[np.float32]:
        raise AssertionError

    none = np.zeros((0, 4), np.float32)
    assert compare_settings(none, {"a": embed}, np.array([], dtype=np.str_)).startswith("check `teacher.input`")


def test_one_kind_of_teacher_takes_the_place_of_the_other(tmp_path: Path) -> None:
    (tmp_path / "teacher.onnx").write_bytes(b"an earlier one")
    net = RetrievalNet(ArchSpec.full(14, 8, 24))
    save(net, tmp_path)
    restored = load(tmp_path)
    assert isinstance(restored, RetrievalNet)
    assert torch.equal(restored.conv1.weight, net.conv1.weight)


def test_probes_are_whole_identities_with_a_match() -> None:
    names = np.array([f"{n // 7}" for n in range(7000)] + ["alone"])
    chosen = probes(names, 700)
    assert 500 <= len(chosen) <= 700
    assert all(np.count_nonzero(names[chosen] == name) == 7 for name in set(names[chosen]))
    assert len(probes(names[:20], 700)) == 20
