"""The benchmark that compiles for several topologies: its table and its verdicts."""

import pytest

from benchmarks import topologies


def figures(**changes: object) -> dict:
    traffic = {"gradient": (1, 360), "batch_norm_forward": (4, 40), "batch_norm_backward": (2, 40)}
    traffic["other"] = (0, 4)
    return {
        "model": "binaryvit",
        "devices": 8,
        "images_per_device": 32,
        "parameters_bytes": 400,
        "arguments_mb": 1.0,
        "temporaries_mb": 8.0,
        "program_mb": 1.0,
        "total_mb": 10.0,
        "chip_mb": 16.0,
        "gflops_per_image": 3.0,
        "gb_accessed_per_image": 2.0,
        "gb_of_memory_per_image": 1.0,
        "flops_ms": 1.0,
        "bytes_ms": 2.0,
        "bound_ms": 2.0,
        "images_per_second_bound": 128000.0,
        "compile_seconds": 60.0,
        "collectives": {"all-reduce": {"count": 7, "bytes": 444}},
        "collectives_for": {name: {"count": n, "bytes": size} for name, (n, size) in traffic.items()},
        **changes,
    }


def test_equal_chips_pass() -> None:
    found = [figures(), figures(devices=64, total_mb=10.4)]
    assert all(topologies.checks(found).values())
    assert topologies.checks(found).keys() == topologies.checks(found[:1]).keys()


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"total_mb": 10.6}, "memory"),
        ({"bound_ms": 1.8}, "least time"),
        ({"parameters_bytes": 200}, "reduced twice"),
        ({"parameters_bytes": 4000}, "reduced twice"),
        (
            {
                "collectives_for": figures()["collectives_for"]
                | {"batch_norm_forward": {"count": 8, "bytes": 40}}
            },
            "collectives of batch norms",
        ),
    ],
)
def test_what_grows_fails(changes: dict, failed: str) -> None:
    results = topologies.checks([figures(), figures(**changes)])
    assert [text for text, holds in results.items() if not holds] == [
        text for text in results if failed in text
    ]
    assert not all(results.values())


def test_the_table_has_a_column_for_each_topology() -> None:
    lines = topologies.table({"v5e:4x2": figures(), "v5e:8x8": figures(devices=64)}).splitlines()
    assert lines[0] == "| | v5e:4x2 | v5e:8x8 |"
    assert lines[1] == "|---|---|---|"
    assert "| chips | 8 | 64 |" in lines
    assert "| images per step | 256 | 2048 |" in lines


def test_wrong_topologies_end_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert topologies.main(["--config", "configs/digits.py", "--topology", "v5e:2x2x2"]) == 1
    assert "v5e has 2 dimensions" in capsys.readouterr().err
