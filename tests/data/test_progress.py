import io
import logging
import sys

import pytest

from bvit_jax.data import progress
from bvit_jax.data.progress import ProgressBar


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with caplog.at_level(logging.INFO), ProgressBar("reading train", 300, done=100) as bar:
        for _ in range(150):
            bar.advance()
    assert "reading train" in terminal.getvalue()
    assert "250/300" in terminal.getvalue()
    assert not caplog.messages


def test_a_line_now_and_then_elsewhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO), ProgressBar("reading train", 3000, done=1000) as bar:
        for _ in range(1000):
            now += 0.125
            bar.advance()
    assert caplog.messages == [
        "reading train: 1,240 of 3,000 (41.3%), 4 minutes left",
        "reading train: 1,480 of 3,000 (49.3%), 3 minutes left",
        "reading train: 1,720 of 3,000 (57.3%), 3 minutes left",
        "reading train: 1,960 of 3,000 (65.3%), 2 minutes left",
        "reading train: 2,000 done",
    ]
    assert capfd.readouterr().out == ""


def test_an_error_is_not_reported_as_done(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        with ProgressBar("reading train", 3):
            raise KeyError

    with caplog.at_level(logging.INFO), pytest.raises(KeyError):
        fail()
    assert not caplog.messages
