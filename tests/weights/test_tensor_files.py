"""Files of arrays: every dtype, shards, and files that are damaged or malicious."""

import argparse
import collections
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from bvit_jax.errors import UserError
from bvit_jax.weights import tensor_files
from tests.tiny_models import assert_same_states

STATE = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array(1.5, np.float64),
    "c": np.arange(3, dtype=np.float16),
    "d": np.array([1.5, -2.0], ml_dtypes.bfloat16),
    "e": np.array(7, np.int64),
    "f": np.zeros((0, 2), np.float32),
}


@pytest.fixture
def safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(tensor_files.encode_safetensors(STATE, {"format": "pt"}))
    return path


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def checkpoint(tmp_path, torch):
    """A training checkpoint as the BinaryViT code writes it."""
    path = tmp_path / "checkpoint.pth"
    model = {"w": torch.arange(1000.0), "n": torch.tensor(3)}
    args = argparse.Namespace(model_type="deit", opt_betas=None, lr=5e-4, cutmix_minmax=[0.1, 0.2])
    torch.save({"model": model, "epoch": 4, "args": args}, path)
    return path


# --- safetensors -------------------------------------------------------------------------------


def test_safetensors_round_trip(safetensors):
    state, metadata = tensor_files.read_safetensors(safetensors)
    assert_same_states(state, STATE)
    assert metadata == {"format": "pt"}


def test_transposed_arrays_are_written_in_order(tmp_path):
    array = np.arange(6.0).reshape(2, 3).T
    (tmp_path / "x.safetensors").write_bytes(tensor_files.encode_safetensors({"a": array}, {}))
    state, _ = tensor_files.read_safetensors(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(state["a"], array)


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_truncated_safetensors(safetensors, kept):
    safetensors.write_bytes(safetensors.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"^cannot read .*x.safetensors: .*is the file complete\?$"):
        tensor_files.read_safetensors(safetensors)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 100, b"\x08" + b"\0" * 7 + b"notjson!"])
