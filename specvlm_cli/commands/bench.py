"""`specvlm bench [INPUT...]`: all methods on the same videos, in one process: what speculation gains here.

Torch is imported when the flags have turned out to make sense.
"""

from __future__ import annotations

import json
import shlex
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple, cast

from specvlm.bench.clips import Clip, example_clips
from specvlm.bench.grid import HEAD, WITH_DRAFT, Grid, GridDraft
from specvlm.bench.page import PageSheet
from specvlm.bench.records import METHODS, BenchReport, Left, MethodName
from specvlm.bench.words import stopped_words
from specvlm.config import GenerationSettings, PrunerName, TreeName
from specvlm.drafts.kinds import is_head
from specvlm.errors import SpecvlmError
from specvlm.preset import Preset, head_of
from specvlm.words import counted
from specvlm_cli.caption import engine
from specvlm_cli.commands.bench_flags import MOST_REPEATS, BenchFlags, in_range, one_prompt, values_of
from specvlm_cli.commands.caption_flags import MOST
from specvlm_cli.commands.choices import (
    DEFAULT_PRESET,
    check_models,
    guessable,
    model_choice,
    pair_of,
    prompt_texts,
    refuse_for_head,
)
from specvlm_cli.console.bench import BenchTalk, tell
from specvlm_cli.console.safe_text import clean, path_text, storable
from specvlm_cli.exits import ExitCode, FatalError, Flag, UsageError
from specvlm_cli.inputs import Inputs, Item

if TYPE_CHECKING:
    from specvlm import Captioner

_DEFAULT = Grid()
_NOT_ASKED = ("inputs", "drafts", "out", "json_output", "quiet", "verbose")
QUICK_S = (
    60.0  # without INPUT: no further clip is begun after this time, so that a slow machine answers soon too
)


class _Videos(NamedTuple):
    """What to caption, in words which videos these are, and what could not be found."""

    clips: tuple[Clip, ...]
    words: str
    left_out: tuple[Left, ...] = ()


class _Compared(NamedTuple):
    """What to measure."""

    grid: Grid
    drafts: dict[str, str]  # their names in the grid -> what to load; the first is loaded with the target
    prompt: str


class _Measured(NamedTuple):
    """The result, and pictures for the page."""

    report: BenchReport
    sheets: tuple[PageSheet, ...] = ()


def bench(flags: BenchFlags) -> int:
    """Compare stock generate(), its assisted generation, plain decoding and speculation on the same videos.

    Methods take turns in one process, after one turn of warm-up.

    Two speedups are shown: that of decoding alone, and that from the file to the text.

    Without INPUT it is a quick check on the example clips: a minute or two on two cores.
    """
    in_range("limit", flags.limit, MOST)
    in_range("repeat", flags.repeat, MOST_REPEATS)
    one_prompt(flags.prompt, "bench")
    GenerationSettings(max_new_tokens=flags.max_new_tokens)
    grid, talk = _grid(flags), BenchTalk(flags.quiet)
    if flags.out is not None:
        from specvlm_cli import bench_files

        bench_files.ready(flags.out)
    with ending() as stop:
        try:
            measured = _found(flags, grid, talk)
        except KeyboardInterrupt as error:
            return _stopped(error, flags, talk, stop.code)
    _show(measured, flags, talk)
    return ExitCode.SOME_FAILED if measured.report.left_out else ExitCode.OK


class BenchStop:
    """What asked the bench to stop, as an exit code."""

    def __init__(self) -> None:
        self.code: int = ExitCode.INTERRUPTED

    def on_signal(self, number: int, _: FrameType | None) -> None:
        """Interrupt; whoever holds what was measured keeps it."""
        self.code = 128 + number
        raise KeyboardInterrupt


@contextmanager
def ending() -> Iterator[BenchStop]:
    """Have SIGTERM end the block as Ctrl-C does, with a KeyboardInterrupt."""
    stop = BenchStop()
    before = signal.signal(signal.SIGTERM, stop.on_signal)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _stopped(error: KeyboardInterrupt, flags: BenchFlags, talk: BenchTalk, code: int) -> int:
    """Show and write what was measured until then, without a picture, and return the exit code."""
    report = getattr(error, "report", None)  # only a bench that had begun has one
    if report is None or not report.samples:
        talk.warn("stopped early: nothing is kept, no turn was whole")
        return code
    talk.warn(stopped_words(report))
    _show(_Measured(report), flags, talk)
    return code


