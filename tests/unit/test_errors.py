"""Errors: one tree, one line, and the way through a pickle."""

from __future__ import annotations

import pickle

import pytest

from specvlm import errors
from specvlm.config import FrameSettings, SpeculationSettings
from specvlm.errors import ConfigError, NotAVideoError, Setting, SpecvlmError, VideoError
from specvlm_cli.exits import Flag, UsageError, as_flag


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


def test_an_error_about_settings_carries_them_and_the_command_line_writes_them_as_flags() -> None:
    with pytest.raises(ConfigError) as caught:
        SpeculationSettings(tree="static", depth=3)
    error = pickle.loads(pickle.dumps(caught.value))
    assert error.settings == (Setting("depth", 3), Setting("tree", "static"))
    assert error.fix == "it is for auto, dynamic, chain"
    assert str(error) == "depth=3 has no effect on tree='static'; it is for auto, dynamic, chain"
    assert (
        error.worded(as_flag) == "--depth 3 has no effect on --tree 'static'; it is for auto, dynamic, chain"
    )
    with pytest.raises(ConfigError, match="backend='vlc' is unknown; choose one of auto") as caught:
        FrameSettings(backend="vlc")  # type: ignore[arg-type]
    assert caught.value.worded(as_flag).startswith("--video-backend 'vlc' is unknown; ")


def test_a_usage_error_shows_flags_as_they_were_typed() -> None:
    error = UsageError(Flag("max_runtime", "two\nlines"), ": no time", fix="give some")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.settings) == (r"--max-runtime two\x0alines: no time; give some", error.settings)
    assert str(UsageError("nothing to do; give videos")) == "nothing to do; give videos"