def test_something_else_than_safetensors(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^cannot read .*x.safetensors"):
        tensor_files.read_safetensors(path)


def test_missing_safetensors(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        tensor_files.read_safetensors(tmp_path / "none.safetensors")


# --- shards ------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path):
    weight_map = {}
    for i, names in enumerate((("a", "b"), ("c", "d", "e", "f")), 1):
        name = f"model-0000{i}-of-00002.safetensors"
        (tmp_path / name).write_bytes(tensor_files.encode_safetensors({n: STATE[n] for n in names}, {}))
        weight_map |= dict.fromkeys(names, name)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def edit_index(index: Path, **entries: str) -> None:
    content = json.loads(index.read_text())
    content["weight_map"] |= entries
    index.write_text(json.dumps(content))


def test_shards_are_put_together(index):
    state, files = tensor_files.read_sharded(index)
    assert_same_states(state, STATE)
    assert [file.name for file in files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def test_an_index_that_lists_too_much(index):
    edit_index(index, g="model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="1 arrays that no shard holds, the first is g"):
        tensor_files.read_sharded(index)


def test_an_array_in_another_shard_than_listed(index):
    edit_index(index, a="model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="holds 'a', which"):
        tensor_files.read_sharded(index)


def test_an_index_that_leaves_its_directory(index):
    edit_index(index, g="../secret.safetensors")
    with pytest.raises(UserError, match="outside its directory"):
        tensor_files.read_sharded(index)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_something_else_than_an_index(tmp_path, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"cannot read .*index"):
        tensor_files.read_sharded(path)


# --- PyTorch -----------------------------------------------------------------------------------


def test_torch_round_trip(tmp_path, torch):
    tensor_files.write_torch(tmp_path / "x.pth", {"model": STATE, "note": "text"})
    content = tensor_files.read_torch(tmp_path / "x.pth")
    assert_same_states(content["model"], STATE)
    assert content["note"] == "text"
    assert torch.load(tmp_path / "x.pth")["model"]["d"].dtype == torch.bfloat16


def test_a_training_checkpoint_is_read(checkpoint):
    content = tensor_files.read_torch(checkpoint)
    assert content["args"] == {
        "model_type": "deit",
        "opt_betas": None,
        "lr": 5e-4,
        "cutmix_minmax": [0.1, 0.2],
    }
    np.testing.assert_array_equal(content["model"]["w"], np.arange(1000, dtype=np.float32))


class Malicious:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle", "old pickle"])
def test_a_malicious_file_is_refused_and_its_class_named(tmp_path, torch, how):
    path, trace = tmp_path / "x.pth", tmp_path / "trace"
    content = {"model": {}, "args": Malicious(trace)}
    if how == "torch":
        torch.save(content, path)
    elif how == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(content, protocol=4 if how == "pickle" else 0))
    with pytest.raises(UserError, match=r"it wants the class posix.mkdir, and only tensors") as caught:
        tensor_files.read_torch(path)
    assert "\n" not in str(caught.value)
    assert not trace.exists()


def test_a_pickled_module_is_refused(tmp_path, torch):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"it wants the class torch.nn.modules.linear.Linear"):
        tensor_files.read_torch(tmp_path / "x.pth")


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_truncated_checkpoint(checkpoint, kept):
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match=r"^cannot read .*checkpoint.pth") as caught:
        tensor_files.read_torch(checkpoint)
    assert "weights_only" not in str(caught.value)  # torch's advice to load without protection
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_found(checkpoint):
    content = bytearray(checkpoint.read_bytes())
    at = content.index(np.float32(700).tobytes() + np.float32(701).tobytes())
    content[at] ^= 1
    checkpoint.write_bytes(content)
    with pytest.raises(UserError, match="does not match its checksum"):
        tensor_files.read_torch(checkpoint)


def test_a_list_is_no_checkpoint(tmp_path, torch):
    torch.save([1, 2], tmp_path / "x.pth")
    with pytest.raises(UserError, match="holds a list, expected a dict"):
        tensor_files.read_torch(tmp_path / "x.pth")


@pytest.mark.parametrize("kind", ["float8", "sparse", "meta", "huge"])
def test_tensors_that_numpy_does_not_have(tmp_path, torch, kind):
    tensor = {
        "float8": lambda: torch.zeros(2).to(torch.float8_e4m3fn),
        "sparse": lambda: torch.eye(2).to_sparse(),
        "meta": lambda: torch.zeros(2, device="meta"),
        "huge": lambda: torch.zeros(1).expand(10**13),
    }[kind]()
    torch.save({"model": {"w": tensor}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"^cannot read .*x.pth"):
        tensor_files.read_torch(tmp_path / "x.pth")


def test_missing_checkpoint(tmp_path, torch):
    with pytest.raises(UserError, match="no file"):
        tensor_files.read_torch(tmp_path / "none.pth")


def test_without_torch_the_message_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"a .pth file needs PyTorch, which is not installed"):
        tensor_files.read_torch(tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"a .pth file needs PyTorch"):
        tensor_files.write_torch(tmp_path / "x.pth", {})
    assert list(tmp_path.iterdir()) == []


# --- files made to harm ------------------------------------------------------------------------


def _nested(depth: int) -> list:
    values: list = [0]
    for _ in range(depth):
        values = [values, values]
    return values


def _itself() -> list:
    values: list = []
    values.append(values)
    return values


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda torch: {"x": argparse.Namespace(x=_nested(40))}, "more than 1,000,000 tensors and lists"),
        (lambda torch: {"x": _itself()}, "lists in lists, more than 100 deep"),
        (lambda torch: {"x": torch.zeros(1).expand(1 << 40)}, "claim many times the size of the file"),
        (lambda torch: {"x": [torch.zeros(1).expand(1 << 24)] * 9}, "claim many times the size of the file"),
    ],
)
def test_a_small_file_cannot_become_large(tmp_path, torch, make, message):
    torch.save(make(torch), tmp_path / "x.pth")
    with pytest.raises(UserError, match=message):
        tensor_files.read_torch(tmp_path / "x.pth")


@pytest.mark.parametrize("archive", [True, False])
def test_tuples_whose_hash_would_never_end(tmp_path, torch, archive):
    values: tuple = (0,)
    for _ in range(40):
        values = (values, values)
    torch.save({"x": values}, tmp_path / "x.pth", _use_new_zipfile_serialization=archive)
    with pytest.raises(UserError, match="tuples more than 20 deep"):
        tensor_files.read_torch(tmp_path / "x.pth")


def test_tuples_are_found_before_the_damage_that_follows_them(tmp_path, torch):
    values: tuple = (0,)
    for _ in range(40):
        values = (values, values)
    (tmp_path / "x.pth").write_bytes(pickle.dumps(values)[:-1] + b"\xff")
    with pytest.raises(UserError, match="tuples more than 20 deep"):
        tensor_files.read_torch(tmp_path / "x.pth")


def test_a_compressed_file_is_not_unpacked(tmp_path, torch):
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    with pytest.raises(UserError, match=r"x\.pth is compressed, to 1,048,576 bytes"):
        tensor_files.read_torch(tmp_path / "x.pth")


def test_what_training_scripts_save_next_to_weights(tmp_path, torch):
    counts = collections.defaultdict(list, a=[1])
    content = {
        "best": np.float64(81.25),
        "step": np.int64(-3),
        "flag": np.bool_(True),
        "counts": counts,
        "w": torch.ones(2),
    }
    torch.save(content, tmp_path / "x.pth")
    read = tensor_files.read_torch(tmp_path / "x.pth")
    assert (read["best"], read["step"], read["flag"], read["counts"]) == (81.25, -3, True, {"a": [1]})
