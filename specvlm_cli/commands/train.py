"""`specvlm train VIDEOS... -o HEAD`: work out what the flags mean, run one start, show how it ended.

Torch is imported when the flags have turned out to make sense.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from specvlm.errors import ConfigError
from specvlm.host import usable_cores
from specvlm.training.settings import Schedule, TrainingSettings
from specvlm_cli.caption.settings import CaptionSettings
from specvlm_cli.commands.caption_flags import MOST
from specvlm_cli.commands.choices import (
    DEFAULT_PRESET,
    caption_settings,
    input_options,
    pair_of,
    read_limits,
    refuse_empty,
    root_of,
    runtime_limit_s,
    warn_of_unused_times,
)
from specvlm_cli.commands.options import picked
from specvlm_cli.commands.train_flags import TrainFlags
from specvlm_cli.durations import seconds
from specvlm_cli.exits import ExitCode, Flag, UsageError
from specvlm_cli.inputs import Inputs
from specvlm_cli.run.wanted import WantedVideos
from specvlm_cli.training.samples import Samples, Split, TrainingVideo, divided, videos_of
from specvlm_cli.training.talk import Speaker, ending

if TYPE_CHECKING:
    from specvlm.drafts.compressor import CompressorConfig
    from specvlm.training.objective import ObjectiveSettings
    from specvlm.training.ranks import Ranks
    from specvlm_cli.training.start import TrainingOutcome, TrainingRequest

_MODES = ("select", "weighted", "concat")
_MOST_DECODE_WORKERS = 4  # where the flag does not say
_HEAD_DEVICE = re.compile(r"cpu|mps|(cuda|xpu)(:[0-9]{1,4})?")


def train(flags: TrainFlags) -> int:
    """Train a draft head for a target on uncaptioned videos. Run again to resume.

    The frozen target captions the videos itself, and the head learns to guess what it writes. The folder HEAD is what
    --draft takes, from the first evaluation on: the best head so far, by accepted tokens on held-out videos.

    Several GPUs: accelerate launch --multi_gpu -m specvlm_cli train ...
    """
    pair = pair_of(flags.preset, flags.target)
    settings = caption_settings(flags, pair)
    training, schedule = TrainingSettings(**picked(flags, TrainingSettings)), _schedule(flags)
    share = _held_out_share(flags.held_out)
    split = Split(share or 0.0, flags.held_out_limit, flags.seed)
    _check_head_device(flags.head_device)
    max_runtime_s, limits = runtime_limit_s(flags), read_limits(flags)

    from specvlm.training.ranks import ranks_of_this_process
    from specvlm_cli.training import start

    head, objective = _head(flags), _objective(flags)
    ranks = ranks_of_this_process()
    with _speaker(flags, ranks) as talk:
        if flags.preset is None and flags.target is None:
            talk.note(
                f"no --preset or --target: using the tiny {DEFAULT_PRESET} target, it knows only drawn shapes"
            )
        found = ranks.first(_samples(flags, settings, split, share, talk) if ranks.rank == 0 else None)
        assert found is not None
        samples, unreadable = found
        if not samples.train:
            talk.note("nothing to do: no videos there")
            return _shown(_nothing(flags, samples), flags, ranks)
        workers = flags.decode_workers or _decode_workers(ranks.count)
        request = start.TrainingRequest(
            samples=samples,
            captions=settings,
            split=split,
            head=head,
            training=training,
            objective=objective,
            schedule=schedule,
            limits=limits,
            max_runtime_s=max_runtime_s,
            unreadable=unreadable,
            **picked(flags, start.TrainingRequest) | {"decode_workers": workers, "root": root_of(flags.root)},
        )
        return _run(request, ranks, talk, flags)


def _run(request: TrainingRequest, ranks: Ranks, talk: Speaker, flags: TrainFlags) -> int:
    from specvlm_cli.training import start

    outcome = start.run(request, ranks, talk, quiet=flags.quiet or ranks.rank > 0)
    if outcome.steps < outcome.total_steps or outcome.last is not None:
        (talk.note if outcome.exit_code == ExitCode.OK else talk.warn)(ending(outcome))
    return _shown(outcome, flags, ranks)


def _shown(outcome: TrainingOutcome, flags: TrainFlags, ranks: Ranks) -> int:
    if flags.json_output and ranks.rank == 0:
        print(json.dumps(outcome.as_json()))
    return outcome.exit_code


def _nothing(flags: TrainFlags, samples: Samples) -> TrainingOutcome:
    from specvlm_cli.training.start import TrainingOutcome

    code = ExitCode.SOME_FAILED if samples.problems and not flags.exit_zero else ExitCode.OK
    return TrainingOutcome(code, str(flags.out), 0, 0, left_out=len(samples.problems))


def _speaker(flags: TrainFlags, ranks: Ranks) -> Speaker:
    """The person hears of several processes what the first one says."""
    if ranks.rank:
        return Speaker(quiet=True, progress="none", silent=True)
    return Speaker(quiet=flags.quiet, verbose=flags.verbose, progress=flags.progress, log_file=flags.log_file)


# --- what the flags mean ---


def _schedule(flags: TrainFlags) -> Schedule:
    text = flags.checkpoint_every
    schedule = Schedule(**picked(flags, Schedule))
    try:
        if re.fullmatch(r"[0-9]{1,12}", text):
            return replace(schedule, checkpoint_steps=int(text))
        return replace(schedule, checkpoint_s=seconds("checkpoint_every", text))
    except ConfigError as error:
        fix = "give 1 or more steps, or a time, e.g. 5m"
        raise UsageError(Flag("checkpoint_every", text), "is out of range", fix=fix) from error


def _head(flags: TrainFlags) -> CompressorConfig:
    from specvlm.drafts.compressor import CompressorConfig

    given: dict[str, Any] = {"ratio": flags.compression_ratio, "queries": flags.queries}
    more = {name: value for name, value in given.items() if value is not None}
    if flags.compressor in _MODES:
        if flags.operators is not None:
            more["operators"] = tuple(one for one in re.split(r"[\s,]+", flags.operators) if one)
        return CompressorConfig(mode=flags.compressor, **more)  # type: ignore[arg-type]
    if flags.operators is not None:
        raise UsageError(
            Flag("operators", flags.operators),
            "has no effect on",
            Flag("compressor", flags.compressor),
            fix=f"it is for {', '.join(_MODES)}",
        )
    single = flags.compressor != "none"
    operators = (flags.compressor,) if single else ()
    return CompressorConfig(mode="single" if single else "none", operators=operators, **more)  # type: ignore[arg-type]


def _objective(flags: TrainFlags) -> ObjectiveSettings:
    from specvlm.training.objective import ObjectiveSettings

    objective = ObjectiveSettings(**picked(flags, ObjectiveSettings))
    if not objective.cross_entropy and not objective.smooth_l1:
        raise UsageError(
            Flag("cross_entropy", 0),
            "and",
            Flag("smooth_l1", 0),
            "leave nothing to learn",
            fix="give one of them a weight",
        )
    return objective


def _held_out_share(text: str) -> float | None:
    """Return the share of videos to hold out; None: it is a folder."""
    try:
        share = float(text)
    except ValueError:
        return None
    if not 0.0 <= share < 1.0:
        raise UsageError(
            Flag("held_out", text),
            "is out of range",
            fix="give a share of the videos, 0 or more and below 1, or a folder",
        )
    return share


def _check_head_device(device: str | None) -> None:
    if device is not None and not _HEAD_DEVICE.fullmatch(device):
        raise UsageError(
            Flag("head_device", repr(device)), "is unknown", fix="give cuda, cuda:N, xpu, xpu:N, mps or cpu"
        )


def _samples(
    flags: TrainFlags, settings: CaptionSettings, split: Split, share: float | None, talk: Speaker
) -> tuple[Samples, int]:
    """Return the samples, and how many folders could not be listed."""
    videos, problems, unreadable = _gathered(flags.inputs, flags, settings, flags.limit, talk)
    elsewhere: list[TrainingVideo] | None = None
    if share is None:
        elsewhere, more, also = _gathered([flags.held_out], flags, settings, flags.held_out_limit, talk)
        problems, unreadable = [*problems, *more], unreadable + also
        if not elsewhere:
            raise UsageError(
                Flag("held_out", flags.held_out), "holds no videos", fix="give others, or a share"
            )
    for problem in problems:
        talk.warn(f"left out: {problem.name}: {problem.reason}")
    return divided(videos, problems, split, elsewhere), unreadable


def _gathered(
    given: Sequence[str], flags: TrainFlags, settings: CaptionSettings, limit: int | None, talk: Speaker
) -> tuple[list[TrainingVideo], list[Any], int]:
    inputs = Inputs(given, input_options(flags, flags.extensions))
    with WantedVideos.gather(inputs, overlapping=len(given) > 1) as wanted:
        warn_of_unused_times(inputs, talk.warn)
        refuse_empty(inputs, "check the path and what is mounted there")
        videos, problems = videos_of(wanted, settings.prompts, limit)
    for folder in inputs.report.unreadable:
        talk.warn(f"left out, not readable: {folder}")
    return videos, problems, len(inputs.report.unreadable) + inputs.report.more_unreadable


def _decode_workers(processes: int) -> int:
    """As many as there are cores for each of our processes, but one for itself."""
    return max(1, min(_MOST_DECODE_WORKERS, usable_cores() // processes - 1, MOST))
