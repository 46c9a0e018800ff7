"""specvlm: caption videos with a large video LLM, losslessly and faster, by speculative decoding.

    captioner = specvlm.load("demo")
    print(captioner.caption("clip.mp4", "Describe the video.").text)

Implements SpecVLM (arXiv 2508.16201); not its authors' code. Importing this package imports neither torch nor
transformers; using `load` or a captioner does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from specvlm.captioner import Captioner as Captioner
    from specvlm.captioner import Done as Done
    from specvlm.captioner import ModelInfo as ModelInfo
    from specvlm.captioner import PreparedVideo as PreparedVideo
    from specvlm.config import FrameSettings as FrameSettings
    from specvlm.config import GenerationSettings as GenerationSettings
    from specvlm.config import SpeculationSettings as SpeculationSettings
    from specvlm.drafts.kept_tokens import MostUsed as MostUsed
    from specvlm.errors import ConfigError as ConfigError
    from specvlm.errors import GenerationError as GenerationError
    from specvlm.errors import GenerationTimeoutError as GenerationTimeoutError
    from specvlm.errors import IncompatibleDraftError as IncompatibleDraftError
    from specvlm.errors import ModelError as ModelError
    from specvlm.errors import ModelLoadError as ModelLoadError
    from specvlm.errors import NonFiniteLogitsError as NonFiniteLogitsError
    from specvlm.errors import NotAVideoError as NotAVideoError
    from specvlm.errors import PathDeniedError as PathDeniedError
    from specvlm.errors import PreprocessError as PreprocessError
    from specvlm.errors import PromptError as PromptError
    from specvlm.errors import SpecvlmError as SpecvlmError
    from specvlm.errors import TrainingError as TrainingError
    from specvlm.errors import UnknownFamilyError as UnknownFamilyError
    from specvlm.errors import VideoChangedError as VideoChangedError
    from specvlm.errors import VideoDecodeError as VideoDecodeError
    from specvlm.errors import VideoError as VideoError
    from specvlm.errors import VideoNotFoundError as VideoNotFoundError
    from specvlm.errors import VideoRangeError as VideoRangeError
    from specvlm.errors import VideoUnavailableError as VideoUnavailableError
    from specvlm.loading import load as load
    from specvlm.preset import Preset as Preset
    from specvlm.preset import presets as presets
    from specvlm.records import Caption as Caption
    from specvlm.records import CaptionStats as CaptionStats
    from specvlm.records import Frames as Frames
    from specvlm.records import VideoSource as VideoSource
    from specvlm.session import PromptSession as PromptSession

_HOME = {
    "Caption": "records",
    "CaptionStats": "records",
    "Captioner": "captioner",
    "ConfigError": "errors",
    "Done": "captioner",
    "FrameSettings": "config",
    "Frames": "records",
    "GenerationError": "errors",
    "GenerationTimeoutError": "errors",
    "GenerationSettings": "config",
    "IncompatibleDraftError": "errors",
    "ModelError": "errors",
    "ModelInfo": "captioner",
    "ModelLoadError": "errors",
    "MostUsed": "drafts.kept_tokens",
    "NonFiniteLogitsError": "errors",
    "NotAVideoError": "errors",
    "PathDeniedError": "errors",
    "PreparedVideo": "captioner",
    "Preset": "preset",
    "PreprocessError": "errors",
    "PromptError": "errors",
    "PromptSession": "session",
    "SpeculationSettings": "config",
    "SpecvlmError": "errors",
    "TrainingError": "errors",
    "UnknownFamilyError": "errors",
    "VideoChangedError": "errors",
    "VideoDecodeError": "errors",
    "VideoError": "errors",
    "VideoNotFoundError": "errors",
    "VideoRangeError": "errors",
    "VideoSource": "records",
    "VideoUnavailableError": "errors",
    "load": "loading",
    "presets": "preset",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used."""
    if name == "video":
        return importlib.import_module("specvlm.video")
    if name not in _HOME:
        raise AttributeError(f"module 'specvlm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"specvlm.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All public names."""
    return __all__
