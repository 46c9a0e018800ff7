"""One start of `specvlm caption`, from the videos to the outcome: open the folder, see what is left, do it.

What can be known without a model is found out before one is loaded, and what can be known without writing
before anything is written: a start on a finished run touches no file.
"""

from __future__ import annotations

import json
import math
import sqlite3
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from os import fsdecode
from os.path import lexists
from pathlib import Path
from typing import Literal, Protocol

from specvlm_cli.engine import Engine
from specvlm_cli.exits import ExitCode, UsageError
from specvlm_cli.inputs.item import Item
from specvlm_cli.ledger import Ledger, is_damage
from specvlm_cli.results import Outcome
from specvlm_cli.rows import Provenance
from specvlm_cli.run_folder import RunFile, RunFolder
from specvlm_cli.runner import Policy, Reporter, Runner
from specvlm_cli.settings import CaptionSettings, Plain, config_hash, differences
from specvlm_cli.stopping import Stop, listening
from specvlm_cli.text import clean

ChangePolicy = Literal["error", "reuse", "new"]
LoadEngine = Callable[[], Engine]


@dataclass(frozen=True, slots=True)
class Request:
    """What one start is asked to do.

    Attributes:
        items: The videos.
        out: The run folder.
        settings: What captions depend on, and how they are made.
        policy: How to work through the videos.
        version: Version of specvlm, for the rows.
        unreadable: Folders that could not be listed; videos in them were not found, which counts as a failure.
        overwrite: Caption all given videos anew.
        retry_failed: Try the given videos again that failed before.
        on_config_change: What to do where the folder holds captions made with other settings.
        max_failures_share: Stop once this share of the videos to do has failed; None: see
            `policy.max_failures`.
        exit_zero: Failed videos do not change the exit code.
    """

    items: Sequence[Item]
    out: Path
    settings: CaptionSettings
    policy: Policy
    version: str
    unreadable: int = 0
    overwrite: bool = False
    retry_failed: bool = False
    on_config_change: ChangePolicy = "error"
    max_failures_share: float | None = None
    exit_zero: bool = False


class Display(Reporter, Protocol):
    """A reporter that is on show while a run works."""

    def working(self, todo: int) -> AbstractContextManager[None]:
        """Show progress while the block runs."""

    def note(self, message: str) -> None:
        """Say something that is worth a line."""


def run(
    request: Request, load_engine: LoadEngine, display: Display, *, check: Callable[[], None] = lambda: None
) -> Outcome:
    """Caption what is to be captioned, and say how it ended.

    `check` is called before anything is written, where there is something to do; what it raises is raised.

    Raises:
        CommandError: The start could not be made, or could not go on.
    """
    started = time.monotonic()
    folder = choose_folder(request)
    if str(folder.root) != str(request.out):
        display.note(f"settings changed: captions go to {clean(str(folder.root))}")
    if (outcome := _nothing_to_do(request, folder)) is not None:
        return outcome
    check()
    run_id = uuid.uuid4().hex
    with folder.locked(run_id) as lock, folder.open() as ledger:
        _settle(request, folder, ledger, lock.after_crash, display)
        with listening(lock.sign_off) as stop:
            outcome = _work(request, folder, ledger, run_id, load_engine, display, stop)
    return replace(outcome, wall_s=time.monotonic() - started)


def plan(request: Request) -> tuple[Outcome, list[bytes]]:
    """Say what a start would do, touching nothing: how things stand, and the paths it would work on.

    Raises:
        CommandError: The start would fail.
    """
    folder = choose_folder(request)
    try:
        with folder.preview() as ledger:
            ledger.want(request.items)
            _refuse_changes(request, folder, ledger)
            paths = ledger.paths_to_do(request.overwrite, request.retry_failed, request.policy.limit)
            return _outcome(request, folder, ledger), paths
    except sqlite3.DatabaseError as error:
        raise folder.damaged(error) if is_damage(error) else error from error


def choose_folder(request: Request) -> RunFolder:
    """Return the run folder: OUT, or with `--on-config-change new` a sibling named after the new settings."""
    folder = RunFolder(request.out)
    known = folder.read()
    fingerprint = request.settings.fingerprint()
    if known is None or known.settings == fingerprint or request.on_config_change != "new":
        return folder
    out = request.out.absolute()
    return RunFolder(out.with_name(f"{out.name}-{config_hash(fingerprint)[:8]}"))


def _nothing_to_do(request: Request, folder: RunFolder) -> Outcome | None:
    """Return the outcome where this start has nothing to do, having touched nothing; else None."""
    if not request.items:
        return Outcome(_code_without_work(request), str(folder.root), found=0, done=0, failed=0, pending=0)
    ledger = folder.peek()
    if ledger is None:
        return None
    try:
        with ledger:
            ledger.want(request.items)
            _refuse_changes(request, folder, ledger)
            work = ledger.paths_to_do(request.overwrite, request.retry_failed, 1)
            return None if work or not folder.parts.in_order(ledger) else _outcome(request, folder, ledger)
    except sqlite3.DatabaseError as error:
        if is_damage(error):  # opening it for writing tells what is wrong
            return None
        raise


