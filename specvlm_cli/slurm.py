"""A Slurm batch script for an array of shards, as text. Knows no ledger and starts nothing.

The script is of two parts: directives and variables, made here for this job, and a body that is the same for
every job. It is bash, not sh: only bash can write any file name on one line. All words from outside stand
quoted in variables, and the body never evaluates them.

The child runs in the background so that the shell can hear Slurm meanwhile. No `srun`: one process needs no step,
and srun, when asked to stop, kills its task.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import Flag, UsageError
from specvlm_cli.run.progress import array_expression

MOST_TASKS = (
    1000  # of one array: unless a cluster has another MaxArraySize than 1001, an index is at most 1000
)
STOP_BEFORE_S = 300
MAX_REQUEUES = 5
CPUS_PER_TASK = 4

_PLAIN = re.compile(r"[A-Za-z0-9_./:,=@+%\[\]-]+")

_BODY = r"""
: "${SLURM_ARRAY_TASK_ID:?this is a job array; submit it as its first lines say}"
task="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
shard=$((SLURM_ARRAY_TASK_ID + ${1:-$offset}))
printf -v number '%05d' "$shard"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

say() { printf '%s %s\n' "$(date +%FT%T)" "$*"; }
results() {
    stat --format='%n %s %y' -- "$out/captions/part-$number"-*.parquet "$out/failures/part-$number.parquet" 2>&1
}

# What a start leaves for the next one: whether any had results, and how many in a row had none.
notes="$logs/$SLURM_JOB_NAME-$task.notes"
begun=no idle=0
[[ -f $notes ]] && read -r begun idle <"$notes"
[[ $idle =~ ^[0-9]{1,6}$ ]] || idle=0
[[ $begun == yes ]] && first_start=()

# Slurm's warning (USR1) comes to this shell alone, so it is passed on. TERM, from scancel or a preemption,
# comes to every process of the task: passed on, it would be a second signal, which drops the video in progress.
child= asked=
trap 'asked=yes; kill -USR1 "$child" 2>/dev/null' USR1
trap : TERM

say "shard $shard of $shards on ${SLURMD_NODENAME:-$HOSTNAME}, requeued ${SLURM_RESTART_COUNT:-0} times"
before=$(results)
"${specvlm[@]}" caption -o "$out" --shard "$shard/$shards" "${first_start[@]}" "${arguments[@]}" \
    </dev/null &
child=$!
[[ -z $asked ]] || kill -USR1 "$child"
while kill -0 "$child" 2>/dev/null; do wait "$child"; done # a signal ends a wait, not the child
wait "$child"
code=$?

case $code in
75 | 130 | 138 | 143) ;; # stopped early; the last three: by a second signal, or one before it was listening
*)
    rm -f -- "$notes"
    say "ended with exit code $code"
    exit "$code"
    ;;
esac

