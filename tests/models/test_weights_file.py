"""Files of other toolkits are read without running code, and what cannot be read is named."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.models.weights_file import read_tensors

STATE = {"layer1.0.conv1.weight": torch.arange(6.0).reshape(2, 3)}


class RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch created",)


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE, "epoch": 60, "rank1": np.float64(0.9), "best": np.float32(0.8)},  # torchreid
        {"model": STATE, "iteration": 7, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},  # fast-reid
        {"net": {"model_state_dict": STATE}},
        {"net": {"depth": 50}, "model_state_dict": STATE},
        {"model": {"name": "a"}, **STATE},
        {"ema": STATE, "epoch": 3},
    ],
    ids=["plain", "torchreid", "fast-reid", "nested", "settings first", "beside settings", "moving average"],
)
def test_a_state_dict_is_found_beside_other_things(tmp_path: Path, content: object) -> None:
    path = tmp_path / "model.pth.tar-60"
    torch.save(content, path)
    (read,) = read_tensors(path, "teacher.weights").items()
    assert read[0] == "layer1.0.conv1.weight"
    assert torch.equal(read[1], STATE["layer1.0.conv1.weight"])


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_safetensors_are_read_whatever_their_name(tmp_path: Path, name: str) -> None:
    save_file(STATE, tmp_path / name)
    read = read_tensors(tmp_path / name, "teacher.weights")
    assert torch.equal(read["layer1.0.conv1.weight"], STATE["layer1.0.conv1.weight"])


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_a_file_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pth"
    content = {"state_dict": STATE, "evil": RunsCode()}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"model\.pth, which holds more than tensors, and loading it could run code"):
        read_tensors(path, "teacher.weights")
    assert not (tmp_path / "created").exists()


def test_a_dictionary_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, object] = {}
    content["model"] = content
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth, which is not a file of tensors \(maximum recursion depth"):
        read_tensors(tmp_path / "a.pth", "teacher.weights")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"half", r"a\.safetensors, which is not a file of tensors \(.*\); copy it again"),
        ("a.pth", b"", r"a\.pth, which is no file of torch, since it begins with b''; download or write it again"),
        ("a.pth", b"<!DOCTYPE html>", r"which is no file of torch, since it begins with b'<!DOCTYPE html>'"),
        ("a.pth", b"\x80\x02.", r"a\.pth, which is not a file of tensors"),
        ("a.pth", b"\x80\x02h\x05.", r"a\.pth, which is not a file of tensors"),
        ("a.pth", {"epoch": 3}, r"a\.pth, which holds no state dict; write one with `torch\.save\(net\.state_dict"),
        ("a.pth", [1, 2], "holds no state dict"),
    ],
    ids=["half", "empty", "page", "empty pickle", "broken pickle", "no tensors", "list"],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, name: str, content: object, message: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        read_tensors(path, "teacher.weights")


def test_a_whole_network_is_refused_because_it_is_code(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 3), tmp_path / "net.pth")
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_tensors(tmp_path / "net.pth", "teacher.weights")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"nowhere\.pth, which is not a file; set it to the path of a state dict"
    ):
        read_tensors(tmp_path / "nowhere.pth", "teacher.weights")
