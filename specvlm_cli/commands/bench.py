"""`specvlm bench [INPUT...]`: all methods on the same videos, in one process: what speculation gains here.

Torch is imported when the flags have turned out to make sense.
"""

from __future__ import annotations

import json
import shlex
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from specvlm.bench.clips import Clip, example_clips
from specvlm.bench.grid import WITH_DRAFT, Grid
from specvlm.bench.page import PageSheet
from specvlm.bench.records import METHODS, Left, MethodName, Report
from specvlm.config import GenerationSettings, PrunerName, TreeName
from specvlm.errors import SpecvlmError
from specvlm.preset import Preset
from specvlm_cli import engine
from specvlm_cli.commands.bench_flags import BenchFlags, values_of
from specvlm_cli.commands.bench_shapes import modelled, modelled_grid, refuse_mixture
from specvlm_cli.commands.choices import DEFAULT_PRESET, check_models, pair_of, prompt_texts
from specvlm_cli.exits import ExitCode, FatalError, UsageError
from specvlm_cli.inputs import Inputs, Item
from specvlm_cli.screen.bench import BenchTalk, tell
from specvlm_cli.settings import ModelChoice
from specvlm_cli.text import clean, path_text, storable

if TYPE_CHECKING:
    from specvlm import Captioner

QUICK_S = (
    60.0  # without INPUT: no further clip is begun after this time, so that a slow machine answers soon too
)


class _Videos(NamedTuple):
    """What to caption, in words which videos these are, and what could not be found."""

    clips: tuple[Clip, ...]
    words: str
    left_out: tuple[Left, ...] = ()


class _Measured(NamedTuple):
    """What came of it, and pictures for the page."""

    report: Report
    sheets: tuple[PageSheet, ...] = ()


def bench(flags: BenchFlags) -> int:
    """Compare stock generate(), its assisted generation, plain decoding, and speculation, on the same videos.

    Methods alternate in one process, after a turn of warm-up, and speedups are told of decoding and from the file
    to the text. Without INPUT it is a quick check on the example clips: with the tiny demo pair, about a minute
    on two cores.
    """
    refuse_mixture(flags)
    GenerationSettings(max_new_tokens=flags.max_new_tokens)
    grid, talk = _grid(flags), BenchTalk(flags.quiet)
    if flags.out is not None:
        from specvlm_cli import bench_files

        bench_files.ready(flags.out)
    if flags.shape is not None:
        measured = _Measured(modelled(flags, modelled_grid(flags, grid), _command(flags), talk))
    else:
        measured = _of_checkpoints(flags, grid, talk)
    _show(measured, flags, talk)
    return ExitCode.SOME_FAILED if measured.report.left_out else ExitCode.OK


def _of_checkpoints(flags: BenchFlags, grid: Grid, talk: BenchTalk) -> _Measured:
    pair = pair_of(flags.preset, flags.target)
    check_models(pair, flags.draft, flags.draft_revision, flags.device_map)
    prompt = prompt_texts(None if flags.prompt is None else [flags.prompt], pair)[0]
    _refuse_without_draft(grid, pair, flags.draft)
    with ExitStack() as stack:
        videos = _videos(flags, talk, stack)
        return _measured(flags, pair, grid, prompt, videos, talk)


def _grid(flags: BenchFlags) -> Grid:
    frames = (None,)
    if flags.num_frames is not None:
        frames = values_of("--num-frames", flags.num_frames, int, "16,64")  # type: ignore[assignment]
    return Grid(
        methods=METHODS if flags.methods is None else _methods(flags.methods),
        num_frames=frames,
        pruners=cast("tuple[PrunerName, ...]", values_of("--pruner", flags.pruner, str, "specvlm,uniform")),
        prune_ratios=values_of("--prune-ratio", flags.prune_ratio, float, "0,0.5,0.9"),
        trees=cast("tuple[TreeName, ...]", values_of("--tree", flags.tree, str, "static,dynamic")),
    )


def _methods(text: str) -> tuple[MethodName, ...]:
    return cast("tuple[MethodName, ...]", values_of("--methods", text, str, ",".join(METHODS)))


def _refuse_without_draft(grid: Grid, pair: Preset | None, draft: str | None) -> None:
    if (draft or (pair.draft if pair else "none")) == "none" and grid.needs_draft is not None:
        without = ",".join(method for method in METHODS if method not in WITH_DRAFT)
        raise UsageError(
            f"--methods {grid.needs_draft} needs a draft, and there is none; give --draft, or --methods {without}"
        )


def _videos(flags: BenchFlags, talk: BenchTalk, stack: ExitStack) -> _Videos:
    """Return the clips; those that have to be drawn stay until the stack is closed."""
    if flags.inputs:
        videos = _given(flags.inputs, flags.limit, talk)
    else:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="specvlm-bench-"))
        clips, words = example_clips(Path(scratch))
        videos = _Videos(clips[: flags.limit], words)
    if not videos.clips:
        raise FatalError(
            f"{videos.words}: no videos there; give a folder, a video, a quoted glob or a manifest"
        )
    return videos


