from pathlib import Path

import pytest

from bvit_jax.files import parse_json, read_json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "its brackets are nested too deeply"),
        ('{"a":' * 100_000, "its brackets are nested too deeply"),
        ("[" + "[]," * 3_000_000 + "0]", "it has about 6,000,001 values; expected at most 4,194,304"),
        (" " * ((1 << 26) + 1), "it has 67,108,865 bytes; expected at most 67,108,864"),
        ("[1, ", "Expecting value"),
    ],
)
def test_json_made_to_harm(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "x.json")


def test_json_as_other_programs_write_it(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + '{"ü": [1, "\U0001f600"]}'.encode())
    assert read_json(tmp_path / "x.json") == {"ü": [1, "\U0001f600"]}
    kept = parse_json('[{"a": {"b": 1}}, 2]', keep=lambda found: list(found.items()))
    assert kept == [[("a", [("b", 1)])], 2]
