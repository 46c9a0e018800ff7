"""Errors: one tree, one line, and the way through a pickle."""

from __future__ import annotations

import pickle

import pytest

from specvlm import errors
from specvlm.errors import NotAVideoError, SpecvlmError, VideoError


def test_all_are_of_one_tree_and_drawn_in_the_docstring() -> None:
    assert errors.__all__ == sorted(errors.__all__)
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), SpecvlmError)
        assert name in (errors.__doc__ or "")


@pytest.mark.parametrize(
    "path", ["clip.mp4", "two\nlines.mp4", "\x1b[31mred.mp4", "byte-\udcff.mp4", "漢字.mp4"]
)
def test_a_video_error_is_one_harmless_line_and_keeps_its_path(path: str) -> None:
    error = NotAVideoError(path, "it is text; give a video")
    assert str(error).isprintable()
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, VideoError)
    assert (type(again), again.path, again.reason, str(again)) == (
        type(error),
        path,
        error.reason,
        str(error),
    )
