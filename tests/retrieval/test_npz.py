"""Files of embeddings, and the command `evaluate`."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.cli.commands import app
from pipeline.labels import LOOK_ALIKE
from pipeline.retrieval.npz import ArchiveError, read_archive

ARRAYS = {
    "query": np.array([[1.0, 0.0], [0.0, 1.0]]),
    "query_ids": np.array([1, 7]),
    "query_cameras": np.array([0, 0]),
    "gallery": np.array([[1.0, 0.1], [0.9, 0.3], [0.5, 0.5]]),
    "gallery_ids": np.array([2, 1, 1]),
    "gallery_cameras": np.array([1, 1, 0]),
}


@pytest.fixture
def file(tmp_path):
    np.savez(tmp_path / "embeddings.npz", **ARRAYS)
    return tmp_path / "embeddings.npz"


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], catch_exceptions=False)


def test_evaluate_prints_json_with_the_protocol(file):
    result = json.loads(run(file, "--protocol", "market", "--json").stdout)
    assert result.pop("seconds") >= 0
    assert result == {
        **{"protocol": "market", "map": 1 / 2, "minp": 1 / 2, "rank1": 0.0, "rank5": 1.0, "rank10": 1.0},
        **{"queries": 2, "dropped": 1, "map_if_dropped_were_0": 1 / 4},
    }
    assert json.loads(run(file, "--protocol", "query-gallery", "--json").stdout)["map"] == (1 / 2 + 2 / 3) / 2


def test_evaluate_prints_a_table_by_default(file):
    output = run(file, "--protocol", "query-gallery").stdout
    assert "query-gallery" in output and "recall@30" in output and "0.5833" in output


def test_all_images_are_queries_and_gallery_if_the_protocol_takes_no_gallery(tmp_path):
    np.savez(tmp_path / "all.npz", query=ARRAYS["gallery"], query_ids=ARRAYS["gallery_ids"])
    result = json.loads(run(tmp_path / "all.npz", "--protocol", "loo", "--json").stdout)
    assert (result["queries"], result["dropped"], result["recall@1000"]) == (3, 1, 1.0)
    assert json.loads(run(tmp_path / "all.npz", "--protocol", "loo", "--json", "--rerank").stdout)["queries"] == 3


@pytest.mark.parametrize(
    ("change", "protocol", "message"),
    [
        ({"gallery_cameras": None}, "market", "lacks gallery_cameras, which protocol market needs"),
        ({"query_ids": np.array([1.0, 7.0])}, "market", "integers or text"),
        ({"query": np.array(["a", "b"])}, "market", "`query` must hold numbers"),
        ({"query_ids": np.array([{}, {}])}, "market", "not an archive of plain arrays"),
        ({}, "voc", "no protocol 'voc'"),
    ],
)
def test_missing_and_invalid_arrays_are_refused(tmp_path, change, protocol, message):
    arrays = {name: array for name, array in (ARRAYS | change).items() if array is not None}
    np.savez(tmp_path / "broken.npz", **arrays)
    with pytest.raises(ArchiveError, match=message):
        read_archive(tmp_path / "broken.npz", protocol)


def test_a_file_that_is_not_an_archive_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ArchiveError, match=r"text.npz is not an archive"):
        read_archive(tmp_path / "text.npz", "market")
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(ArchiveError, match="single array"):
        read_archive(tmp_path / "single.npy", "market")
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.npz"):
        read_archive(tmp_path / "gone.npz", "market")


def test_identities_stay_text(tmp_path):
    arrays = ARRAYS | {"gallery_ids": np.array(["01", "1", b"7".decode()]), "query_ids": np.array(["1", "7"])}
    np.savez(tmp_path / "text.npz", **arrays)
    assert list(read_archive(tmp_path / "text.npz", "market").gallery.identities) == ["01", "1", "7"]


def test_labels_are_trimmed_and_normalised_with_a_warning(tmp_path, caplog):
    arrays = ARRAYS | {
        "query_ids": np.array(["car1 ", "Mu\u0308ller"]),
        "gallery_ids": np.array(["car1", "M\u00fcller", "Car1"]),
    }
    np.savez(tmp_path / "embeddings.npz", **arrays)
    archive = read_archive(tmp_path / "embeddings.npz", "query-gallery")
    assert archive.query.identities.tolist() == ["car1", "M\u00fcller"]
    assert "2 labels in `query_ids` are trimmed or Unicode-normalised, such as" in caplog.text
    assert f"identities {LOOK_ALIKE}: 'Car1', 'car1'" in caplog.text
