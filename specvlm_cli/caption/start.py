"""One start of `specvlm caption`, from the videos to the outcome: open the folder, see what is left, do it.

What can be known without a model is found out before one is loaded, and what can be known without writing
before anything is written: a start on a finished run touches no file.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from os import fsdecode
from os.path import lexists
from pathlib import Path
from typing import Literal, Protocol

from specvlm.checkpoint import can_compare, fingerprint
from specvlm.errors import SpecvlmError
from specvlm_cli.caption.coordinator import Coordinator, Reporter
from specvlm_cli.caption.engine import EngineFactory, Models
from specvlm_cli.caption.outcome import Outcome
from specvlm_cli.caption.policy import Policy
from specvlm_cli.caption.settings import CaptionSettings, Change, Plain, config_hash, differences
from specvlm_cli.console.safe_text import clean, short
from specvlm_cli.exits import ExitCode, Flag, UsageError
from specvlm_cli.run.layout import RunFile, RunFolder
from specvlm_cli.run.ledger import UNREADABLE, Ledger, Planned, is_damage
from specvlm_cli.run.lock import LockedPolicy, when_free
from specvlm_cli.run.parts import CAPTION_SCHEMA
from specvlm_cli.run.resharding import finish, is_unfinished, reshard
from specvlm_cli.run.rows import Provenance
from specvlm_cli.run.shard import Shard
from specvlm_cli.run.wanted import WantedVideos
from specvlm_cli.stopping import Stop, end_if_asked, listening

ChangePolicy = Literal["error", "reuse", "new"]

_MOST_TOLD = 20  # rows that name no video; the others are in the failures file


@dataclass(frozen=True, slots=True)
class CaptionRequest:
    """What one start is asked to do.

    Attributes:
        wanted: The videos.
        out: The run folder.
        policy: How to work through the videos, and how captions are made.
        version: Version of specvlm, for the rows.
        shard: Which part of the run this is.
        reshard: Redistribute the run, if it has another number of shards.
        kept: Columns that pass through from a manifest to the rows, and their kinds.
        unreadable: Folders that could not be listed; videos in them were not found, which counts as a failure.
        overwrite: Caption all given videos again.
        retry_failed: Try the given videos again that failed before.
        on_config_change: What to do where the folder holds captions made with other settings.
        if_locked: What to do where another start is at work on the same shard.
        max_runtime_s: Stop after this time; None: never.
        exit_zero: Failed videos do not change the exit code.
        before_loading: Called where there is something to do, before models are loaded.
    """

    wanted: WantedVideos
    out: Path
    policy: Policy
    version: str
    shard: Shard = field(default_factory=Shard)
    reshard: bool = False
    kept: Mapping[str, str] = field(default_factory=dict)
    unreadable: int = 0
    overwrite: bool = False
    retry_failed: bool = False
    on_config_change: ChangePolicy = "error"
    if_locked: LockedPolicy = "fail"
    max_runtime_s: float | None = None
    exit_zero: bool = False
    before_loading: Callable[[], None] = lambda: None

    @property
    def settings(self) -> CaptionSettings:
        """What captions depend on, and how they are made."""
        return self.policy.captions


class Display(Reporter, Protocol):
    """A reporter that is on show while a run works."""

    def working(self, todo: int, before: tuple[int, int] = (0, 0)) -> AbstractContextManager[None]:
        """Show progress while the block runs; `before`: videos that were done, and that had failed, already."""

    def note(self, message: str) -> None:
        """Say something that is worth a line."""


def run(request: CaptionRequest, factory: EngineFactory, display: Display) -> Outcome:
    """Caption what is to be captioned, and say how it ended.

    Raises:
        CommandError: The start could not be made, or could not continue.
    """
    started = time.monotonic()
    with listening() as stop:
        if request.max_runtime_s is not None:
            stop.end_after(request.max_runtime_s)
        outcome = _run(request, factory, display, stop)
    return replace(outcome, wall_s=time.monotonic() - started)


def _run(request: CaptionRequest, factory: EngineFactory, display: Display, stop: Stop) -> Outcome:
    folder = choose_folder(request)
    if str(folder.root) != str(request.out):
        display.note(f"settings changed: captions go to {clean(str(folder.root))}")
    if (request.reshard or is_unfinished(folder.root)) and not when_free(
        request.if_locked, stop, display.note, lambda: _divide(request, folder, display)
    ):
        return _not_begun(request, folder, stop)
    _agree(request, folder)
    if (outcome := _nothing_to_do(request, folder)) is not None:
        return outcome
    run_id = uuid.uuid4().hex
    with ExitStack() as held:
        lock = when_free(
            request.if_locked, stop, display.note, lambda: held.enter_context(folder.locked(run_id))
        )
        if lock is None:
            return _not_begun(request, folder, stop)
        stop.tell(lock.sign_off)
        with folder.open() as ledger:
            start = _Start(request, folder, ledger, run_id, display, stop)
            start.settle(lock.after_crash)
            return start.work(factory)


def _divide(request: CaptionRequest, folder: RunFolder, display: Display) -> bool:
    """Finish an interrupted redistribution, and redistribute if asked to."""
    finish(folder.root)
    if request.reshard and reshard(folder.root, request.shard.count):
        display.note(f"{_shown(folder)} is divided into {request.shard.count} shards now")
    return True


def _not_begun(request: CaptionRequest, folder: RunFolder, stop: Stop) -> Outcome:
    code = ExitCode.OK if stop.reason is None else ExitCode.STOPPED
    return Outcome(
        code,
        str(folder.root),
        request.wanted.count,
        0,
        0,
        request.wanted.count,
        stopped=stop.reason or "locked",
    )


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a start would do.

    Attributes:
        outcome: How things stand.
        videos: How many videos it would work on.
        bad_rows: Rows of manifests that name no video, and will fail.
        problems: What is wrong with the first of them.
    """

    outcome: Outcome
    videos: int
    bad_rows: int
    problems: Sequence[str]


