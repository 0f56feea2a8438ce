"""Eight bits: faster and as good, or not at all."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from pipeline.export import int8
from pipeline.export.embed import embed_pixels, normalised
from pipeline.export.metadata import finish
from pipeline.inference.session import open_session
from pipeline.inference.timing import Gain
from tests.export.tiny_network import MEAN, STD, Pictures

FAST, ADVISED = (recipe.name for recipe in int8.RECIPES)


@pytest.fixture(scope="module")
def inputs():
    return [normalised(Pictures.pixels[:8], MEAN, STD), normalised(Pictures.pixels[8:], MEAN, STD)]


@pytest.mark.parametrize("recipe", int8.RECIPES, ids=lambda recipe: recipe.name)
def test_it_has_bytes_for_weights_and_nearly_the_embeddings(translated, metadata, reference, inputs, recipe):
    before = onnx.load_from_string(translated)
    found = int8.quantise(before, inputs, recipe)
    assert before.SerializeToString() == translated
    kinds = {tensor.data_type for tensor in found.graph.initializer if len(tensor.dims) == 4}
    assert kinds == {onnx.TensorProto.INT8}
    content = finish(found, metadata)
    assert (found.ir_version, b"/tmp/" in content) == (10, False)
    embeddings = embed_pixels(open_session(content), Pictures.pixels, MEAN, STD)
    assert np.einsum("nd,nd->n", embeddings, reference).min() > 0.9
    largest = max(
        np.abs(onnx.numpy_helper.to_array(tensor)).max() for tensor in found.graph.initializer if len(tensor.dims) == 4
    )
    assert 32 < largest <= 64
    assert int8.quantise(before, inputs, recipe).graph == found.graph


def test_seven_bits_never_overflow_sixteen_and_eight_would():
    assert 2 * 255 * 64 < 2**15 <= 2 * 255 * 127


def choose(translated, inputs, gains, maps, loss=0.005):
    asked = []

    def score(content):
        asked.append(content)
        return maps.pop(0)

    found = {name: Gain(ratio, ratio - 0.04, ratio + 0.04, 8) for name, ratio in gains.items()}
    verdict = int8.choose(onnx.load_from_string(translated), inputs, 0.8, loss, score, lambda _: found)
    return verdict, asked


def test_the_fastest_that_loses_little_is_taken_and_the_slower_is_not_even_asked(translated, inputs):
    verdict, asked = choose(translated, inputs, {FAST: 2.0, ADVISED: 1.5}, [0.796])
    assert (verdict.map, len(asked)) == (0.796, 1)
    assert verdict.model is not None
    assert [(trial.recipe, trial.map) for trial in verdict.trials] == [(FAST, 0.796), (ADVISED, None)]
    assert verdict.reason == f"{FAST}: 2.00 times as fast as floats on one image, mAP -0.0040"
    assert "There is an int8 file." in verdict.text


def test_one_that_loses_more_gives_way_to_a_slower_one(translated, inputs):
    verdict, _ = choose(translated, inputs, {FAST: 1.2, ADVISED: 3.0}, [0.7949, 0.8])
    assert (verdict.map, [trial.recipe for trial in verdict.trials]) == (0.8, [ADVISED, FAST])


@pytest.mark.parametrize(
    ("gains", "maps", "why"),
    [
        (
            {FAST: 1.04, ADVISED: 0.6},
            [],
            r"not faster .* sure \(1\.04 times, at least 1\.00\); S8S8 .*\(0\.60 times",
        ),
        ({FAST: 2.0, ADVISED: 1.9}, [0.7949, 0.5], r"loses 0\.0051 mAP \(0\.005 are allowed\); S8S8 loses 0\.3000"),
        ({FAST: 2.0, ADVISED: 0.9}, [float("nan")], "loses nan mAP"),
    ],
)
def test_else_there_is_none_and_the_verdict_says_why(translated, inputs, gains, maps, why):
    verdict, _ = choose(translated, inputs, gains, maps)
    assert (verdict.model, verdict.map) == (None, None)
    assert re.search(why, verdict.reason)
    assert "There is no int8 file." in verdict.text


def test_the_probe_agrees_with_what_the_processor_says_it_has():
    file = Path("/proc/cpuinfo")
    flags = file.read_text() if file.is_file() else ""
    if "avx2" not in flags:
        pytest.skip("this system does not tell whether its processor adds 8-bit products in 16 bits")
    assert int8.saturates() is ("vnni" not in flags)
