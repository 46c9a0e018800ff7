"""`specvlm train VIDEOS... -o HEAD`: work out what the flags mean, run one start, show how it ended.

Torch is imported when the flags have turned out to make sense.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from specvlm.config import GenerationSettings, SpeculationSettings
from specvlm.errors import ConfigError
from specvlm.host import usable_cores
from specvlm.preset import Preset
from specvlm.training.settings import Schedule, TrainingSettings
from specvlm_cli.commands.caption_flags import MOST
from specvlm_cli.commands.choices import (
    DEFAULT_PRESET,
    check_models,
    frame_settings,
    input_options,
    model_choice,
    pair_of,
    prompt_texts,
    refuse_empty,
    root_of,
    text_of,
    warn_of_unused_times,
)
from specvlm_cli.commands.train_flags import TrainFlags
from specvlm_cli.decoding import Limits
from specvlm_cli.durations import positive_seconds, seconds
from specvlm_cli.exits import ExitCode, UsageError
from specvlm_cli.inputs import Inputs
from specvlm_cli.settings import CaptionSettings
from specvlm_cli.text import clean
from specvlm_cli.training.samples import Samples, Split, Video, divided, videos_of
from specvlm_cli.training.talk import Speaker, ending
from specvlm_cli.wanted import Wanted

if TYPE_CHECKING:
    from specvlm.training.objective import ObjectiveSettings
    from specvlm.training.ranks import Ranks
    from specvlm_cli.training.job import HeadChoice, Outcome, Request

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
    settings = _settings(flags, pair)
    training, schedule = _training(flags), _schedule(flags)
    share = _held_out_share(flags.held_out)
    split = Split(share or 0.0, flags.held_out_limit, flags.seed)
    head_device = _head_device(flags.head_device)
    max_runtime_s = (
        None if flags.max_runtime is None else positive_seconds("--max-runtime", flags.max_runtime)
    )
    limits = Limits(timeout_s=positive_seconds("--decode-timeout", flags.decode_timeout))

    from specvlm.training.ranks import ranks_of_this_process
    from specvlm_cli.training import job

    head, objective = _head(flags, head_device), _objective(flags)
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
        request = job.Request(
            out=flags.out,
            samples=samples,
            captions=settings,
            split=split,
            head=head,
            training=training,
            objective=objective,
            schedule=schedule,
            limits=limits,
            decode_workers=flags.decode_workers or _decode_workers(ranks.count),
            batch_size=flags.batch_size,
            root=root_of(flags.root),
            if_locked=flags.if_locked,
            max_runtime_s=max_runtime_s,
            exit_zero=flags.exit_zero,
            unreadable=unreadable,
        )
        return _run(request, ranks, talk, flags)


def _run(request: Request, ranks: Ranks, talk: Speaker, flags: TrainFlags) -> int:
    from specvlm_cli.training import job

    outcome = job.run(request, ranks, talk, quiet=flags.quiet or ranks.rank > 0)
    if outcome.steps < outcome.total_steps or outcome.last is not None:
        (talk.note if outcome.exit_code == ExitCode.OK else talk.warn)(ending(outcome))
    return _shown(outcome, flags, ranks)


def _shown(outcome: Outcome, flags: TrainFlags, ranks: Ranks) -> int:
    if flags.json_output and ranks.rank == 0:
        print(json.dumps(outcome.as_json()))
    return outcome.exit_code


def _nothing(flags: TrainFlags, samples: Samples) -> Outcome:
    from specvlm_cli.training.job import Outcome

    code = ExitCode.SOME_FAILED if samples.problems and not flags.exit_zero else ExitCode.OK
    return Outcome(code, str(flags.out), 0, 0, left_out=len(samples.problems))


def _speaker(flags: TrainFlags, ranks: Ranks) -> Speaker:
    """The person hears of several processes what the first one says."""
    if ranks.rank:
        return Speaker(quiet=True, progress="none", silent=True)
    return Speaker(quiet=flags.quiet, verbose=flags.verbose, progress=flags.progress, log_file=flags.log_file)


# --- what the flags mean ---


def _settings(flags: TrainFlags, pair: Preset | None) -> CaptionSettings:
    check_models(pair, flags.draft, flags.draft_revision, flags.device_map)
    return CaptionSettings(
        models=model_choice(flags, pair),
        prompts=prompt_texts(flags.prompt, pair),
        system=None if flags.system is None else text_of("--system", flags.system),
        frames=frame_settings(flags, pair),
        generation=GenerationSettings(flags.max_new_tokens, flags.temperature, flags.top_k, flags.seed),
        speculation=SpeculationSettings(),
    )


def _training(flags: TrainFlags) -> TrainingSettings:
    return TrainingSettings(flags.learning_rate, flags.accumulate, flags.clip_norm, flags.seed)


def _schedule(flags: TrainFlags) -> Schedule:
    text = flags.checkpoint_every
    schedule = Schedule(flags.epochs, flags.max_steps, flags.evaluate_every)
    try:
        if re.fullmatch(r"[0-9]{1,12}", text):
            return replace(schedule, checkpoint_steps=int(text))
        return replace(schedule, checkpoint_s=seconds("--checkpoint-every", text))
    except ConfigError as error:
        fix = "give 1 or more steps, or a time, e.g. 5m"
        raise UsageError(f"--checkpoint-every {clean(text)} is out of range; {fix}") from error


def _head(flags: TrainFlags, device: str | None) -> HeadChoice:
    from specvlm.drafts.compressor import CompressorConfig
    from specvlm_cli.training.job import HeadChoice

    given: dict[str, Any] = {"ratio": flags.compression_ratio, "queries": flags.queries}
    more = {name: value for name, value in given.items() if value is not None}
    if flags.compressor in _MODES:
        if flags.operators is not None:
            more["operators"] = tuple(one for one in re.split(r"[\s,]+", flags.operators) if one)
        compressor = CompressorConfig(mode=flags.compressor, **more)  # type: ignore[arg-type]
    else:
        if flags.operators is not None:
            raise UsageError(
                f"--operators {clean(flags.operators)} has no effect on --compressor {flags.compressor}; it is for "
                f"{', '.join(_MODES)}"
            )
        single = flags.compressor != "none"
        operators = (flags.compressor,) if single else ()
        compressor = CompressorConfig(mode="single" if single else "none", operators=operators, **more)  # type: ignore[arg-type]
    return HeadChoice(compressor, device)


def _objective(flags: TrainFlags) -> ObjectiveSettings:
    from specvlm.training.objective import ObjectiveSettings

    given: dict[str, Any] = {name: getattr(flags, name) for name in ("cross_entropy", "smooth_l1", "unroll")}
    objective = ObjectiveSettings(**{name: value for name, value in given.items() if value is not None})
    if not objective.cross_entropy and not objective.smooth_l1:
        raise UsageError(
            "--cross-entropy 0 and --smooth-l1 0 leave nothing to learn; give one of them a weight"
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
            f"--held-out {clean(text)} is out of range; give a share of the videos, 0 or more and below 1, or a folder"
        )
    return share


def _head_device(device: str | None) -> str | None:
    if device is not None and not _HEAD_DEVICE.fullmatch(device):
        raise UsageError(
            f"--head-device {clean(device)!r} is unknown; give cuda, cuda:N, xpu, xpu:N, mps or cpu"
        )
    return device


def _samples(
    flags: TrainFlags, settings: CaptionSettings, split: Split, share: float | None, talk: Speaker
) -> tuple[Samples, int]:
    """Return the samples, and how many folders could not be listed."""
    videos, problems, unreadable = _gathered(flags.inputs, flags, settings, flags.limit, talk)
    elsewhere: list[Video] | None = None
    if share is None:
        elsewhere, more, also = _gathered([flags.held_out], flags, settings, flags.held_out_limit, talk)
        problems, unreadable = [*problems, *more], unreadable + also
        if not elsewhere:
            raise UsageError(f"--held-out {clean(flags.held_out)} holds no videos; give others, or a share")
    for problem in problems:
        talk.warn(f"left out: {problem.name}: {problem.reason}")
    return divided(videos, problems, split, elsewhere), unreadable


def _gathered(
    given: Sequence[str], flags: TrainFlags, settings: CaptionSettings, limit: int | None, talk: Speaker
) -> tuple[list[Video], list[Any], int]:
    inputs = Inputs(given, input_options(flags))
    with Wanted.gather(inputs, overlapping=len(given) > 1) as wanted:
        warn_of_unused_times(inputs, talk.warn)
        refuse_empty(inputs, "check the path and what is mounted there")
        videos, problems = videos_of(wanted, settings.prompts, limit)
    for folder in inputs.report.unreadable:
        talk.warn(f"left out, not readable: {folder}")
    return videos, problems, len(inputs.report.unreadable) + inputs.report.more_unreadable


def _decode_workers(processes: int) -> int:
    """As many as there are cores for each of our processes, but one for itself."""
    return max(1, min(_MOST_DECODE_WORKERS, usable_cores() // processes - 1, MOST))