def plan(request: CaptionRequest, show: Callable[[Planned], None]) -> DryRun:
    """Show each video that a start would work on, touching nothing; say how things stand.

    Raises:
        CommandError: The start would fail.
    """
    folder = choose_folder(request)
    if is_unfinished(folder.root):
        raise UsageError(f"{_shown(folder)}: its division into shards was cut short; start once without -n")
    _agree(request, folder)
    try:
        with folder.preview() as ledger:
            ledger.want(request.wanted, len(request.settings.prompts))
            _refuse_changes(request, folder, ledger)
            _refuse_changed_files(request, folder, ledger, at_once=True)
            number = 0
            for planned in ledger.to_do(request.overwrite, request.retry_failed, request.policy.limit):
                show(planned)
                number += 1
            return DryRun(_outcome(request, folder, ledger), number, *ledger.problems(_MOST_TOLD))
    except UNREADABLE as error:
        raise folder.damaged(error) if is_damage(error) else error from error


def choose_folder(request: CaptionRequest) -> RunFolder:
    """Return the run folder: OUT, or with `--on-config-change new` a sibling named after the new settings.

    Raises:
        UsageError: A head was trained in it.
        FatalError: Its settings cannot be read.
    """
    if (request.out / ".specvlm" / "train.json").exists():
        raise UsageError(
            f"{clean(str(request.out))} is the folder of a trained head; give it with --draft, and another with -o"
        )
    folder = RunFolder(request.out, request.shard)
    known = folder.read()
    fingerprint = request.settings.fingerprint()
    if known is None or known.settings in ({}, fingerprint) or request.on_config_change != "new":
        return folder
    out = request.out.absolute()
    return RunFolder(out.with_name(f"{out.name}-{config_hash(fingerprint)[:8]}"), request.shard)


def _agree(request: CaptionRequest, folder: RunFolder) -> None:
    """Refuse another number of shards than the run has; take its columns that pass through.

    Raises:
        UsageError: This start does not fit the run.
    """
    known = folder.read() or folder.recall()
    folder.parts.kept = request.kept if known is None else _kept(request, folder, known)


def _kept(request: CaptionRequest, folder: RunFolder, known: RunFile) -> Mapping[str, str]:
    """Return the columns that pass through: those of the run, which a start may not add to."""
    if known.shards != request.shard.count:
        had = "1 shard" if known.shards == 1 else f"{known.shards} shards"
        raise UsageError(
            f"{_shown(folder)} was begun with {had}, this start has {request.shard.count}; give --shard I/N "
            "with that number, or --reshard to redistribute it"
        )
    if not request.kept.items() <= known.kept.items():
        had = ", ".join(f"{name} ({kind})" for name, kind in known.kept.items()) or "none"
        now = ", ".join(f"{name} ({kind})" for name, kind in request.kept.items())
        raise UsageError(
            f"{_shown(folder)} was begun with other --keep-columns: {clean(had)}, now {clean(now)}; all its "
            "parts have one schema, so give those columns, or another -o folder"
        )
    if taken := sorted(known.kept.keys() & set(CAPTION_SCHEMA.names)):
        raise UsageError(
            f"{_shown(folder)} was begun by an earlier version with --keep-columns {clean(', '.join(taken))}, which a "
            "row has of its own by now; export reads it as it is, use another -o folder for further captions"
        )
    return known.kept