if [[ $(results) == "$before" ]]; then idle=$((10#$idle + 1)); else begun=yes idle=0; fi
if ((idle > max_requeues)); then
    rm -f -- "$notes"
    say "stopped $idle times in a row without a new caption or failure, so not requeued; see above for why"
    exit 75
fi
echo "$begun $idle" >"$notes"
# A task that was cancelled stays cancelled, and one that was preempted comes back without our help.
if [[ $(squeue --noheader --jobs="$task" --format=%T) != RUNNING ]]; then
    say "stopped early; Slurm is ending this task, so not requeued from here"
    exit 75
fi
say "stopped early; requeued, to resume"
scontrol requeue "$task" || say "Slurm would not; submit the missing shards again"
exit 75
"""


@dataclass(frozen=True, slots=True)
class ArrayJob:
    """What a batch script is to do, and what it asks of Slurm.

    Attributes:
        program: How specvlm is started.
        folder: Where the tasks work: relative paths in `arguments` start here.
        out: The run folder, absolute.
        logs: Folder of the tasks' logs, absolute.
        shards: Number of shards of the run.
        tasks: The shards to work on.
        arguments: What follows `specvlm caption`, without `-o` and `--shard`.
        first_start: Flags that only a task's first start gets, none after a requeue.
        setup: Lines of shell that come first, e.g. `module load cuda`.
        name: Name of the job.
        directives: Further `#SBATCH` options as (name, value); an option without a value has an empty one.
        max_running: Most tasks at the same time; None: as many as there is room for.
        stop_before_s: How long before the time limit the tasks are stopped.
        max_requeues: How often in a row a task may be requeued without having done anything.
        version: The version of specvlm that prints this.
    """

    program: Sequence[str]
    folder: Path
    out: Path
    logs: Path
    shards: int
    tasks: Sequence[int]
    arguments: Sequence[str]
    first_start: Sequence[str]
    setup: Sequence[str]
    name: str
    directives: Sequence[tuple[str, str]]
    max_running: int | None
    stop_before_s: int
    max_requeues: int
    version: str


def script(job: ArrayJob) -> str:
    """Return the batch script; undecodable bytes of file names are escaped, so it is UTF-8 text.

    Raises:
        UsageError: A value is not possible in an `#SBATCH` line.
    """
    directives = "\n".join(f"#SBATCH {_directive(name, value)}" for name, value in _directives(job))
    setup = "".join(f"{line}\n" for line in job.setup)
    return f"#!/bin/bash\n{_heading(job)}\n{directives}\n\n{setup}{_variables(job)}{_BODY}"


def quoted(word: str) -> str:
    r"""Return a word as bash reads it back, on one line and safe to look at: `a b` -> `'a b'`, ESC -> `$'\033'`."""
    if clean(word) == word:
        return shlex.quote(word)
    return "$'" + "".join(_escaped(byte) for byte in os.fsencode(word)) + "'"


def _escaped(byte: int) -> str:
    plain = 0x20 <= byte < 0x7F and chr(byte) not in "'\\"
    return chr(byte) if plain else f"\\{byte:03o}"


def _heading(job: ArrayJob) -> str:
    lines = submissions(job)
    how = f"Save as {_file(job)} and submit with" if lines else "Submit with sbatch;"
    said = [
        f"Printed by specvlm {job.version}: {len(job.tasks)} of {job.shards} shards, one task each. {how}",
        *lines,
        "submitted again, it resumes where it stopped.",
    ]
    return "\n".join(f"# {line}" for line in said)


def submissions(job: ArrayJob) -> list[str]:
    """Return the command lines that submit a saved script, window by window; none where one array holds all tasks.

    An index of an array is a shard less the offset of its window, which the script takes as its argument.
    """
    windows = _windows(job.tasks)
    if len(windows) < 2:
        return []
    limit = _limit(job, len(windows))
    return [
        f"sbatch --array={array_expression(indexes)}{limit} {_file(job)} {offset}"
        for offset, indexes in windows.items()
    ]


def _windows(tasks: Sequence[int]) -> dict[int, list[int]]:
    """Return offset -> indexes in an array, for shards that are an offset and an index."""
    windows: dict[int, list[int]] = {}
    for shard in sorted(tasks):
        windows.setdefault(shard - shard % MOST_TASKS, []).append(shard % MOST_TASKS)
    return windows


def _limit(job: ArrayJob, windows: int) -> str:
    """Return how many tasks of one array may run, so that those of all windows are as many as asked for."""
    return "" if job.max_running is None else f"%{max(1, job.max_running // windows)}"


def _file(job: ArrayJob) -> str:
    return f"{job.name}.sbatch"


def _array(job: ArrayJob) -> list[tuple[str, str]]:
    """Return the option that makes an array; where one does not hold all tasks, it comes with each submission."""
    windows = list(_windows(job.tasks).values()) or [[]]
    return [("array", array_expression(windows[0]) + _limit(job, 1))] if len(windows) == 1 else []


def _directives(job: ArrayJob) -> list[tuple[str, str]]:
    return [
        ("job-name", job.name),
        *_array(job),
        ("output", str(job.logs).replace("%", "%%") + "/%x-%A_%a.log"),
        ("open-mode", "append"),
        ("requeue", ""),
        ("signal", f"B:USR1@{job.stop_before_s}"),
        ("nodes", "1"),
        ("ntasks", "1"),
        *job.directives,
    ]


def _directive(name: str, value: str) -> str:
    """Return one option as sbatch reads it from a script; only a double quote can be escaped there."""
    if not value:
        return f"--{name}"
    if clean(value) != value or "\\" in value:
        fix = "give another --logs folder" if name == "output" else "give another value"
        why = ": an #SBATCH line can hold no backslash, control character or byte that is not UTF-8"
        raise UsageError(Flag(name, value), why, fix=fix)
    return f"--{name}={value}" if _PLAIN.fullmatch(value) else f"--{name}={_double_quoted(value)}"


def _double_quoted(value: str) -> str:
    return '"' + value.replace('"', '\\"') + '"'


def _variables(job: ArrayJob) -> str:
    lines = [
        f"cd -- {quoted(str(job.folder))} || exit 1",
        f"out={quoted(str(job.out))}",
        f"logs={quoted(str(job.logs))}",
        f"shards={job.shards}",
        f"offset={min(_windows(job.tasks), default=0)} # of shards from the array's indexes; an argument goes over it",
        f"max_requeues={job.max_requeues} # in a row, without a new caption or failure in between",
        f"specvlm=({_words(job.program)})",
        f"first_start=({_words(job.first_start)})",
        f"arguments=(\n{_one_a_line(job.arguments)})",
    ]
    return "".join(f"{line}\n" for line in lines)


def _words(words: Iterable[str]) -> str:
    return " ".join(map(quoted, words))


def _one_a_line(words: Iterable[str]) -> str:
    """Return words so that a flag begins a line and its value follows on the same line."""
    text = ""
    for word in words:
        text += f"\n    {quoted(word)}" if word.startswith("-") or not text else f" {quoted(word)}"
    return text.removeprefix("\n") + "\n"
