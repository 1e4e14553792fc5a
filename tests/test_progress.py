"""A bar on terminals, nothing elsewhere, and the items unchanged on both."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from jaxcompress.progress import track

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def terminal(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> Capture:
    """Captured standard error that says it is a terminal."""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return capsys


def test_nothing_is_printed_where_there_is_no_terminal(capsys: Capture) -> None:
    assert list(track(range(5), "loading")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_the_description_and_how_far_it_is(terminal: Capture) -> None:
    assert list(track(["a", "b"], "loading model.jc")) == ["a", "b"]
    printed = terminal.readouterr()
    assert printed.out == ""
    assert "loading model.jc" in printed.err
    assert "100%" in printed.err


def test_items_without_a_length_are_counted_against_the_total(
    terminal: Capture,
) -> None:
    assert list(track(iter("abcd"), "reading", total=8)) == ["a", "b", "c", "d"]
    printed = terminal.readouterr().err
    assert "50%" in printed
    assert "100%" not in printed


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("total", [None, 3])
def test_items_are_taken_one_at_a_time_on_a_terminal(total: int | None) -> None:
    assert_lazy(total)


def test_items_are_taken_one_at_a_time_elsewhere() -> None:
    assert_lazy(None)


def assert_lazy(total: int | None) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for i in range(3):
            taken.append(i)
            yield i

    for i in track(items(), "working", total=total):
        assert taken == list(range(i + 1))
    assert taken == [0, 1, 2]


HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


def test_a_loop_left_early_gives_the_cursor_back(terminal: Capture) -> None:
    bar = track(range(3), "working")
    assert next(bar) == 0
    printed = terminal.readouterr().err
    assert HIDE_CURSOR in printed
    assert SHOW_CURSOR not in printed
    bar.close()  # type: ignore[attr-defined]
    assert SHOW_CURSOR in terminal.readouterr().err


@pytest.mark.usefixtures("terminal")
def test_no_items_are_no_error() -> None:
    assert list(track([], "working")) == []
