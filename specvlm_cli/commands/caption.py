"""`specvlm caption INPUT... -o OUT`: work out what the flags mean, run one start, show how it ended."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from functools import partial
from typing import Any

import specvlm
from specvlm.host import usable_cores
from specvlm.preset import Preset
from specvlm.words import amount
from specvlm_cli import vocab
from specvlm_cli.caption import engine, start
from specvlm_cli.caption.gpus import smallest_memory_bytes
from specvlm_cli.caption.outcome import Outcome
from specvlm_cli.caption.policy import Policy
from specvlm_cli.caption.settings import CaptionSettings
from specvlm_cli.caption.start import CaptionRequest
from specvlm_cli.checkpoints import largest_that_fits
from specvlm_cli.commands.caption_flags import MOST, CaptionFlags
from specvlm_cli.commands.choices import (
    AUTO_PRESET,
    DEFAULT_PRESET,
    caption_settings,
    draft_of,
    input_options,
    pair_of,
    read_limits,
    refuse_empty,
    root_of,
    runtime_limit_s,
    warn_of_unused_times,
)
from specvlm_cli.commands.options import PREFIX, picked, variable
from specvlm_cli.console.messages import Talk, counted
from specvlm_cli.console.safe_text import clean, short
from specvlm_cli.durations import positive_seconds, seconds
from specvlm_cli.exits import ExitCode, Flag, UsageError, excluding
from specvlm_cli.inputs import InputOptions, Inputs
from specvlm_cli.run.ledger import Planned
from specvlm_cli.run.shard import Shard, parse_shard
from specvlm_cli.run.wanted import WantedVideos

_FEWEST_DECODE_WORKERS, _MOST_DECODE_WORKERS = 4, 8  # where the flag does not say


def caption(flags: CaptionFlags) -> int:
    """Caption new videos. Run again to resume.

    Each flag can also be set by an environment variable, e.g. SPECVLM_PRUNE_RATIO for --prune-ratio, or in a
    TOML file given with --config. Flags override the environment, which overrides the file.
    """
    if flags.dry_run and flags.reshard:
        what = (Flag("dry_run"), "touches nothing, and", Flag("reshard"), "divides the run folder")
        raise UsageError(*what, fix="give one of them")
    flags, about_preset = _with_preset(flags)
    policy = check(flags)
    shard = Shard() if flags.shard is None else parse_shard(flags.shard)
    with _talk(flags) as talk:
        _tell_unknown_variables(talk)
        inputs = Inputs(flags.inputs, _input_options(flags, shard))
        with WantedVideos.gather(inputs, overlapping=len(flags.inputs) > 1) as wanted:
            _tell_what_was_left_out(inputs, wanted, talk)
            if not flags.allow_empty:
                refuse_empty(inputs, "check the path and what is mounted there, or give --allow-empty")
            request = _request(flags, inputs, wanted, policy, shard)
            if about_preset:
                say = talk.warn if flags.preset == DEFAULT_PRESET else talk.note
                request = replace(request, before_loading=partial(say, about_preset))
            return _show_plan(request, talk, flags) if flags.dry_run else _run(request, talk, flags)


def _with_preset(flags: CaptionFlags) -> tuple[CaptionFlags, str]:
    """Return the flags with a preset in place of `auto`, and the line that names it; empty: one was given."""
    if flags.target is not None or flags.preset not in (None, AUTO_PRESET):
        return flags, ""
    gpu_bytes = smallest_memory_bytes()
    found = None if gpu_bytes is None else largest_that_fits(gpu_bytes)
    if found is not None:
        assert gpu_bytes is not None
        return replace(flags, preset=found.name), (
            f"--preset {AUTO_PRESET}: {found.name}, the largest whose pair fits {amount(gpu_bytes)} of GPU memory"
        )
    why = "there is no GPU" if gpu_bytes is None else f"no preset fits {amount(gpu_bytes)} of GPU memory"
    return replace(flags, preset=DEFAULT_PRESET), (
        f"--preset {AUTO_PRESET}: {why}, so these are captions of the {DEFAULT_PRESET} models, which describe drawn "
        "shapes only; name a model with --preset or --target"
    )


def check(flags: CaptionFlags) -> Policy:
    """Work out what the flags mean, reading no input.

    Raises:
        UsageError: They make no sense, or contradict each other.
        ConfigError: A setting is out of range.
    """
    given = None if flags.preset == AUTO_PRESET and flags.target is None else flags.preset
    pair = pair_of(given, flags.target)
    captions = caption_settings(flags, pair)
    _refuse_pointless_baseline(captions, pair, flags.baseline_sample)
    return _policy(flags, captions, pair)


def _talk(flags: CaptionFlags) -> Talk:
    return Talk(quiet=flags.quiet, verbose=flags.verbose, progress=flags.progress, log_file=flags.log_file)


def _policy(flags: CaptionFlags, captions: CaptionSettings, pair: Preset | None) -> Policy:
    devices, all_gpus = _devices(flags)
    return Policy(
        captions,
        baseline_sample=flags.baseline_sample,
        limit=flags.limit,
        max_failures=_most_failures(flags),
        retries=flags.retries,
        timeout_s=positive_seconds("timeout", flags.timeout),
        grace_s=seconds("grace", flags.grace),
        on_oom=flags.on_oom,
        devices=devices,
        all_gpus=all_gpus,
        cpu_workers=_cpu_workers(flags, pair),
        decode_workers=flags.decode_workers or _decode_workers(),
        limits=read_limits(flags),
        root=root_of(flags.root),
    )


def _request(
    flags: CaptionFlags,
    inputs: Inputs,
    wanted: WantedVideos,
    policy: Policy,
    shard: Shard,
) -> CaptionRequest:
    return CaptionRequest(
        wanted,
        policy=policy,
        version=specvlm.__version__,
        kept=dict(inputs.kept),
        unreadable=len(inputs.report.unreadable) + inputs.report.more_unreadable,
        max_runtime_s=runtime_limit_s(flags),
        **picked(flags, CaptionRequest) | {"shard": shard},
    )


def _input_options(flags: CaptionFlags, shard: Shard) -> InputOptions:
    kept = tuple(name for name in (one.strip() for one in flags.keep_columns.split(",")) if name)
    min_age_s = seconds("min_age", flags.min_age)
    return input_options(flags, flags.extensions, keep_columns=kept, min_age_s=min_age_s, shard=shard)


def _tell_unknown_variables(talk: Talk) -> None:
    """A misspelt variable would otherwise do nothing, unnoticed."""
    known = {variable(f"--{name.replace('_', '-')}") for name in CaptionFlags.__dataclass_fields__}
    known |= {variable(long) for long in ("--json", "--inputs")}
    for name in sorted(set(os.environ) - known):
        if name.startswith(PREFIX):
            talk.note(f"{clean(name)} is set, and no flag of caption has that name")


def _tell_what_was_left_out(inputs: Inputs, wanted: WantedVideos, talk: Talk) -> None:
    report = inputs.report
    warn_of_unused_times(inputs, talk.warn)
    for column, name in inputs.renamed.items():
        talk.note(
            f"--keep-columns {clean(column)}: a row has a {clean(column)} of its own, so it is called {clean(name)}"
        )
    for folder in report.unreadable:
        talk.warn(f"left out, not readable: {folder}")
    if report.more_unreadable:
        talk.warn(f"left out, not readable: {counted(report.more_unreadable, 'more folder')}")
    if wanted.doubles:
        talk.note(f"{counted(wanted.doubles, 'row')} merged with earlier ones of the same video")
    if report.too_young:
        talk.note(f"{counted(report.too_young, 'file')} left for the next start: younger than --min-age")


def _run(request: CaptionRequest, talk: Talk, flags: CaptionFlags) -> int:
    factory = engine.Factory(
        _counted_in_captions(request, talk),
        quiet=flags.quiet,
        batch_size=flags.batch_size,
        readers=request.policy.decode_workers,
    )
    outcome = start.run(request, factory, talk)
    talk.close(outcome, overwriting=request.overwrite)
    if flags.json_output:
        _print_json(outcome)
    return outcome.exit_code


def _counted_in_captions(request: CaptionRequest, talk: Talk) -> CaptionSettings:
    """Return the settings; a draft vocabulary given as a number holds the tokens that earlier captions use most."""
    settings, size = request.settings, request.settings.models.draft_vocab
    if not isinstance(size, int):
        return settings
    most_used = vocab.most_used(size, start.choose_folder(request).root)
    talk.note(f"--draft-vocab {size}: {vocab.origin(most_used)}")
    return replace(settings, models=replace(settings.models, draft_vocab=most_used))


def _show_plan(request: CaptionRequest, talk: Talk, flags: CaptionFlags) -> int:
    request.before_loading()
    lines: list[str] = []
    planned = start.plan(
        request, lambda one: lines.append(_planned(one)) if flags.json_output else print(_planned(one))
    )
    if flags.json_output:
        _print_json(planned.outcome, would_caption=lines)
    for problem in planned.problems:
        talk.warn(f"would fail: {problem}")
    if planned.bad_rows > len(planned.problems):
        talk.warn(f"would fail: {planned.bad_rows - len(planned.problems)} more rows that name no video")
    videos, outcome = counted(planned.videos, "video"), planned.outcome
    talk.note(f"{videos} would be captioned into {outcome.out}; {outcome.done} are done")
    return ExitCode.OK


def _planned(one: Planned) -> str:
    """Return the path, and for a part of a video its times behind tabs."""
    path = clean(os.fsdecode(one.path))
    if one.start_s is None and one.end_s is None:
        return path
    return "\t".join((path, f"{one.start_s or 0.0:g}", "" if one.end_s is None else f"{one.end_s:g}"))


def _print_json(outcome: Outcome, **more: Any) -> None:
    print(json.dumps(outcome.as_json() | more))


def _decode_workers() -> int:
    """Leave most cores to what else is to be done: reading is cheaper than generating.

    At least four: for small videos, most of the time is waiting for processes to begin and to be heard.
    """
    return max(_FEWEST_DECODE_WORKERS, min(_MOST_DECODE_WORKERS, usable_cores() // 2))


def _cpu_workers(flags: CaptionFlags, pair: Preset | None) -> int:
    if flags.gpus is not None:
        return 1
    models = [pair.target if pair else str(flags.target), draft_of(flags.draft, pair)]
    return engine.cpu_workers([model for model in models if model is not None], flags.device_map)


def _devices(flags: CaptionFlags) -> tuple[tuple[str | None, ...], bool]:
    """Return where workers load their models, and whether there is to be one for each GPU."""
    if flags.gpus is None:
        return (None,), flags.device_map is None
    if flags.device_map is not None:
        raise excluding(Flag("gpus", flags.gpus), Flag("device_map", flags.device_map))
    if flags.gpus == "all":
        return (None,), True
    if re.fullmatch(r"[1-9][0-9]{0,2}", flags.gpus):
        return tuple(f"cuda:{number}" for number in range(int(flags.gpus))), False
    if re.fullmatch(r"[0-9]{1,3}(,[0-9]{1,3})+,?|[0-9]{1,3},", flags.gpus):
        numbers = dict.fromkeys(int(number) for number in flags.gpus.split(",") if number)
        return tuple(f"cuda:{number}" for number in numbers), False
    raise UsageError(
        Flag("gpus", flags.gpus),
        "is not a list of GPUs",
        fix="give all, a number (2), or a list (0,2; a single one: 1,)",
    )


def _refuse_pointless_baseline(settings: CaptionSettings, pair: Preset | None, share: float) -> None:
    if share and draft_of(settings.models.draft, pair) is None:
        raise UsageError(
            Flag("baseline_sample", share), "compares with a draft, and there is none", fix="give --draft"
        )


def _most_failures(flags: CaptionFlags) -> int | float | None:
    """Return `--max-failures` as a number of videos, or as a share of them, which is a float."""
    fail_fast, text = flags.fail_fast, flags.max_failures
    if fail_fast and text is not None:
        raise excluding(Flag("fail_fast"), Flag("max_failures", text))
    if fail_fast:
        return 1
    if text is None:
        return None
    if found := re.fullmatch(r"([0-9]*\.?[0-9]+)%", text):
        share = float(found.group(1)) / 100.0
        if 0.0 < share <= 1.0:
            return share
    elif re.fullmatch(r"[0-9]{1,10}", text) and 0 < int(text) <= MOST:
        return int(text)
    raise UsageError(
        Flag("max_failures", short(text, 60)),
        "is not a count or a percentage",
        fix="give a number of videos, e.g. 10, or a percentage, e.g. 5%",
    )