def _given(given: Sequence[str], limit: int | None, talk: BenchTalk) -> _Videos:
    inputs, left_out = Inputs(given), []
    clips: dict[str, Clip] = {}
    for item in inputs:
        clip = _clip(item)
        if item.problem is not None:
            left_out.append(Left(clip.name or item.id, item.problem))
            talk.left_out(left_out[-1])
        elif len(clips) != limit:
            clips.setdefault(clip.name, clip)
    for folder in inputs.report.unreadable:
        talk.warn(f"left out, not readable: {folder}")
    words = " ".join(clean(one) for one in given)
    return _Videos(tuple(_shortly_named(clips.values())), words, tuple(left_out))


def _clip(item: Item) -> Clip:
    name, part = path_text(item.path), (item.start_s, item.end_s)
    if part != (None, None):
        name += f" {item.start_s or 0.0:g}-{'' if item.end_s is None else f'{item.end_s:g}'} s"
    prompt = item.prompts[0] if item.prompts else None
    return Clip(name, item.path, item.start_s or 0.0, item.end_s, prompt)


def _shortly_named(clips: Iterable[Clip]) -> Iterator[Clip]:
    """Leave folders out of the names that are still apart without them."""
    clips = list(clips)
    uses = Counter(_last_part(clip.name) for clip in clips)
    for clip in clips:
        name = _last_part(clip.name)
        yield clip._replace(name=name) if uses[name] == 1 else clip


def _last_part(name: str) -> str:
    return name.rpartition("/")[2]


def _measured(
    flags: BenchFlags, pair: Preset | None, grid: Grid, prompt: str, videos: _Videos, talk: BenchTalk
) -> _Measured:
    if pair is not None and flags.preset is None:
        talk.note(
            f"no --preset or --target: using the tiny {DEFAULT_PRESET} pair, it knows only drawn shapes"
        )
    talk.note(f"{len(videos.clips)} videos: {videos.words}")
    models = _models(flags, pair)
    captioner = engine.load_captioner(models, quiet=flags.quiet)

    from specvlm.bench.measure import Asked
    from specvlm.bench.suite import Setup
    from specvlm.bench.suite import bench as run

    draft = captioner.info.draft
    asked = Asked(
        command=_command(flags),
        target=models.name,
        draft=None if draft is None else engine.public_name(draft),
        prompt=prompt,
        max_new_tokens=flags.max_new_tokens,
        repeat=flags.repeat,
        clips=videos.words,
    )
    quick = not flags.inputs and flags.limit is None
    with talk.working():
        report = run(captioner, Setup(grid, videos.clips, None, asked, QUICK_S if quick else None), talk)
    if quick and (done := len(report.conditions.videos)) < len(videos.clips):
        talk.note(f"{QUICK_S:g} s were up after {done} of them; --limit {len(videos.clips)} takes all")
    report = replace(report, left_out=(*videos.left_out, *report.left_out))
    return _Measured(report, () if flags.out is None else _sheets(captioner, report, videos.clips, talk))


def _sheets(
    captioner: Captioner, report: Report, clips: Sequence[Clip], talk: BenchTalk
) -> tuple[PageSheet, ...]:
    """Draw the page's picture; what was measured is not lost for want of it."""
    from specvlm.bench.pictures import sheets_of

    try:
        return sheets_of(captioner, report, clips)
    except SpecvlmError as error:
        talk.warn(f"the page has no picture: {error}")
        return ()


def _models(flags: BenchFlags, pair: Preset | None) -> ModelChoice:
    return ModelChoice(
        name=engine.public_name(pair.target if pair else str(flags.target)),
        load=pair.name if pair else str(flags.target),
        draft=flags.draft,
        revision=flags.revision,
        draft_revision=flags.draft_revision,
        dtype=flags.dtype,
        device_map=flags.device_map,
        local_files_only=flags.local_files_only,
        trust_remote_code=flags.trust_remote_code,
    )


def _command(flags: BenchFlags) -> str:
    """Return the command line that asks for the same."""
    words = ["specvlm", "bench", *(flags.inputs or [])]
    for one in fields(flags):
        value = getattr(flags, one.name)
        if one.name not in ("inputs", "out", "json_output", "quiet", "verbose") and value != one.default:
            name = f"--{one.name.replace('_', '-')}"
            words += [name] if value is True else [name, str(value)]
    return storable(shlex.join(words))


def _refuse_empty(report: Report) -> None:
    """End the command where nothing was measured.

    Raises:
        FatalError: It is so.
    """
    if report.samples:
        return
    failed = [one for one in report.summaries if one.error]
    if report.conditions.videos or not report.left_out:
        raise FatalError(
            f"no method could caption anything; {failed[0].configuration.label}: {failed[0].error}"
        )
    raise FatalError(f"no video could be read; {report.left_out[0].reason}")


def _show(measured: _Measured, flags: BenchFlags, talk: BenchTalk) -> None:
    report, sheets = measured
    _refuse_empty(report)
    if flags.json_output:
        print(json.dumps(report.as_json(), allow_nan=False))
    else:
        tell(report)
    if flags.out is not None:
        from specvlm_cli import bench_files

        bench_files.write(report, flags.out, sheets)
        talk.note(f"rows and a page are in {flags.out}")