def _found(flags: BenchFlags, grid: Grid, talk: BenchTalk) -> _Measured:
    pair = pair_of(flags.preset, flags.target)
    grid, drafts = _with_drafts(grid, flags, pair)
    check_models(next(iter(drafts.values()), None), flags.draft_revision, flags.device_map)
    prompt = prompt_texts(flags.prompt, pair)[0]
    return _measured(flags, pair, _Compared(grid, drafts, prompt), _videos(flags, talk), talk)


def _grid(flags: BenchFlags) -> Grid:
    frames = (None,)
    if flags.num_frames is not None:
        frames = values_of("num_frames", flags.num_frames, int, "16,64")  # type: ignore[assignment]
    return Grid(
        methods=_DEFAULT.methods if flags.methods is None else _methods(flags.methods),
        num_frames=frames,
        pruners=_DEFAULT.pruners if flags.pruner is None else _pruners(flags.pruner),
        prune_ratios=_DEFAULT.prune_ratios if flags.prune_ratio is None else _ratios(flags.prune_ratio),
        trees=cast("tuple[TreeName, ...]", values_of("tree", flags.tree, str, "static,dynamic")),
        batch_sizes=values_of("batch_size", flags.batch_size, partial(_batch_size, flags), "1,8,32 or auto"),
    )


def _batch_size(flags: BenchFlags, text: str) -> int:
    if text != "auto":
        return int(text)
    import torch

    from specvlm.batch import usual_batch_size

    no_gpu = flags.device_map == "cpu" or not torch.cuda.is_available()
    return usual_batch_size("cpu" if no_gpu else "cuda")


def _pruners(text: str) -> tuple[PrunerName, ...]:
    return cast("tuple[PrunerName, ...]", values_of("pruner", text, str, "specvlm,uniform"))


def _ratios(text: str) -> tuple[float, ...]:
    return values_of("prune_ratio", text, float, "0,0.5,0.9")


def _methods(text: str) -> tuple[MethodName, ...]:
    return cast("tuple[MethodName, ...]", values_of("methods", text, str, ",".join(METHODS)))


def _with_drafts(grid: Grid, flags: BenchFlags, pair: Preset | None) -> tuple[Grid, dict[str, str]]:
    """Return the grid with its drafts, and those that it uses: their names -> what to load.

    Raises:
        UsageError: A method has no draft of its kind, a draft no method, or a flag no effect.
    """
    drafts = _drafts(flags, pair)
    known = tuple(GridDraft(name, is_head(load)) for name, load in drafts.items())
    grid = replace(grid, drafts=known)
    if flags.methods is None and known:
        able = (one for one in METHODS if one not in WITH_DRAFT or grid.suiting(one))
        grid = replace(grid, methods=tuple(one for one in able if one != "assisted" or not grid.is_batched))
    _refuse_without_draft(grid)
    used = {one.name for one in grid.used()}
    if unused := [name for name in drafts if name not in used and flags.given_drafts]:
        chosen = ",".join(grid.methods)
        raise UsageError(
            Flag("draft", unused[0]), "is used by none of", Flag("methods", chosen), fix="leave it out"
        )
    if known and all(one.is_head for one in known):
        refuse_for_head(next(iter(drafts.values())), flags)
    return grid, {name: load for name, load in drafts.items() if name in used}


def _drafts(flags: BenchFlags, pair: Preset | None) -> dict[str, str]:
    """Return the drafts: their names -> what to load. A preset's own small model comes with the target's head.

    Raises:
        UsageError: One was given twice, or none together with others, or one revision for several.
    """
    given = flags.given_drafts
    if not given and pair is not None:
        head = head_of(pair.target)
        given = (pair.draft, *([] if head is None or is_head(pair.draft) else [head]))
    elif len(given) > 1 and "none" in given:
        raise UsageError(Flag("draft", "none"), "goes with no other draft", fix="give one or the other")
    elif len(given) > 1 and flags.draft_revision is not None:
        raise UsageError(
            Flag("draft_revision", flags.draft_revision),
            f"does not say of which of {len(given)} drafts it is",
            fix="give one --draft with it",
        )
    drafts = {engine.public_name(one): one for one in given if one != "none"}
    if len(drafts) < len(given) and "none" not in given:
        raise UsageError(Flag("draft"), "was given twice with the same draft", fix="give each once")
    return drafts


def _refuse_without_draft(grid: Grid) -> None:
    if (method := grid.needs_draft) is None:
        return
    without = ",".join(one for one in METHODS if one not in WITH_DRAFT)
    if not grid.drafts:
        raise UsageError(
            Flag("methods", method),
            "needs a draft, and there is none",
            fix=f"give --draft, or --methods {without}",
        )
    kind = "the folder of a trained head" if method == HEAD else "a small model"
    raise UsageError(
        Flag("methods", method), f"needs {kind} as its draft, and there is none", fix="give --draft"
    )


