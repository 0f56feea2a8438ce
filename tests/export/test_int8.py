"""Int8 quantisation: kept only if faster than float and nearly as good."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from pipeline.export import int8
from pipeline.export.embed import embed_pixels, normalise_pixels
from pipeline.export.metadata import finish
from pipeline.inference.session import open_session
from pipeline.inference.timing import Gain
from tests.export.tiny_network import MEAN, STD, Pictures

FAST, ADVISED = (recipe.name for recipe in int8.RECIPES)


@pytest.fixture(scope="module")
def inputs():
    return [normalise_pixels(Pictures.pixels[:8], MEAN, STD), normalise_pixels(Pictures.pixels[8:], MEAN, STD)]


@pytest.mark.parametrize("recipe", int8.RECIPES, ids=lambda recipe: recipe.name)
def test_weights_are_int8_and_embeddings_nearly_those_of_float(translated, metadata, reference, inputs, recipe):
    before = onnx.load_from_string(translated)
    quantised = int8.quantise(before, inputs, recipe)
    assert before.SerializeToString() == translated
    kinds = {tensor.data_type for tensor in quantised.graph.initializer if len(tensor.dims) == 4}
    assert kinds == {onnx.TensorProto.INT8}
    content = finish(quantised, metadata)
    assert (onnx.load_from_string(content).ir_version, b"/tmp/" in content) == (8, False)
    embeddings = embed_pixels(open_session(content), Pictures.pixels, MEAN, STD)
    assert np.einsum("nd,nd->n", embeddings, reference).min() > 0.9
    largest = max(
        np.abs(onnx.numpy_helper.to_array(tensor)).max()
        for tensor in quantised.graph.initializer
        if len(tensor.dims) == 4
    )
    assert 32 < largest <= 64
    assert int8.quantise(before, inputs, recipe).graph == quantised.graph


def test_products_of_7_bit_weights_never_overflow_16_bits_and_those_of_8_bits_would():
    assert 2 * 255 * 64 < 2**15 <= 2 * 255 * 127


def choose(translated, inputs, gains, maps, max_loss=0.005):
    scored = []

    def score(content):
        scored.append(content)
        return maps.pop(0)

    speedups = {name: Gain(ratio, ratio - 0.04, ratio + 0.04, 8) for name, ratio in gains.items()}
    result = int8.choose(onnx.load_from_string(translated), inputs, 0.8, max_loss, score, lambda _: speedups)
    return result, scored


def test_the_fastest_that_loses_little_is_chosen_and_slower_ones_are_not_evaluated(translated, inputs):
    result, scored = choose(translated, inputs, {FAST: 2.0, ADVISED: 1.5}, [0.796])
    assert (result.map, len(scored)) == (0.796, 1)
    assert result.model is not None
    assert [(candidate.recipe, candidate.map) for candidate in result.candidates] == [(FAST, 0.796), (ADVISED, None)]
    assert result.reason == f"{FAST}: 2.00 times as fast as float on one image, mAP -0.0040"
    assert "There is an int8 file." in result.markdown


def test_a_slower_candidate_is_chosen_if_the_fastest_loses_too_much(translated, inputs):
    result, _ = choose(translated, inputs, {FAST: 1.2, ADVISED: 3.0}, [0.7949, 0.8])
    assert (result.map, [candidate.recipe for candidate in result.candidates]) == (0.8, [ADVISED, FAST])


@pytest.mark.parametrize(
    ("gains", "maps", "reason"),
    [
        (
            {FAST: 1.04, ADVISED: 0.6},
            [],
            r"not reliably faster .* \(1\.04 times, at least 1\.00\); S8S8 .*\(0\.60 times",
        ),
        ({FAST: 2.0, ADVISED: 1.9}, [0.7949, 0.5], r"loses 0\.0051 mAP \(0\.005 allowed\); S8S8 loses 0\.3000"),
        ({FAST: 2.0, ADVISED: 0.9}, [float("nan")], "loses nan mAP"),
    ],
)
def test_no_file_is_chosen_if_none_qualifies_and_the_result_gives_the_reason(translated, inputs, gains, maps, reason):
    result, _ = choose(translated, inputs, gains, maps)
    assert (result.model, result.map) == (None, None)
    assert re.search(reason, result.reason)
    assert "There is no int8 file." in result.markdown


def test_measured_saturation_agrees_with_the_cpu_flags():
    file = Path("/proc/cpuinfo")
    flags = file.read_text() if file.is_file() else ""
    if "avx2" not in flags:
        pytest.skip("no /proc/cpuinfo with avx2, so the expected result is unknown")
    assert int8.int8_products_saturate() is ("vnni" not in flags)
