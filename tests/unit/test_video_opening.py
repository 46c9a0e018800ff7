"""Opening: what may be read, faults that may pass, and files that change under the reader."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from specvlm.config import FrameSettings
from specvlm.errors import (
    NotAVideoError,
    PathDeniedError,
    VideoChangedError,
    VideoDecodeError,
    VideoError,
    VideoUnavailableError,
)
from specvlm.video import opening, read_video
from specvlm.video.contents import Contents, ends_early
from specvlm.video.opening import open_video
from specvlm.video.reading import Hooks, Step, read
from tests import video_files
from tests.video_files import write_video

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=12)


@pytest.fixture
def tree(tmp_path: Path, clip: Path) -> Path:
    """`root` with a video in it, `root2` beside it with another one, and links between them."""
    for folder in ("root/below", "root2"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("root/a.mp4", "root/below/b.mp4", "root2/secret.mp4"):
        (tmp_path / name).write_bytes(clip.read_bytes())
    (tmp_path / "root/out.mp4").symlink_to(tmp_path / "root2/secret.mp4")
    (tmp_path / "root/up").symlink_to("..")
    (tmp_path / "root/in.mp4").symlink_to("below/b.mp4")
    (tmp_path / "other name").symlink_to("root")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("root/a.mp4", "root"),
        ("root/below/b.mp4", "root"),
        ("root/in.mp4", "root"),
        ("root2/../root/a.mp4", "root"),
        ("other name/a.mp4", "root"),
        ("root/a.mp4", "other name"),
        ("root/a.mp4", "."),
        ("root/a.mp4", "/"),
    ],
)
def test_files_below_the_root_are_read(path: str, root: str, tree: Path) -> None:
    assert len(read_video(tree / path, root=tree / root).pixels) == 4
    assert len(read_video(os.fsencode(tree / path), root=os.fsencode(tree / root)).pixels) == 4


@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("root2/secret.mp4", "root"),
        ("root/out.mp4", "root"),
        ("root/up/root2/secret.mp4", "root"),
        ("root/../root2/secret.mp4", "root"),
        ("root/a.mp4", "root/below"),
        ("root/a.mp4", "root/a.mp4"),
        ("root/a.mp4", "missing"),
    ],
)
def test_nothing_outside_the_root_is_read(
    path: str, root: str, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise AssertionError("it was read")

    monkeypatch.setattr(os, "read", refuse)
    with pytest.raises(PathDeniedError, match=r"only files below --root are read|check --root") as caught:
        read_video(tree / path, root=tree / root)
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


_MAY_PASS = ["EIO", "ESTALE", "ETIMEDOUT", "EMFILE", "ENFILE", "ENOMEM", "EAGAIN", "ENOTCONN"]


@pytest.mark.parametrize("name", _MAY_PASS)
def test_a_fault_of_opening_may_pass(name: str, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = getattr(errno, name)

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(VideoUnavailableError, match="cannot be opened"):
        read_video(clip)


def test_other_faults_of_opening_do_not_pass(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(VideoError) as caught:
        read_video(clip)
    assert not isinstance(caught.value, VideoUnavailableError)


@pytest.mark.parametrize("kind", ["h264", "ts", "vp9", "avi"])
@pytest.mark.parametrize("after_reads", [0, 1, 3, 20])
def test_a_failing_disk_is_not_the_end_of_the_file(
    kind: str, after_reads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFmpeg takes it for that, and would give frames of half a video, or call the file damaged."""
    path = video_files.noisy_maker(tmp_path)(kind)
    real, left = opening.read_at, after_reads

    def fail_later(descriptor: int, size: int, position: int) -> bytes:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, min(size, 2048), position)

    monkeypatch.setattr("specvlm.video.contents.read_at", fail_later)
    with pytest.raises(VideoUnavailableError, match=r"cannot be read .*; check its file system"):
        read_video(path, FrameSettings(backend="pyav"))


def test_contents_seek_and_read_as_files_do(clip: Path) -> None:
    data = clip.read_bytes()
    with open_video(clip) as file:
        contents = Contents(file)
        assert (contents.read(10), contents.tell()) == (data[:10], 10)
        assert contents.seek(-3, os.SEEK_END) == len(data) - 3
        assert (contents.read(10), contents.read(10)) == (data[-3:], b"")
        assert contents.seek(1 << 62) == 1 << 62
        assert contents.read(10) == b""
        assert (contents.seek(5), contents.seek(2, os.SEEK_CUR)) == (5, 7)
        contents.require_read()


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _ruin(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


_CHANGES: dict[str, tuple[Change, str]] = {
    "grows": (_append, "was changed while it was read; try again once it is complete"),
    "shrinks": (lambda path: os.truncate(path, 100), "was changed while it was read"),
    "is overwritten": (_ruin, "was changed while it was read"),
    "is touched": (lambda path: os.utime(path, ns=(0, 1)), "was changed while it was read"),
    "is replaced": (_replace, "was replaced while it was read; try again"),
    "is deleted": (lambda path: path.unlink(), "was deleted while it was read"),
    "its folder is renamed": (
        lambda path: path.parent.rename(path.parent.with_name("new")),
        "was deleted while it was read",
    ),
}


@pytest.mark.parametrize("step", ["index", "pyav"])
@pytest.mark.parametrize("kind", _CHANGES)
def test_a_file_that_changes_meanwhile_is_told(kind: str, step: Step, clip: Path, tmp_path: Path) -> None:
    change, words = _CHANGES[kind]
    path = tmp_path / "folder" / "video.mp4"
    path.parent.mkdir()
    path.write_bytes(clip.read_bytes())
    hooks = Hooks(began=lambda begun: change(path) and None if begun == step else None)
    with pytest.raises(VideoChangedError, match=words) as caught:
        read(path, FrameSettings(backend="pyav"), hooks=hooks)
    assert isinstance(caught.value, VideoUnavailableError)
    assert type(pickle.loads(pickle.dumps(caught.value))) is VideoChangedError


def test_the_source_says_which_file_it_was(clip: Path) -> None:
    source, status = read_video(clip).source, clip.stat()
    assert source is not None
    assert (source.flags, source.size_bytes, source.mtime_ns) == ((), status.st_size, status.st_mtime_ns)


@pytest.mark.parametrize("size", [1, 3, 8, 40, 600])
@pytest.mark.parametrize(
    "head",
    [
        b"\x00\x00\x00\x18ftypmp42",
        b"\x00\x00\x00\x01mdat" + bytes(8),  # a 64 bit length of 0
        b"\x00\x00\x00\x01mdat" + b"\xff" * 8,
        b"\x1a\x45\xdf\xa3",
        b"\x1a\x45\xdf\xa3\x01" + b"\xff" * 7,
        b"\x1a\x45\xdf\xa3\x00",
        b"\x1a\x45\xdf\xa3\xff\x18\x53\x80\x67",
        b"RIFF\x00\x00\x00\x00AVI ",
        b"RIFF\xff\xff\xff\xffAVI ",
    ],
)
def test_lying_lengths_of_containers_do_no_harm(head: bytes, size: int, tmp_path: Path) -> None:
    path = tmp_path / "file.mp4"
    path.write_bytes((head + bytes(size))[: max(size, 16)])
    with open_video(path) as file:
        for container in ("mov", "matroska", "avi", "mpegts"):
            assert ends_early(file, container) in (False, True)
    with pytest.raises((VideoDecodeError, NotAVideoError)):
        read_video(path)