def _videos(flags: BenchFlags, talk: BenchTalk) -> _Videos:
    if flags.inputs:
        videos = _given(flags.inputs, flags.limit, talk)
    else:
        videos = _Videos(example_clips()[: flags.limit], "the example clips")
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


def _both_ways(grid: Grid, flags: BenchFlags, captioner: Captioner) -> Grid:
    """With `exact` or without, as asked; where nothing was asked and it matters, both."""
    if flags.exact is not None:
        return replace(grid, exact=(flags.exact,))
    return grid if captioner.info.dtype == "float32" else replace(grid, exact=(True, False))


def _measured(
    flags: BenchFlags, pair: Preset | None, compared: _Compared, videos: _Videos, talk: BenchTalk
) -> _Measured:
    if pair is not None and flags.preset is None:
        talk.note(
            f"no --preset or --target: using the tiny {DEFAULT_PRESET} pair, it knows only drawn shapes"
        )
    talk.note(f"{counted(len(videos.clips), 'video')}: {videos.words}")
    first, *others = list(compared.drafts.values()) or ["none"]
    kept = guessable(flags.draft_vocab, None if first == "none" else first)
    if isinstance(kept, int):
        talk.note(
            f"--draft-vocab {kept}: the tokenizer's first tokens, of which captions may use few; for those that they "
            "use, give a file of specvlm vocab"
        )
    models = model_choice(flags, pair, draft=first, draft_vocab=kept)
    captioner = engine.load_captioner(models, quiet=flags.quiet)
    by_name = {engine.public_name(one): engine.with_draft(captioner, one, models) for one in others}

    from specvlm.bench.measure import BenchRequest
    from specvlm.bench.suite import BenchSetup, StoppedError
    from specvlm.bench.suite import bench as run

    asked = BenchRequest(
        command=_command(flags),
        target=models.name,
        draft=", ".join(compared.drafts) or None,
        prompt=compared.prompt,
        max_new_tokens=flags.max_new_tokens,
        repeat=flags.repeat,
        clips=videos.words,
    )
    quick = not flags.inputs and flags.limit is None
    with talk.working():
        try:
            grid = _both_ways(compared.grid, flags, captioner)
            setup = BenchSetup(grid, videos.clips, None, asked, QUICK_S if quick else None)
            report = run(captioner, setup, talk, by_name)
        except StoppedError as error:
            error.report = replace(error.report, left_out=(*videos.left_out, *error.report.left_out))
            raise
    turns = max((one.turns for one in report.summaries), default=0)
    if quick and compared.grid.is_batched and turns < flags.repeat:
        talk.note(
            f"after {QUICK_S:g} s no further turn was begun: {turns} of {flags.repeat} measured; "
            f"--limit {len(videos.clips)} takes all"
        )
    elif quick and (done := len(report.conditions.videos)) < len(videos.clips):
        whole = len(videos.clips)
        talk.note(
            f"after {QUICK_S:g} s no further clip was begun: {done} of {whole} measured; --limit {whole} takes all"
        )
    report = replace(report, left_out=(*videos.left_out, *report.left_out))
    return _Measured(report, () if flags.out is None else _sheets(captioner, report, videos.clips, talk))


def _sheets(
    captioner: Captioner, report: BenchReport, clips: Sequence[Clip], talk: BenchTalk
) -> tuple[PageSheet, ...]:
    """Draw the page's picture; what was measured is not lost for want of it."""
    from specvlm.bench.pictures import sheets_of

    try:
        return sheets_of(captioner, report, clips)
    except SpecvlmError as error:
        talk.warn(f"the page has no picture: {error}")
        return ()


def _command(flags: BenchFlags) -> str:
    """Return the command line that asks for the same."""
    words = ["specvlm", "bench", *(flags.inputs or [])]
    for one in fields(flags):
        value = getattr(flags, one.name)
        if one.name not in _NOT_ASKED and value != one.default:
            name = f"--{one.name.replace('_', '-')}"
            if isinstance(value, bool):
                words.append(name if value else f"--no-{name[2:]}")
            else:
                words += [name, value[0] if isinstance(value, list) else str(value)]
    words += [word for one in flags.given_drafts for word in ("--draft", one)]
    return storable(shlex.join(words))


def _refuse_empty(report: BenchReport) -> None:
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