def _nothing_to_do(request: CaptionRequest, folder: RunFolder) -> Outcome | None:
    """Return the outcome where this start has nothing to do, having touched nothing; else None."""
    if not request.wanted.count:
        return Outcome(_code_without_work(request), str(folder.root), found=0, done=0, failed=0, pending=0)
    ledger = folder.peek()
    if ledger is None:
        return None
    try:
        with ledger:
            ledger.want(request.wanted, len(request.settings.prompts))
            _refuse_changes(request, folder, ledger)
            work = ledger.has_news() or ledger.count_to_do(request.overwrite, request.retry_failed, 1)
            if not work:
                _refuse_changed_files(request, folder, ledger, at_once=True)
            return None if work or not folder.parts.in_order(ledger) else _outcome(request, folder, ledger)
    except UNREADABLE as error:
        if is_damage(error):  # opening it for writing shows what is wrong
            return None
        raise


@dataclass(slots=True)
class _Start:
    """One start that holds its run folder and has something to do.

    Attributes:
        refused: Rows of a manifest that failed because they name no video.
    """

    request: CaptionRequest
    folder: RunFolder
    ledger: Ledger
    run_id: str
    display: Display
    stop: Stop
    refused: int = 0

    def settle(self, after_crash: bool) -> None:
        """Bring ledger and files into the state from which work can begin."""
        request, folder = self.request, self.folder
        with folder.settling():  # what was seen before the lock may have changed
            _agree(request, folder)
            if folder.read() is None:
                folder.write(RunFile({}, "", {}, request.shard.count, dict(folder.parts.kept)))
        self.ledger.want(request.wanted, len(request.settings.prompts))
        _refuse_changes(request, folder, self.ledger)
        self.ledger.recover(crashed=after_crash)
        self.refused = self.ledger.register(reuse=self.request.on_config_change == "reuse")
        self._tell_bad_rows()
        for done in self.folder.parts.repair(self.ledger):
            self.display.note(done)

    def _tell_bad_rows(self) -> None:
        if not self.refused:
            return
        for claim, failure in self.ledger.bad_rows(_MOST_TOLD):
            self.display.failed(claim, failure, "")
        if self.refused > _MOST_TOLD:
            self.display.warn(f"failed: {self.refused - _MOST_TOLD} more rows that name no video")

    def work(self, factory: EngineFactory) -> Outcome:
        """Caption what is to be captioned."""
        request = self.request
        todo = self.ledger.count_to_do(request.overwrite, request.retry_failed, request.policy.limit)
        policy = request.policy.for_videos(todo)
        runner = Coordinator(
            self.ledger, self.folder.parts, factory, policy, self.display, refused=self.refused
        )
        if todo and self.stop.reason is None and not runner.too_many_failed():
            self._caption(runner, todo)
        else:
            runner.close_parts()
        return self._ended(runner, todo)

    def _ended(self, runner: Coordinator, todo: int) -> Outcome:
        outcome = _outcome(self.request, self.folder, self.ledger)
        return replace(
            outcome,
            exit_code=self._exit_code(runner, outcome, todo),
            failed_now=runner.failed,
            figures=runner.tally.figures() if todo or self.refused else None,
            stopped=runner.stopped or (self.stop.reason if outcome.pending else None),
            captioning=runner.captioning,
            failures_file=str(self.folder.root / self.folder.parts.failures_name) if outcome.failed else None,
        )

    def _exit_code(self, runner: Coordinator, outcome: Outcome, todo: int) -> ExitCode:
        if self.stop.reason is not None and outcome.pending:
            return ExitCode.STOPPED
        if runner.too_many_failed():
            return ExitCode.TOO_MANY_FAILED
        failed = outcome.failed if todo else self.refused
        return ExitCode.SOME_FAILED if failed and not self.request.exit_zero else outcome.exit_code

    def _caption(self, runner: Coordinator, todo: int) -> None:
        self.request.before_loading()
        self.display.note(f"loading {clean(self.request.settings.models.name)}")
        try:
            _refuse_changed_files(self.request, self.folder, self.ledger)
            models = runner.load(self.stop)
            if models is None:
                return
            self._begin(models)
            for warning in models.warnings:
                self.display.warn(warning)
            before = self.ledger.counts()
            with self.display.working(todo, (before["done"], before["failed"])):
                runner.run(self.stop, _provenance(self.request, models, self.run_id))
        finally:
            runner.close()

    def _begin(self, models: Models) -> None:
        """Reopen what is to be done again, then record the settings and what the models turned out to be.

        Only here, with the models loaded, can nothing but the work itself go wrong. In this order a crash
        between the two leaves videos to be done again, never old captions under new settings.
        """
        request, folder = self.request, self.folder
        resolved: Plain = json.loads(json.dumps(models.resolved, default=str))
        with folder.settling():
            self._refuse_other_target(resolved)
            if request.shard.count > 1:  # another shard may have begun meanwhile
                _refuse_changes(request, folder, self.ledger)
            self.ledger.reopen(request.overwrite, request.retry_failed, request.policy.limit)
            fingerprint = request.settings.fingerprint()
            kept = dict(folder.parts.kept)
            digest = config_hash(fingerprint)
            folder.write(RunFile(fingerprint, digest, resolved, shards=request.shard.count, kept=kept))

    def _refuse_other_target(self, resolved: Plain) -> None:
        known = self.folder.read()
        before = dict(known.resolved) if known is not None and known.settings else dict(resolved)
        if not can_compare(before.get("target_revision"), resolved.get("target_revision")):
            before["target_revision"] = resolved.get("target_revision")  # an earlier version wrote it
        changes = differences(before, resolved)
        if not changes or self.request.on_config_change == "reuse":
            return
        if _captions_kept(self.request, self.folder, self.ledger):
            raise _other_target(self.folder, changes)


