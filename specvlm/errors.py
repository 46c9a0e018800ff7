"""Every error that `specvlm` raises on purpose.

    SpecvlmError
    ├── ConfigError          a setting is out of range, unknown, or contradicts another one
    ├── ModelError           a model cannot be used
    │   ├── ModelLoadError       it is not there, not safetensors, or not readable
    │   ├── UnknownFamilyError   no family file speaks its architecture
    │   └── IncompatibleDraftError   the draft does not fit the target
    ├── PromptError          the prompt cannot be turned into a model input
    ├── PreprocessError      the model's processor cannot take these frames
    ├── GenerationError      the models ran, but there is no caption
    │   ├── NonFiniteLogitsError     NaN or infinite logits
    │   └── GenerationTimeoutError   not within the time limit
    ├── TrainingError        a head cannot be trained: no memory, a loss that is not finite, damaged checkpoints
    └── VideoError           the video gives no frames; `.path`, `.stage` say which and where
        ├── VideoNotFoundError   no such file
        ├── PathDeniedError      it lies outside the folder that files may be read from
        ├── VideoUnavailableError    the system cannot read it now; another try may work
        │   └── VideoChangedError    it was changed, replaced or deleted while it was read
        ├── NotAVideoError       a file, but not a video (text, empty, folder, pipe, audio only, ...)
        ├── VideoDecodeError     a video whose frames cannot be decoded
        └── VideoRangeError      start and end select nothing

A message is one line: the value, the reason, the fix.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import dataclass

__all__ = [
    "ConfigError",
    "GenerationError",
    "GenerationTimeoutError",
    "IncompatibleDraftError",
    "ModelError",
    "ModelLoadError",
    "NonFiniteLogitsError",
    "NotAVideoError",
    "PathDeniedError",
    "PreprocessError",
    "PromptError",
    "SpecvlmError",
    "TrainingError",
    "UnknownFamilyError",
    "VideoChangedError",
    "VideoDecodeError",
    "VideoError",
    "VideoNotFoundError",
    "VideoRangeError",
    "VideoUnavailableError",
]


class SpecvlmError(Exception):
    """Base of all errors of this library."""


def brief(value: object) -> str:
    """Return a value as it may appear in a message: on one line, and shortened if it is long."""
    return " ".join(reprlib.repr(value).split())


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting that an error is about.

    Attributes:
        name: As in Python, e.g. `prune_ratio`.
        value: What it was set to.
    """

    name: str
    value: object

    @property
    def shown(self) -> str:
        """The value as it appears in a message."""
        return brief(self.value)

    def __str__(self) -> str:
        return f"{self.name}={self.shown}"


class SettingsError(Exception):
    """An error whose message names settings; the caller chooses how they are written.

    Attributes:
        args: The message without the fix: words, and the settings between them.
        fix: What to do about it; empty: the words say it.
    """

    def __init__(self, *parts: str | Setting, fix: str = "") -> None:
        super().__init__(*parts)
        self.fix = fix

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The settings that the message names."""
        return tuple(part for part in self.args if isinstance(part, Setting))

    def worded(self, name: Callable[[Setting], str]) -> str:
        """Return the message, with `name` for each setting. No space before a colon or comma."""
        parts = (name(part) if isinstance(part, Setting) else str(part) for part in self.args)
        spaced = (part if part.startswith((":", ",")) else f" {part}" for part in parts)
        text = "".join(spaced).removeprefix(" ")
        return f"{text}; {self.fix}" if self.fix else text

    def __str__(self) -> str:
        return self.worded(str)


class ConfigError(SettingsError, SpecvlmError, ValueError):
    """A setting is out of range, unknown, or contradicts another one."""


class ModelError(SpecvlmError):
    """A model cannot be used."""


class ModelLoadError(ModelError):
    """A model is not there, not in safetensors, or not readable."""


class UnknownFamilyError(ModelError):
    """No family of this library speaks the model's architecture."""


class IncompatibleDraftError(ModelError):
    """The draft does not fit the target: another family, tokenizer or video geometry."""


class PromptError(SpecvlmError, ValueError):
    """A prompt cannot be turned into a model input."""


class PreprocessError(SpecvlmError):
    """The model's processor cannot take these frames."""


class GenerationError(SpecvlmError):
    """The models ran, but there is no caption."""


class NonFiniteLogitsError(GenerationError):
    """The target produced NaN or infinite logits; nothing of that row can be trusted."""


class GenerationTimeoutError(GenerationError):
    """A caption was not done within the time limit that the caller gave."""


class TrainingError(SpecvlmError):
    """A head cannot be trained: there is no memory, the loss is not finite, or every checkpoint is damaged."""


class VideoError(SpecvlmError):
    """A video gives no frames.

    Attributes:
        path: The video as the caller named it, decoded with surrogate escapes.
        stage: `"open"` (the file), or `"decode"` (its frames).
    """

    stage = "open"

    def __init__(self, path: str, reason: str) -> None:
        # A file name may hold line breaks and escapes; a message is one line.
        shown = path if path.isprintable() else path.encode("unicode_escape").decode("ascii")
        super().__init__(f"{shown}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[VideoError], tuple[str, str]]:
        """Pickle by path and reason, so that the error survives the way out of a child process."""
        return type(self), (self.path, self.reason)


class VideoNotFoundError(VideoError):
    """There is no such file."""


class PathDeniedError(VideoError):
    """The opened file lies outside the folder that files may be read from."""


class VideoUnavailableError(VideoError):
    """The system cannot open or read the file now: a network mount, a disk, too many open files.

    The one kind of `VideoError` where another try may work.
    """


class VideoChangedError(VideoUnavailableError):
    """The file was changed, replaced or deleted while it was read."""


class NotAVideoError(VideoError):
    """The path names something, but not a video."""


class VideoDecodeError(VideoError):
    """The file is a video, but its frames cannot be decoded."""

    stage = "decode"


class VideoRangeError(VideoError):
    """`start_s` and `end_s` select no frame of this video."""

    stage = "decode"