def _settle(request: Request, folder: RunFolder, ledger: Ledger, after_crash: bool, display: Display) -> None:
    """Bring ledger and files into the state from which work can begin."""
    ledger.want(request.items)
    _refuse_changes(request, folder, ledger)
    ledger.recover(crashed=after_crash)
    ledger.register()
    for done in folder.parts.repair(ledger):
        display.note(done)


def _work(
    request: Request,
    folder: RunFolder,
    ledger: Ledger,
    run_id: str,
    load_engine: LoadEngine,
    display: Display,
    stop: Stop,
) -> Outcome:
    todo = len(ledger.paths_to_do(request.overwrite, request.retry_failed, request.policy.limit))
    if not todo:
        folder.parts.close_part(ledger, request.policy.part_rows)
        folder.parts.write_failures(ledger)
        return _outcome(request, folder, ledger)
    display.note(f"loading {clean(request.settings.models.name)}")
    engine = load_engine()
    _begin(request, folder, ledger, engine)
    policy = replace(request.policy, max_failures=_most_failures(request, todo))
    provenance = _provenance(request, engine, run_id)
    runner = Runner(ledger, folder.parts, engine, policy, provenance, display)
    with display.working(todo):
        runner.run(stop)
    outcome = _outcome(request, folder, ledger)
    return replace(
        outcome,
        exit_code=_exit_code(request, outcome, stop, runner),
        failed_now=runner.failed,
        figures=runner.tally.figures(),
        stopped=runner.stopped,
    )


def _exit_code(request: Request, outcome: Outcome, stop: Stop, runner: Runner) -> ExitCode:
    if stop.reason is not None and outcome.pending:
        return ExitCode.STOPPED
    if runner.stopped == "max-failures":
        return ExitCode.TOO_MANY_FAILED
    return ExitCode.SOME_FAILED if outcome.failed and not request.exit_zero else outcome.exit_code


def _most_failures(request: Request, todo: int) -> int | None:
    share = request.max_failures_share
    return request.policy.max_failures if share is None else max(1, math.ceil(share * todo))


def _outcome(request: Request, folder: RunFolder, ledger: Ledger) -> Outcome:
    counts = ledger.counts()
    return Outcome(
        _code_without_work(request),
        str(folder.root),
        found=len(request.items),
        done=counts["done"],
        failed=counts["failed"],
        pending=counts["pending"] + counts["running"],
    )


def _code_without_work(request: Request) -> ExitCode:
    return ExitCode.SOME_FAILED if request.unreadable and not request.exit_zero else ExitCode.OK


def _provenance(request: Request, engine: Engine, run_id: str) -> Provenance:
    models = engine.models
    return Provenance(
        target_model=models.target,
        target_revision=models.target_revision,
        draft_model=models.draft,
        prompt=request.settings.prompt,
        config_hash=config_hash(request.settings.fingerprint()),
        specvlm_version=request.version,
        run_id=run_id,
    )


def _begin(request: Request, folder: RunFolder, ledger: Ledger, engine: Engine) -> None:
    """Reopen what is to be done again, then record the settings and what the models turned out to be.

    Only here, with the models loaded, can nothing but the work itself go wrong. In this order a crash between
    the two leaves videos to be done again, never old captions under new settings.
    """
    resolved: Plain = json.loads(json.dumps(engine.models.resolved, default=str))
    known = folder.read()
    changes = differences(known.resolved, resolved) if known is not None else []
    if changes and request.on_config_change != "reuse" and _captions_kept(request, ledger):
        raise UsageError(
            f"{_shown(folder)}: the loaded target is not that of the captions there: {'; '.join(changes)}; "
            "pin it with --revision and --dtype, or accept both with --on-config-change reuse"
        )
    ledger.reopen(request.overwrite, request.retry_failed, request.policy.limit)
    fingerprint = request.settings.fingerprint()
    folder.write(RunFile(fingerprint, config_hash(fingerprint), resolved))


def _refuse_changes(request: Request, folder: RunFolder, ledger: Ledger) -> None:
    """Refuse to mix captions of other settings, or of another video with the same id, into one run."""
    _refuse_other_video(ledger)
    fingerprint = request.settings.fingerprint()
    known = folder.read()
    if request.on_config_change == "reuse" or (known is not None and known.settings == fingerprint):
        return
    if not _captions_kept(request, ledger):
        return
    if known is None and ledger.config_hashes() == {config_hash(fingerprint)}:
        return
    changes = "; ".join(differences(known.settings, fingerprint)) if known else "its run.json is gone"
    raise UsageError(
        f"{_shown(folder)} holds captions made with other settings: {clean(changes)}; give the old value, or "
        "--on-config-change reuse (keep them, go on with the new value) or new (a new folder beside it)"
    )


def _captions_kept(request: Request, ledger: Ledger) -> int:
    return ledger.captions_kept(request.overwrite, request.policy.limit)


def _refuse_other_video(ledger: Ledger) -> None:
    """A video that moved keeps its caption; where the old path is still there, it is another video."""
    for then, now in ledger.moved():
        if lexists(then):
            raise UsageError(
                f"{clean(fsdecode(now))} would have the id of {clean(fsdecode(then))}, known already; "
                "give the folder above both, or another -o folder"
            )


def _shown(folder: RunFolder) -> str:
    return clean(str(folder.root))