def _outcome(request: CaptionRequest, folder: RunFolder, ledger: Ledger) -> Outcome:
    counts = ledger.counts()
    return Outcome(
        _code_without_work(request),
        str(folder.root),
        found=request.wanted.count,
        done=counts["done"],
        failed=counts["failed"],
        pending=counts["pending"] + counts["running"],
    )


def _code_without_work(request: CaptionRequest) -> ExitCode:
    return ExitCode.SOME_FAILED if request.unreadable and not request.exit_zero else ExitCode.OK


def _provenance(request: CaptionRequest, models: Models, run_id: str) -> Provenance:
    return Provenance(
        target_model=models.target,
        target_revision=models.target_revision,
        draft_model=models.draft,
        config_hash=config_hash(request.settings.fingerprint()),
        specvlm_version=request.version,
        run_id=run_id,
    )


def _refuse_changes(request: CaptionRequest, folder: RunFolder, ledger: Ledger) -> None:
    """Refuse to mix captions of other settings, or of another video with the same id, into one run."""
    _refuse_other_video(ledger)
    known = folder.read()
    if known is not None and not known.settings:  # begun, or recalled, but no model was loaded since
        known = None
    if request.on_config_change != "reuse":
        _refuse_other_prompts(request, ledger)
        _refuse_other_settings(request, folder, ledger, known)
    if not request.overwrite:
        _refuse_other_order(request, folder, ledger, known)


def _refuse_other_settings(
    request: CaptionRequest, folder: RunFolder, ledger: Ledger, known: RunFile | None
) -> None:
    fingerprint = request.settings.fingerprint()
    if known is not None and known.settings == fingerprint:
        return
    if not _captions_kept(request, folder, ledger):
        return
    if known is None and _hashes(folder, ledger) == {config_hash(fingerprint)}:
        return
    changes = (
        "; ".join(map(str, differences(known.settings, fingerprint))) if known else "its run.json is gone"
    )
    how = "continue with the new value"
    if known and _adds_prompts(request, known):
        how = "ask only what is new, about all videos"
    raise UsageError(
        f"{_shown(folder)} holds captions made with other settings: {clean(changes)}; give the old value, or "
        f"--on-config-change reuse (keep them, {how}) or new (a new folder next to it)"
    )


def _prompts(known: RunFile) -> list[object]:
    """Return the prompts of a run."""
    prompts = known.settings.get("prompt")
    return prompts if isinstance(prompts, list) else [prompts]


def _adds_prompts(request: CaptionRequest, known: RunFile) -> bool:
    """Say whether a start has the prompts of its run and further ones."""
    before = _prompts(known)
    return (
        len(before) < len(request.settings.prompts)
        and list(request.settings.prompts[: len(before)]) == before
    )


