"""The parity command: golden files pass, and any change to one of their arrays is found."""

import contextlib
import functools
import gc
import json
import sys

import numpy as np
import pytest

from bvit_jax import parity
from bvit_jax.errors import UserError
from bvit_jax.parity import check as checking
from bvit_jax.parity.__main__ import main
from bvit_jax.parity.check import _deviations, _gradient_floors
from bvit_jax.parity.subject import subject_of

MODELS = (
    "deit",
    "react_deit",
    "react_deit_avgpool",
    "react_deit_steps",
    "binaryvit",
    "binaryvit_some_fp",
    "binaryvit_w1a32",
    "binaryvit_w4a1",
    "deit_distilled",
    "swin",
    "bivit_deit",
    "bivit_deit_nodist",
    "bivit_swin",
    "bhvit_window3",
)
BATCH_NORMS = tuple(name for name in MODELS if name.startswith(("react", "binaryvit", "bhvit")))
GROUPS = ["inputs", "eval logits", "train logits", "loss", "gradients"]


def read(path):
    with np.load(path) as archive:
        return dict(archive)


def write(path, arrays):
    np.savez(path, **arrays)
    return path


def changed(array):
    """Returns the array with its values changed by 1e-4 relative, counters by one."""
    if array.dtype.kind != "f":
        return array + 1
    wide = np.asarray(array, np.float64 if array.dtype == np.float64 else np.float32)
    return wide * (1 + 1e-4) if wide.any() else wide + 1e-4


# --- golden files pass -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def check(golden_file):
    """Returns a function from a file's name to its rows and to what was compared for them.

    The latter are (group, our arrays, the file's arrays, floors).
    """

    @functools.cache
    def run(name):
        calls, compare = [], parity.compare

        def record(group, ours, golden, floors=None):
            calls.append((group, ours, golden, floors))
            return compare(group, ours, golden, floors)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checking, "compare", record)
            return list(checking.check(golden_file(name))), calls

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_golden_files_pass(golden_file, check, name):
    rows, _ = check(name)
    assert [row for row in rows if not row.passed] == []
    groups = [row.group for row in rows]
    assert set(GROUPS) <= set(groups)
    assert ("running statistics" in groups) == (name in BATCH_NORMS)
    assert ("final state" in groups) == name.endswith("_steps")
    arrays = read(golden_file(name))
    assert ("eval attention" in groups) == ("eval/attention/0" in arrays)
    compared = len(arrays) - 1  # meta
    compared -= 3 * ("steps/lr" in arrays)  # images, teacher and rates are inputs of the steps
    compared -= sum(name.startswith("state2/") for name in arrays)  # likewise
    assert ("first state" in groups) == name.startswith(("bivit", "bhvit"))
    assert sum(row.count for row in rows) == compared


def test_patch_merging_passes(golden_file):
    rows = list(checking.check(golden_file("bivit_merging")))
    assert [row for row in rows if not row.passed] == []
    assert [(row.group, row.count) for row in rows] == [
        ("first output", 1),
        ("first state", 3),
        ("output", 1),
        ("gradients", 6),
        ("input gradient", 1),
    ]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("init/y", "first output"),
        ("init_state/reduction.alpha", "first state"),
        ("y", "output"),
        ("grad/reduction.act.zero_point", "gradients"),
        ("grad_input/x", "input gradient"),
    ],
)
def test_changed_patch_merging_is_found(golden_file, tmp_path, name, group):
    arrays = read(golden_file("bivit_merging"))
    arrays[name] = changed(arrays[name])
    rows = checking.check(write(tmp_path / "changed.npz", arrays))
    assert [row.group for row in rows if not row.passed] == [group]


@pytest.mark.parametrize(
    ("name", "value"),
    [("meta", np.array('{"case": "bivit_merging"}')), ("x", np.ones((2, 5, 5))), ("gy", np.ones(3))],
)
def test_patch_merging_of_another_shape(golden_file, tmp_path, capsys, name, value):
    refused(write(tmp_path / "other.npz", read(golden_file("bivit_merging")) | {name: value}), capsys)


