"""Times of layers: the graph is the network, its nodes are known by layer, and the table is kept."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from pipeline.inference import latency_model as module
from pipeline.inference.latency_model import kept_latency_model, kept_share, latency_model
from pipeline.inference.session import INPUT, open_session
from pipeline.inference.timing_graph import timing_graph
from pipeline.models.cost import areas
from pipeline.models.spec import ArchSpec

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
    for layer, (height, width) in areas(spec, SIZE):
        shape = (sizes[layer.target], sizes[layer.source])
        if layer.name == "head.fc":
            assert weights["head.fc.weight"] == shape
            continue
        assert weights[f"{layer.name}.weight"] == (*shape, layer.kernel, layer.kernel)
        assert shapes[f"{layer.name}/Conv"][1:] == [sizes[layer.target], height, width]
    for images in (1, 3):
        pixels = np.random.default_rng(0).standard_normal((images, 3, *SIZE), dtype=np.float32)
        (found,) = open_session(content).run(None, {INPUT: pixels})
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("depth", [18, 26])
def test_every_layer_gets_a_time_and_a_narrow_network_costs_less(monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    monkeypatch.setattr(module, "ROUNDS", 1)
    spec = ArchSpec.full(depth, 48, 24)
    model = latency_model(spec, (64, 64), 8)  # widths six times apart at least, which no noise turns round
    assert {(term.left, term.right) for term in model.terms} == {
        (layer.source, layer.target) for layer in spec.layers()
    }
    assert len(model.terms) == len(list(spec.layers()))
    least = {**spec.widths, **dict.fromkeys(spec.widths, 8)}
    assert 0 < model(least) < model(spec.widths)


def test_a_training_that_goes_on_counts_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROUNDS", 1)
    spec, path = ArchSpec.full(14, 8, 16), tmp_path / "latency.json"
    first = kept_latency_model(path, spec, SIZE, 8)

    def must_not_measure(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(module, "latency_model", must_not_measure)
    assert kept_latency_model(path, spec, SIZE, 8) == first


def test_a_narrowed_network_is_timed_beside_the_full_one_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, path = ArchSpec.full(18, 48, 24), tmp_path / "measured.json"
    narrow = dict.fromkeys(spec.widths, 8)
    share = kept_share(path, spec, (64, 64), narrow)
    assert 0 < share < 0.7
    monkeypatch.setattr(module, "gains", None)
    assert kept_share(path, spec, (64, 64), narrow) == share
    with pytest.raises(TypeError):  # another one would be measured
        kept_share(path, spec, (64, 64), narrow | {"layer4": 16})