def _refuse_other_order(
    request: CaptionRequest, folder: RunFolder, ledger: Ledger, known: RunFile | None
) -> None:
    """Refuse prompts that have captions under another index: they would be asked twice, or not at all."""
    prompts = request.settings.prompts
    found = ledger.asked_elsewhere(prompts)
    if found is not None:
        raise UsageError(
            f"{clean(fsdecode(found[0]))} has a caption for the prompt {short(found[1], 60)!r} already, with another "
            "prompt_index; give the prompts that have captions first, in their order, and new ones after them"
        )
    before = [] if known is None else _prompts(known)
    if len(prompts) < 2 or before[: len(prompts)] == list(prompts[: len(before)]):
        return
    moved = next((one for one in prompts if one in before and before.index(one) != prompts.index(one)), None)
    if moved is not None and _captions_kept(request, folder, ledger):
        raise UsageError(
            Flag("prompt", repr(short(moved, 60))),
            f"has the prompt_index {before.index(moved)} in {_shown(folder)} and would get {prompts.index(moved)}",
            fix="give the prompts of the run first, in their order, and new ones after them, or another -o folder",
        )


def _refuse_changed_files(
    request: CaptionRequest, folder: RunFolder, ledger: Ledger, *, at_once: bool = False
) -> None:
    """Refuse a local target whose files are not those of the captions, before it is loaded.

    The hashes of its files are kept from here on, so that no worker has to make them again. `at_once` is for a start
    that loads nothing: it does not compare a target whose hashes are not kept, or whose files are incomplete.
    """
    target = Path(request.settings.models.name)
    if not target.is_dir():
        return
    try:
        now = fingerprint(target, at_once=at_once, between_pieces=end_if_asked)
    except SpecvlmError:
        if at_once:
            return
        raise
    known = folder.read()
    then = known.resolved.get("target_revision") if known is not None and known.settings else None
    if not can_compare(now, then) or now == then or request.on_config_change == "reuse":
        return
    if _captions_kept(request, folder, ledger):
        raise _other_target(folder, differences({"target_revision": then}, {"target_revision": now}))


def _other_target(folder: RunFolder, changes: Sequence[Change]) -> UsageError:
    return UsageError(
        f"{_shown(folder)}: the target is not that of the captions there, although it has its name: "
        f"{'; '.join(map(str, changes))}; use the old files, --revision and --dtype, accept both with "
        "--on-config-change reuse, or give another -o folder"
    )


def _refuse_other_prompts(request: CaptionRequest, ledger: Ledger) -> None:
    """A row of a manifest that asks something else now, or about another part, has no caption for that."""
    ways_out = "--overwrite, or --on-config-change reuse (keep such captions)"
    path = None if request.overwrite else ledger.asked_differently()
    if path is not None:
        raise UsageError(
            f"{clean(fsdecode(path))} has another prompt in the manifest than its caption was made with; give "
            f"the old one, {ways_out}"
        )
    identity = None if request.overwrite else ledger.cut_differently()
    if identity is not None:
        raise UsageError(
            f"id {short(identity, 60)!r} has another start or end in the manifest than its caption was made with; "
            f"give the new part an id of its own, {ways_out}"
        )


def _hashes(folder: RunFolder, ledger: Ledger) -> set[str]:
    return ledger.config_hashes().union(*(other.config_hashes() for other in folder.other_ledgers()))


def _captions_kept(request: CaptionRequest, folder: RunFolder, ledger: Ledger) -> int:
    """Return how many captions of the whole run stay when this start makes its own."""
    ours = ledger.captions_kept(request.overwrite, request.policy.limit)
    return ours + sum(other.captions_kept(False, None) for other in folder.other_ledgers())


def _refuse_other_video(ledger: Ledger) -> None:
    """A video that moved keeps its caption; where the old path is still there, it is another video."""
    for moved in ledger.moved():
        if not lexists(moved.then):
            continue
        now, then = clean(fsdecode(moved.now)), clean(fsdecode(moved.then))
        if moved.own_id:
            raise UsageError(
                f"id {short(moved.identity, 60)!r} named {then} in an earlier start and names {now} now, and both are "
                "there; give the new video an id of its own, or another -o folder"
            )
        raise UsageError(
            f"{now} would have the id of {then}, known already; give the folder above both, or another -o folder"
        )


def _shown(folder: RunFolder) -> str:
    return clean(str(folder.root))
