"""What it means that a reading child ended as it did: from its last words and its wait status to a reason."""

from __future__ import annotations

import os
import signal

from specvlm_cli.readers.jobs import Limits
from specvlm_cli.readers.messages import NOT_STARTED, ReaderReport, Said
from specvlm_cli.readers.shared import MisreportError

_TIMEOUT, _CRASHED, _MISREPORTED = "DecodeTimeout", "DecoderCrashed", "DecoderMisreported"
_OUT_OF_TIME = (signal.SIGALRM, signal.SIGXCPU)


def of(report: ReaderReport, status: int, *, killed: bool, limits: Limits) -> Said:
    """Return why a child that sent no frames ended; `killed`: by us, because its time was over."""
    if report.failed is not None:
        return report.failed
    if status == NOT_STARTED:
        reason = "no process can be started to read it; see how many run, and how much memory is free"
        return Said("open", "VideoUnavailableError", reason, transient=True)
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if killed or ended_by in _OUT_OF_TIME:
        return _of_timeout(report, limits)
    if ended_by == signal.SIGKILL:
        reason = "its reading process was killed from outside; see whether memory ran out"
        return Said("decode", _CRASHED, reason, transient=True)
    how = f"by {signal.Signals(ended_by).name}" if ended_by else f"with exit code {os.WEXITSTATUS(status)}"
    reason = f"its reading process ended {how}; the file is damaged or hostile, convert it again"
    return Said("decode", _CRASHED, reason, transient=False)


def _of_timeout(report: ReaderReport, limits: Limits) -> Said:
    if report.began == "open":
        reason = f"not opened within {limits.timeout_s:g} s; check its disk or network mount"
        return Said("open", _TIMEOUT, reason, transient=True)
    limit_s = limits.timeout_s + limits.extra_s(report.size_bytes)
    reason = f"not read within {limit_s:.3g} s; give it more time (--decode-timeout) or fewer frames"
    return Said("decode", _TIMEOUT, reason, transient=False)


def of_hanging_process(limits: Limits) -> Said:
    """Return the reason for a child that does not even die."""
    reason = f"not read within {limits.timeout_s:g} s, and its process hangs in the system; check its disk"
    return Said("open", _TIMEOUT, reason, transient=True)


def of_lost_process() -> Said:
    """Return the reason for a video whose process was lost twice together with the read server."""
    reason = "its reading process was killed twice from outside; see what kills processes here"
    return Said("decode", _CRASHED, reason, transient=True)


def of_no_socket(error: OSError) -> Said:
    """Return the reason for a video that could not be handed to a child."""
    reason = f"no process can be asked to read it ({error.strerror}); allow more open files"
    return Said("open", "VideoUnavailableError", reason, transient=True)


def of_misreport(error: MisreportError) -> Said:
    """Return the reason for a child that said what makes no sense."""
    reason = f"its reading process reported nonsense ({error}); the file may be hostile, convert it again"
    return Said("decode", _MISREPORTED, reason, transient=False)
