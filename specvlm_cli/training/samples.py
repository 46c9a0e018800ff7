"""The videos of a training, the samples that they make, and which of them are held out. Reads no video.

What is held out, and in which order samples come, is decided by hashes of ids and numbers, so a restart finds the same.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from os import fsdecode
from typing import NamedTuple

from specvlm_cli.exits import UsageError
from specvlm_cli.run.wanted import WantedVideos


@dataclass(frozen=True, slots=True)
class TrainingVideo:
    """One video, or a part of it, with all that is asked about it.

    Attributes:
        id: As a run of `caption` has it.
        path: Absolute.
        start_s: Start of the part; None: of the video.
        end_s: End of the part; None: of the video.
        prompts: One sample each.
        own_prompts: They came with the video, from a manifest.
    """

    id: str
    path: bytes
    start_s: float | None
    end_s: float | None
    prompts: tuple[str, ...]
    own_prompts: bool = False

    @property
    def name(self) -> str:
        """For people."""
        return fsdecode(self.path)


class TrainingSample(NamedTuple):
    """One question about one video."""

    video: TrainingVideo
    prompt: int  # its index


class Problem(NamedTuple):
    """A row of a manifest that names no video."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Samples:
    """What a training is about.

    Attributes:
        train: Samples to learn from, in the order of the inputs.
        held_out: Videos that are never learned from.
        problems: Rows of manifests that name no video.
    """

    train: tuple[TrainingSample, ...]
    held_out: tuple[TrainingVideo, ...]
    problems: tuple[Problem, ...] = ()

    def digest(self) -> str:
        """16 hex digits for all samples, in order."""
        digest = hashlib.sha256()
        for video in (*(sample.video for sample in self.train if sample.prompt == 0), *self.held_out):
            digest.update(json.dumps([video.id, video.prompts]).encode())
        return f"{digest.hexdigest()[:16]} of {len(self.train)} samples"


@dataclass(frozen=True, slots=True)
class Split:
    """Which videos are held out.

    Attributes:
        share: Of the videos, 0..1.
        most: Most of them.
        seed: Chooses.
    """

    share: float
    most: int
    seed: int

    def chosen(self, videos: Sequence[TrainingVideo]) -> set[str]:
        """Ids of the videos that are held out: at least one, where any is to be."""
        count = min(max(round(self.share * len(videos)), 1), self.most) if self.share else 0
        return set(sorted((video.id for video in videos), key=self._rank)[:count])

    def _rank(self, identity: str) -> bytes:
        return hashlib.sha256(f"held out {self.seed} {identity}".encode("utf-8", "surrogatepass")).digest()


def videos_of(
    wanted: WantedVideos, prompts: tuple[str, ...], limit: int | None
) -> tuple[list[TrainingVideo], list[Problem]]:
    """Return the videos of a start, at most `limit`, and what is wrong with rows that name none."""
    videos: list[TrainingVideo] = []
    problems: list[Problem] = []
    with closing(sqlite3.connect(f"{wanted.path.as_uri()}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT id, path, start_s, end_s, prompts, problem FROM video ORDER BY place")
        for identity, path, start_s, end_s, own, problem in rows:
            if problem is not None:
                problems.append(Problem(fsdecode(path) or f"id {identity}", problem))
            elif limit is None or len(videos) < limit:
                asked = prompts if own is None else tuple(json.loads(own))
                videos.append(TrainingVideo(identity, path, start_s, end_s, asked, own is not None))
    return videos, problems


def divided(
    videos: Sequence[TrainingVideo],
    problems: Iterable[Problem],
    split: Split,
    elsewhere: Sequence[TrainingVideo] | None,
) -> Samples:
    """Return the samples to learn from, and what is held out: of these videos, or those from `elsewhere`.

    Raises:
        UsageError: Nothing would be left to learn from.
    """
    if elsewhere is None:
        chosen = split.chosen(videos)
        held_out = [video for video in videos if video.id in chosen]
        train = [video for video in videos if video.id not in chosen]
    else:  # an id is that of a path below its input, so two inputs may have the same
        held_out = [replace(video, id=f"held out {video.id}") for video in elsewhere]
        files = {_part(video) for video in elsewhere}
        train = [video for video in videos if _part(video) not in files]
    if not train and videos:
        told = "1 video" if len(videos) == 1 else f"{len(videos)} videos"
        raise UsageError(
            f"{told} given, and nothing would be left to learn from; give more, or --held-out 0, or other videos "
            "to --held-out"
        )
    return Samples(tuple(_samples(train)), tuple(held_out), tuple(problems))


def _part(video: TrainingVideo) -> tuple[bytes, float | None, float | None]:
    return video.path, video.start_s, video.end_s


def _samples(videos: Iterable[TrainingVideo]) -> Iterator[TrainingSample]:
    for video in videos:
        for index in range(len(video.prompts)):
            yield TrainingSample(video, index)