def test_command_prints_a_table(golden_file, capsys):
    assert main(["check", str(golden_file("deit"))]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == str(golden_file("deit"))
    assert [line[2:22].strip() for line in lines[1:]] == [
        "inputs",
        "eval logits",
        "eval hidden",
        "eval attention",
        "train logits",
        "loss",
        "gradients",
        "input gradient",
    ]
    assert all("  pass  " in line for line in lines[1:])
    assert err == ""


# --- damaged files fail ------------------------------------------------------------------------


@pytest.mark.slow
def test_every_changed_output_is_found(check, golden_file):
    _, comparisons = check("react_deit_steps")
    unnoticed = set()
    for group, ours, golden, floors in comparisons:
        if group == "inputs":
            continue
        for name, array in golden.items():
            row = parity.compare(group, ours, golden | {name: changed(array)}, floors)
            if row.passed:
                unnoticed.add((group, name))
            else:
                assert (row.group, row.where) == (group, name)
    # The only exceptions are gradients of zero by cancellation: shifts in front of a norm.
    gradients = {
        name.removeprefix("grad/"): np.abs(array).max()
        for name, array in read(golden_file("react_deit_steps")).items()
        if name.startswith("grad/")
    }
    noise = {name for name, g in gradients.items() if g < 1e-13 * max(gradients.values())}
    assert noise
    assert unnoticed == {("gradients", name) for name in noise}


@pytest.mark.slow
def test_every_changed_input_is_found(golden_file):
    golden = parity.GoldenFile(golden_file("react_deit_steps"))
    subject = subject_of(golden.meta)
    assert checking._compare_inputs(golden, subject).passed
    names = [name for name in golden.arrays if name.startswith(("state/", "input/"))]
    assert len(names) > 100
    unnoticed = set()
    for name in names:
        original = golden.arrays[name]
        golden.arrays[name] = changed(original)
        row = checking._compare_inputs(golden, subject)
        golden.arrays[name] = original
        if row.passed:
            unnoticed.add(name)
        else:
            assert row.where == name
    # The only exceptions are counters, which neither side computes anything from.
    assert unnoticed == {name for name in names if name.endswith(".num_batches_tracked")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "array", "group"),
    [
        ("deit", "eval/logits", "eval logits"),
        ("deit", "grad/classifier.weight", "gradients"),
        ("deit", "state/vit.encoder.layer.0.attention.attention.key.bias", "inputs"),
        ("deit", "input/images", "inputs"),
    ],
)
def test_command_fails_on_a_changed_array(golden_file, tmp_path, capsys, file, array, group):
    arrays = read(golden_file(file))
    arrays[array] = changed(arrays[array])
    path = write(tmp_path / "changed.npz", arrays)
    assert main(["check", str(path)]) == 1
    out, err = capsys.readouterr()
    failed = [line for line in out.splitlines() if "  FAIL  " in line]
    # Changed inputs may show in everything computed from them.
    assert failed[0][2:].startswith(group)
    assert err == ""
    if group != "inputs":
        assert len(failed) == 1
        name = array.split("/", 1)[-1]
        assert failed[0].endswith(group if group == "eval logits" else name)


# --- the comparison ----------------------------------------------------------------------------


def row_of(ours, golden, **floors):
    golden = {name: np.asarray(array) for name, array in golden.items()}
    return parity.compare("group", ours, golden, floors)


def test_errors_are_relative_to_the_largest_magnitude():
    row = row_of({"a": np.array([1.0, 100.0])}, {"a": [1.5, -100.0 + 200]})
    assert row == parity.Row("group", 1, 0.005, "a", 0.005 / 1e-10)


def test_tolerance_goes_with_the_stored_dtype():
    for dtype, tolerance in ((np.float64, 1e-10), (np.float32, 1e-6), (np.float16, 1e-6)):
        golden = {"a": np.ones(3, dtype)}
        assert row_of({"a": np.full(3, 1 + 0.9 * tolerance)}, golden).passed
        assert not row_of({"a": np.full(3, 1 + 1.1 * tolerance)}, golden).passed


def test_the_worst_array_is_named():
    golden = {"a": np.ones(2), "b": np.ones(2), "c": np.ones(2, np.float32)}
    ours = {"a": np.ones(2) + 1e-9, "b": np.ones(2) + 1e-8, "c": np.ones(2) + 1e-7}
    assert row_of(ours, golden).where == "b"  # over its tolerance, unlike c


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_fail(value):
    golden = {"a": np.ones(2), "b": np.zeros(2)}
    ours = {"a": np.ones(2), "b": np.array([0, value])}
    row = row_of(ours, golden)
    assert not row.passed
    assert row.where == "b"
    assert not row_of({"a": np.ones(2)}, {"a": [1.0, value]}).passed


def test_names_and_shapes_must_agree():
    one = np.ones(3)
    for ours, golden, name in (
        ({}, {"a": one}, "a"),
        ({"a": one, "b": one}, {"a": one}, "b"),
        ({"a": np.ones((3, 1))}, {"a": one}, "a"),
        ({"a": np.ones(1)}, {"a": one}, "a"),
    ):
        row = row_of(ours, golden)
        assert (row.passed, row.where, row.error) == (False, name, np.inf)


def test_floors_are_the_least_scale():
    golden, ours = {"a": np.array([1e-17])}, {"a": np.array([-2e-17])}
    assert not row_of(ours, golden).passed
    assert row_of(ours, golden, a=1e-4).passed
    assert row_of({"a": np.array([1.0])}, {"a": [2.0]}, a=1e-4).error == 0.5


def test_floors_of_means_and_of_gradients_that_cancel():
    statistics = {
        "norm.running_mean": np.array([1e-9]),
        "norm.running_var": np.array([4.0]),
        "n": np.array(3),
    }
    assert _deviations(statistics) == {"norm.running_mean": 2.0}
    gradients = {"a": np.array([2.0]), "b": np.array([1e-3]), "move": np.array([1e-16])}
    floors = _gradient_floors(gradients)
    assert floors == {"a": 2e-4, "b": 2e-4, "move": 2e-3}


