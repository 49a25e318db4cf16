import os
import subprocess
import sys
from pathlib import Path

import pytest

from bvit_jax.files import parse_json, read_json
from tests.bucket import serving


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


IN_A_BUCKET = """
import sys
from pathlib import Path
import pytest
from bvit_jax import files

run = files.any_path("gs://bucket/runs/a")
assert files.in_bucket(run) and run.absolute() == run and not run.is_dir()
files.create_file(run / "lock", b"first")
with pytest.raises(FileExistsError):
    files.create_file(run / "lock", b"second")
assert run.is_dir() and (run / "lock").read_bytes() == b"first"

with pytest.raises(FileNotFoundError, match="No such file or directory: 'gs://bucket/runs/a/log'"):
    files.append(run / "log", "x")
files.append(run / "log", "1", make=True)
files.append_line(run / "log", "2")
files.append_line(run / "lines", "3")
assert (run / "log").read_text() == "12\\n" and (run / "lines").read_text() == "3\\n"

files.replace_file(run / "x.json", b"[1, 2]")
assert files.read_json(run / "x.json") == [1, 2]
with pytest.raises(ValueError, match="it has 6 bytes; expected at most 5"):
    files.read_json(run / "x.json", limit=5)
with files.replacing(run / "picture.png") as local:
    local.write_bytes(b"dots")
local = Path(sys.argv[1])
(local / "a" / "b").mkdir(parents=True)
(local / "a" / "b" / "c").write_text("c")
files.copy_into(local, run / "profile")
(run / "lock").unlink()
(run / "lock").unlink(missing_ok=True)
found = sorted(str(path.relative_to(run)) for path in run.rglob("*"))
assert found == ["lines", "log", "picture.png", "profile/a/b/c", "x.json"], found
"""


@pytest.mark.slow
def test_files_in_a_bucket(tmp_path: Path) -> None:
    with serving() as bucket:
        subprocess.run(
            [sys.executable, "-W", "error", "-c", IN_A_BUCKET, str(tmp_path)],
            env={**os.environ, **bucket.variables()},
            check=True,
            timeout=120,
        )
