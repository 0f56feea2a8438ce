"""The latency model: graphs match their spec, every layer is timed, and measurements are stored."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from pipeline.inference import latency_model as module
from pipeline.inference.latency_model import latency_model, stored_latency_model, stored_latency_ratio
from pipeline.inference.session import INPUT, open_session
from pipeline.inference.timing_graph import timing_graph
from pipeline.models.cost import output_sizes
from pipeline.models.spec import ArchSpec, Head, Input, Pool

SIZE = (32, 48)


def narrow(depth: int) -> ArchSpec:
    spec = ArchSpec.full(depth, 16, 24)
    block = spec.removable[-1]
    return ArchSpec.model_validate(
        {**spec.model_dump(), "widths": spec.widths | dict.fromkeys(block.sites, 0) | {"layer2": 40}}
    )


@pytest.mark.parametrize("depth", [18, 26])
def test_the_graph_has_the_layers_of_the_spec_and_runs_any_batch(depth: int) -> None:
    spec = narrow(depth)
    content = timing_graph(spec, SIZE)
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(content))
    weights = {w.name: tuple(w.dims) for w in model.graph.initializer}
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    sizes = {**spec.widths, "input": 3, "embedding": 24}
    for layer, (height, width) in output_sizes(spec, SIZE):
        shape = (sizes[layer.target], sizes[layer.source])
        if layer.name == "head.fc":
            assert weights["head.fc.weight"] == shape
            continue
        assert weights[f"{layer.name}.weight"] == (*shape, layer.kernel, layer.kernel)
        assert shapes[f"{layer.name}/Conv"][1:] == [sizes[layer.target], height, width]
    for images in (1, 3):
        pixels = np.random.default_rng(0).standard_normal((images, 3, *SIZE), dtype=np.float32)
        (embeddings,) = open_session(content).run(None, {INPUT: pixels})
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("head", ["bn-relu-fc-bn", "fc-bn-relu", "bn", "none"])
@pytest.mark.parametrize("pool", ["average", "gem"])
def test_the_graph_of_a_variant_runs_and_its_head_has_a_time(head: Head, pool: Pool) -> None:
    spec = ArchSpec.full(14, 16, 24 if "fc" in head else 512, ibn=True, pool=pool, head=head)
    spec = spec.narrowed({"layer1.0.conv1": 8, "layer2.0.conv1": 1}).model_copy(
        update={"input": Input(scale=(1, 1, 1), shift=(0, 0, 0))}
    )
    content = timing_graph(spec, SIZE)
    onnx.checker.check_model(onnx.load_from_string(content))
    pixels = np.random.default_rng(0).standard_normal((2, 3, *SIZE), dtype=np.float32)
    (embeddings,) = open_session(content).run(None, {INPUT: pixels})
    assert embeddings.shape == (2, spec.embedding_dim)
    assert module._layer_times(content, pixels[:1]).keys() == {layer.name for layer in spec.layers()} | {"head.fc"}


@pytest.mark.parametrize("depth", [18, 26])
def test_every_layer_has_a_time_and_a_narrow_network_is_faster(monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    monkeypatch.setattr(module, "ROUNDS", 1)
    spec = ArchSpec.full(depth, 48, 24)
    model = latency_model(spec, (64, 64), 8)  # widths differ at least six times, more than noise
    assert {(term.left, term.right) for term in model.terms} == {
        (layer.source, layer.target) for layer in spec.layers()
    }
    assert len(model.terms) == len(list(spec.layers()))
    narrowest = {**spec.widths, **dict.fromkeys(spec.widths, 8)}
    assert 0 < model(narrowest) < model(spec.widths)


def test_a_resumed_training_uses_the_stored_latency_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROUNDS", 1)
    spec, path = ArchSpec.full(14, 8, 16), tmp_path / "latency.json"
    first = stored_latency_model(path, spec, SIZE, 8)

    def must_not_measure(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(module, "latency_model", must_not_measure)
    assert stored_latency_model(path, spec, SIZE, 8) == first


def test_a_narrowed_network_is_timed_beside_the_full_one_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, path = ArchSpec.full(18, 48, 24), tmp_path / "measured.json"
    narrow = dict.fromkeys(spec.widths, 8)
    ratio = stored_latency_ratio(path, spec, (64, 64), narrow)
    assert 0 < ratio < 0.7
    monkeypatch.setattr(module, "gains", None)
    assert stored_latency_ratio(path, spec, (64, 64), narrow) == ratio
    with pytest.raises(TypeError):  # other widths are measured
        stored_latency_ratio(path, spec, (64, 64), narrow | {"layer4": 16})