def test_zeros_have_a_scale_of_one():
    assert row_of({"a": np.zeros(2)}, {"a": np.zeros(2)}).passed
    assert row_of({"a": np.full(2, 1e-9)}, {"a": np.zeros(2)}).error == 1e-9


# --- files that cannot be read -----------------------------------------------------------------


@contextlib.contextmanager
def unclosed_files():
    """Collects what the interpreter says about files that were not closed."""
    messages = []
    gc.collect(0)  # what is new; all of them would take seconds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda event: messages.append(str(event.exc_value)))
        yield messages
        gc.collect(0)


def refused(path, capsys):
    """Returns what the command says about a file it cannot read, and checks how it says it."""
    assert main(["check", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


def test_files_that_cannot_be_read_are_closed(tmp_path):
    path = tmp_path / "damaged.npz"
    path.write_bytes(b"PK\x03\x04")
    with unclosed_files() as messages:
        assert main(["check", str(path)]) == 2
    assert messages == []


def test_missing_file(tmp_path, capsys):
    assert "expected a golden .npz file" in refused(tmp_path / "nothing.npz", capsys)


def test_directory(tmp_path, capsys):
    refused(tmp_path, capsys)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04", b"\x93NUMPY"])
def test_other_content(tmp_path, capsys, content):
    path = tmp_path / "other.npz"
    path.write_bytes(content)
    refused(path, capsys)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_truncated_file(golden_file, tmp_path, capsys, share):
    content = golden_file("deit").read_bytes()
    path = tmp_path / "truncated.npz"
    path.write_bytes(content[: int(share * len(content))])
    refused(path, capsys)


@pytest.mark.parametrize("position", [0.1, 0.5, 0.9])
def test_flipped_byte(golden_file, tmp_path, capsys, position):
    content = bytearray(golden_file("deit").read_bytes())
    content[int(position * len(content))] ^= 0xFF
    path = tmp_path / "flipped.npz"
    path.write_bytes(content)
    refused(path, capsys)


def test_archive_of_something_else(golden_file, tmp_path, capsys):
    units = golden_file("units")
    assert "'meta'" in refused(units, capsys)
    pickled = write(tmp_path / "pickled.npz", {"meta": np.array([{}], object)})
    refused(pickled, capsys)
    text = write(tmp_path / "text.npz", {"meta": np.array("not json")})
    refused(text, capsys)


def test_meta_of_another_model(golden_file, tmp_path, capsys):
    for key, value in (("model_type", "swin"), ("args", {}), ("num_classes", 0)):
        arrays = read(golden_file("deit"))
        golden = parity.GoldenFile(golden_file("deit"))
        arrays["meta"] = np.array(json.dumps(golden.meta | {key: value}))
        refused(write(tmp_path / "meta.npz", arrays), capsys)


@pytest.mark.parametrize("name", ["state/classifier.bias", "input/teacher_logits"])
def test_missing_arrays_are_named(golden_file, tmp_path, capsys, name):
    arrays = read(golden_file("deit"))
    del arrays[name]
    path = write(tmp_path / "missing.npz", arrays)
    assert name.removeprefix("state/") in refused(path, capsys)


def without(name):
    return lambda arrays: arrays.pop(name)


def meta_is_a_list(arrays):
    arrays["meta"] = np.array("[]")


def images_of_another_size(arrays):
    arrays["input/images"] = arrays["input/images"][..., :32, :32]


@pytest.mark.parametrize(
    "damage",
    [
        without("eval/logits"),
        without("train/logits"),
        without("train/loss"),
        meta_is_a_list,
        images_of_another_size,
    ],
)
def test_incomplete_files_are_refused(golden_file, tmp_path, capsys, damage):
    arrays = read(golden_file("deit"))
    damage(arrays)
    refused(write(tmp_path / "damaged.npz", arrays), capsys)


def test_a_single_array_is_refused(tmp_path, capsys):
    np.save(tmp_path / "array.npy", np.ones(3))
    refused(tmp_path / "array.npy", capsys)


def test_the_worst_status_counts(golden_file, tmp_path, capsys):
    path = tmp_path / "nothing.npz"
    assert main(["check", str(path), str(golden_file("deit"))]) == 2
    assert "pass" in capsys.readouterr().out  # the other file was checked all the same


def test_config_of_refuses_unknown_files():
    with pytest.raises(UserError, match="has no or an unknown 'model_type'"):
        parity.config_of({})


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"case": "bert", "kwargs": {}}, "case is 'bert'; expected one of deit_distilled, bivit_deit"),
        ({"case": "swin", "kwargs": {}}, "has no or an unknown 'img_size'"),
        ({"case": "swin", "kwargs": 3}, "has no or an unknown"),
        ({"kwargs": {}}, "has no or an unknown 'case'"),
    ],
)
def test_subjects_that_are_not_known(meta, message):
    with pytest.raises(UserError, match=message):
        subject_of(meta)
