"""`specvlm status`: what it counts, that it touches nothing, and that `--verify` sees every kind of damage."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from specvlm_cli.caption.outcome import Captioning
from specvlm_cli.run import integrity, lock, progress
from specvlm_cli.run.holder import Holder, holder_of
from specvlm_cli.run.ledger import Ledger
from specvlm_cli.run.ledger_view import LedgerProblemError, LedgerView
from specvlm_cli.run.migrations import APPLICATION_ID, STEPS
from specvlm_cli.run.view import view
from tests.cli.conftest import Specvlm, snapshot
from tests.cli.made import Video, fill, make_run, videos

NOW = datetime(2026, 5, 1, 12, 0, 0, tzinfo=UTC)


def ledger(out: Path, shard: int = 0) -> Path:
    return out / ".specvlm" / f"state-{shard:05d}.db"


def change(out: Path, sql: str, shard: int = 0) -> None:
    database = sqlite3.connect(ledger(out, shard), isolation_level=None)
    database.execute(sql)
    database.close()


# Figures


def test_a_run_is_counted_and_nothing_is_touched(
    specvlm: Specvlm, request: pytest.FixtureRequest, out: Path
) -> None:
    folder: Path = request.getfixturevalue("videos")
    (folder / "bad.mp4").write_text("damaged")
    assert specvlm("caption", folder, "-o", out, "--baseline-sample", "1").code == 3
    before = snapshot(out)

    told = specvlm("status", out)
    found = specvlm("status", out, "--json").json
    assert (told.code, told.err) == (0, "")
    assert "5: 4 done, 1 failed, 0 running, 0 pending" in told.out
    assert "VideoDecodeError" in told.out
    assert found["counts"] == {"pending": 0, "running": 0, "done": 4, "failed": 1, "total": 5}
    assert found["figures"]["mean_accepted_tokens"] == 2.0
    assert found["figures"]["decode"]["of_totals"] == pytest.approx(3.0)
    assert re.search(r"^pace +[\d,.]+ videos/h, [\d,.]+ tokens/s$", told.out, re.MULTILINE)
    assert re.search(r"^waiting for input +[<>\d]+ % of the time, with slots free$", told.out, re.MULTILINE)
    assert re.search(
        r"^decode speedup +3.00x over plain at batch size 1.0, 4 measured$", told.out, re.MULTILINE
    )
    assert found["videos_per_hour"] == pytest.approx(3600 * found["per_s"])
    assert found["tokens_per_s"] > 0
    assert 0 <= found["waited_share"] <= 1
    assert [kind["count"] for kind in found["errors"]] == [1]
    assert found["errors"][0]["path"] == str(folder / "bad.mp4")
    assert found["missing_shards"] == []
    assert specvlm("status", out, "--verify").code == 0
    assert specvlm("status", out, "--only-missing").out == ""
    assert snapshot(out) == before


def test_json_is_a_contract(specvlm: Specvlm, out: Path) -> None:
    make_run(out, [videos(2), videos(3, first=2)])
    found = specvlm("status", out, "--json").json
    assert found["schema"] == 1
    assert set(found) == {
        *("schema", "out", "at", "shards", "counts", "captions", "per_s", "videos_per_hour", "tokens_per_s"),
        *("waited_share", "eta_s", "figures", "errors", "last_caption_at", "free_bytes", "problem"),
        "missing_shards",
    }
    assert set(found["shards"][1]) == {
        *(
            "shard",
            "counts",
            "captions",
            "problem",
            "unfinished",
            "holder",
            "pace",
            "tokens_per_s",
            "captioning",
            "last_caption_at",
            "eta_s",
        ),
    }
    assert found["captions"] == 5


def test_several_shards_are_summed_and_shown_one_by_one(specvlm: Specvlm, out: Path) -> None:
    waiting = [Video("w", b"/v/w.mp4", state="pending"), Video("r", b"/v/r.mp4", state="running")]
    make_run(out, [videos(1200), [*videos(3, first=2000), *waiting]], count=3)
    told = specvlm("status", out).out
    assert "1,205: 1,203 done, 0 failed, 1 running, 1 pending" in told
    assert "3 shards" in told
    assert specvlm("status", out, "--json").json["figures"]["captions"] == 1203
    assert [line.split() for line in told.splitlines()[-3:]] == [
        ["0", "1,200", "0", "0", "0", "none"],
        ["1", "3", "0", "1", "1", "none"],
        ["2", "not", "started"],
    ]


@pytest.mark.parametrize("name", ["nowhere", "empty", "file"])
def test_what_is_no_run_folder_is_refused_in_one_line(specvlm: Specvlm, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    done = specvlm("status", tmp_path / name)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert name in done.err


def test_questions_exclude_each_other(specvlm: Specvlm, out: Path) -> None:
    make_run(out, [videos(1)])
    assert specvlm("status", out, "--verify", "--only-missing").code == 2


def at(seconds_ago: float) -> str:
    return (NOW - timedelta(seconds=seconds_ago)).isoformat(timespec="microseconds")


HELD = Holder("here", 1, at(3600), True)


@pytest.mark.parametrize(
    ("ago", "holder", "per_s"),
    [
        ([], None, None),
        ([5], None, None),
        ([0, 10, 20, 30], None, 0.1),  # while nobody runs, time ends with the last video
        ([30, 40, 50, 60], HELD, 3 / 60),  # while somebody does, it goes on
        ([10, 20, 4000, 4010], HELD, 1 / 20),  # an earlier start does not count
        ([10, 20, 300, 310], replace(HELD, since=at(60)), 1 / 20),  # though it was not long ago
        ([10, 20, 1000, 1010], HELD, 1 / 20),  # nor does what is longer than 15 minutes ago
        ([1000, 1500], HELD, 1 / 1500),  # unless there is nothing newer
        ([7, 7, 7], None, None),  # all at one moment: no pace
    ],
)
def test_pace(ago: list[float], holder: Holder | None, per_s: float | None) -> None:
    found = progress.pace([at(one) for one in ago], holder, NOW)
    assert found.per_s == (None if per_s is None else pytest.approx(per_s))
    assert found.last_at == (at(ago[0]) if ago else None)


def test_time_left_is_that_of_the_slowest_shard(out: Path) -> None:
    def shard(seconds: int, waiting: int, name: str) -> Iterator[Video]:
        for index in range(10):
            yield Video(f"{name}{index}", b"/v/%d.mp4" % index, created_at=at(index * seconds))
        for index in range(waiting):
            yield Video(f"{name}w{index}", b"/v/w%d.mp4" % index, state="pending")

    make_run(out, [shard(1, 100, "a"), shard(10, 100, "b")])
    for number in range(2):
        name = {"host": "elsewhere", "pid": 1, "since": at(3600)}
        ledger(out, number).with_suffix(".lock").write_text(json.dumps(name))
    found = progress.status(view(out), NOW)
    assert found.per_s == pytest.approx(1.1)
    assert found.eta_s == pytest.approx(1000.0)
    ledger(out, 1).with_suffix(".lock").write_text("")  # nobody works on shard 1, so it never ends
    assert progress.status(view(out), NOW).eta_s is None


def test_tokens_are_those_of_the_videos_of_the_pace(out: Path) -> None:
    def rows(ago: Sequence[float], tokens: int) -> Iterator[Video]:
        for number, one in enumerate(ago):
            row = {"completion_tokens": tokens}
            yield Video(f"{tokens} {number}", b"/v/a.mp4", created_at=at(one), row=row)

    make_run(out, [rows([5000, 30, 20, 10, 0], 60), rows([40, 20, 0], 5)])
    found = progress.status(view(out), NOW)
    assert [one.tokens_per_s for one in found.shards] == [
        pytest.approx(3 * 60 / 30),
        pytest.approx(2 * 5 / 40),
    ]
    assert found.tokens_per_s == pytest.approx(6.25)
    assert found.videos_per_hour == pytest.approx(3600 * (3 / 30 + 2 / 40))


def test_the_share_of_waiting_is_over_all_workers_of_all_shards(out: Path) -> None:
    make_run(out, [videos(1), videos(1, first=1), videos(1, first=2)])
    assert progress.status(view(out)).waited_share is None
    for shard, noted in enumerate([(100.0, 2, 10.0), (50.0, 4, 30.0)]):
        with Ledger.open(ledger(out, shard)) as open_ledger:
            open_ledger.note_captioning(1.0, 1, 1.0)
            open_ledger.note_captioning(*noted)
    found = progress.status(view(out))
    assert found.waited_share == pytest.approx(40.0 / 400.0)
    assert [one.captioning for one in found.shards] == [
        Captioning(100.0, 2, 10.0),
        Captioning(50.0, 4, 30.0),
        None,
    ]


# Who is at work


def test_holder_is_known_by_name_and_by_the_kernels_list(tmp_path: Path) -> None:
    path = tmp_path / "state.lock"
    assert holder_of(path) is None
    program = f"""
import sys
from pathlib import Path
from specvlm_cli.run.lock import take
with take(Path({str(path)!r}), "run") as held:
    print("named", flush=True); sys.stdin.readline()
    held.sign_off(); print("nameless", flush=True); sys.stdin.readline()
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        for expected in ("named\n", "nameless\n"):
            assert process.stdout.readline() == expected
            found = holder_of(path)
            assert found is not None
            assert (found.pid, found.alive) == (process.pid, True)
            assert (found.since is not None) == (expected == "named\n")
            process.stdin.write("\n")
            process.stdin.flush()
    assert holder_of(path) is None


def test_a_process_that_died_and_one_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "state.lock"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with lock.take(path, "run"):
        name = json.loads(path.read_text())
    path.write_text(json.dumps(name | {"pid": gone.pid}))
    found = holder_of(path)
    assert found is not None
    assert found.alive is False
    path.write_text(json.dumps(name | {"host": "elsewhere"}))
    assert holder_of(path) == Holder("elsewhere", name["pid"], name["since"], None)


def test_looking_takes_no_lock(out: Path) -> None:
    make_run(out, [videos(1)])
    path = ledger(out).with_suffix(".lock")
    with lock.take(path, "run"):
        found = progress.status(view(out))
        assert found.shards[0].running
    with lock.take(path, "run") as held:
        assert not held.after_crash


# Shards with work left


def test_only_missing_is_an_array_expression(specvlm: Specvlm, out: Path) -> None:
    pending = Video("p", b"/v/p.mp4", state="pending")
    make_run(out, [[pending], videos(2), videos(2), [pending], [replace(pending, state="running")]], count=7)
    fill(ledger(out, 2), videos(1, first=50))  # captions that no part holds yet
    assert specvlm("status", out, "--only-missing").out == "0,2-6\n"
    found = specvlm("status", out, "--only-missing", "--json").json
    assert found == {"schema": 1, "missing_shards": [0, 2, 3, 4, 5, 6], "array": "0,2-6"}


def test_a_shard_that_no_start_has_given_its_videos_is_missing(specvlm: Specvlm, out: Path) -> None:
    make_run(out, [[], []])
    change(out, "DELETE FROM counter WHERE name = 'registered'", 1)
    assert specvlm("status", out, "--only-missing").out == "1\n"


@pytest.mark.parametrize(
    ("shards", "expression"),
    [((), ""), ((4,), "4"), ((0, 1, 2), "0-2"), ((5, 0, 3, 4), "0,3-5"), ((0, 2, 4), "0,2,4")],
)
def test_array_expression(shards: tuple[int, ...], expression: str) -> None:
    assert progress.array_expression(shards) == expression


# Ledgers in any state


def test_reading_while_a_run_writes_disturbs_neither(out: Path) -> None:
    make_run(out, [videos(2500)])
    ended, errors = threading.Event(), list[Exception]()
    commits = 0

    def write() -> None:
        nonlocal commits
        database = sqlite3.connect(ledger(out), isolation_level=None, timeout=5.0)
        try:
            while not ended.is_set():
                database.execute("BEGIN IMMEDIATE")
                database.execute("UPDATE item SET attempts = attempts + 1 WHERE ordinal = 1")
                database.execute("COMMIT")
                commits += 1
                time.sleep(0.002)  # far less than a caption takes
        except sqlite3.Error as error:
            errors.append(error)
        finally:
            database.close()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(3):
            assert progress.status(view(out)).counts.done == 2500
        with LedgerView.open(ledger(out)) as open_ledger:
            assert sum(len(page.items) for page in open_ledger.pages()) == 2500
    finally:
        ended.set()
        writer.join()
    assert not errors
    assert commits > 3


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return every file with its time and content; SQLite run as root gives a journal the owner it has."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture
def crashed(tmp_path: Path) -> Path:
    """A run whose ledger has a journal that has to be rolled back."""
    make_run(tmp_path / "live", [videos(3000)], part_rows=0)
    database = sqlite3.connect(ledger(tmp_path / "live"), isolation_level=None)
    database.execute("PRAGMA cache_size = 1")
    database.execute("BEGIN IMMEDIATE")
    database.execute("UPDATE item SET error = hex(randomblob(200))")
    shutil.copytree(tmp_path / "live", tmp_path / "out")
    database.execute("ROLLBACK")
    database.close()
    return tmp_path / "out"


def test_a_journal_that_a_crash_left_is_told_and_not_touched(specvlm: Specvlm, crashed: Path) -> None:
    assert ledger(crashed).with_name("state-00000.db-journal").stat().st_size > 0
    before = contents(crashed)
    told = specvlm("status", crashed)
    assert told.code == 0
    assert "a crash left it in the middle of a write" in told.out
    assert specvlm("status", crashed, "--only-missing").out == "0\n"
    assert specvlm("status", crashed, "--verify").code == 1
    refused = specvlm("export", crashed, crashed.with_name("dest.csv"))
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert "a crash left it" in refused.err
    assert contents(crashed) == before
    assert not crashed.with_name("dest.csv").exists()


def test_a_change_of_the_shard_count_that_was_cut_short(specvlm: Specvlm, out: Path) -> None:
    make_run(out, [videos(3), videos(3, first=3)])
    (out / ".specvlm/resharded").mkdir()
    assert "shard count is being changed" in specvlm("status", out).out
    assert specvlm("status", out, "--only-missing").out == "0-1\n"
    assert specvlm("status", out, "--verify").out.count("\n") == 1
    refused = specvlm("export", out, out.with_name("dest"))
    assert (refused.code, refused.err.count("\n"), out.with_name("dest").exists()) == (1, 1, False)


@pytest.mark.parametrize("steps", range(1, len(STEPS) + 1))
def test_ledgers_of_earlier_versions_are_read_as_they_are(out: Path, steps: int) -> None:
    make_run(out, [[]])
    ledger(out).unlink()
    database = sqlite3.connect(ledger(out), isolation_level=None)
    for statement in (statement for step in STEPS[:steps] for statement in step):
        database.execute(statement)
    database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    database.execute(f"PRAGMA user_version = {steps}")
    database.close()
    fill(ledger(out), videos(3))
    found = progress.status(view(out))
    assert (found.counts.done, found.captions, found.shards[0].problem) == (3, 3, None)
    with LedgerView.open(ledger(out)) as open_ledger:
        assert [len(page.items) for page in open_ledger.pages()] == [3]
        assert open_ledger.parts() == []


@pytest.mark.parametrize(
    ("sql", "words"),
    [("PRAGMA user_version = 99", "upgrade specvlm"), ("PRAGMA application_id = 7", "not a specvlm ledger")],
)
def test_a_ledger_of_another_kind_is_told_in_words(out: Path, sql: str, words: str) -> None:
    make_run(out, [videos(1)])
    change(out, sql)
    with pytest.raises(LedgerProblemError, match=words):
        LedgerView.open(ledger(out))
    assert words in str(progress.status(view(out)).shards[0].problem)


# Verifying


def findings(out: Path) -> list[str]:
    return [finding.text for finding in integrity.verify(view(out)) if finding.wrong]


def first_part(out: Path) -> Path:
    return min((out / "captions").iterdir())


def flip(path: Path, where: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 0x40
    path.write_bytes(data)


def rewrite(out: Path) -> None:
    """Change a caption in a part, and have the ledger list the changed file."""
    part = first_part(out)
    table = pq.read_table(part)
    texts = ["another caption", *table.column("caption").to_pylist()[1:]]
    at = table.schema.get_field_index("caption")
    pq.write_table(table.set_column(at, table.schema.field(at), [texts]), part)
    digest, size = hashlib.sha256(part.read_bytes()).hexdigest(), part.stat().st_size
    change(out, f"UPDATE part SET sha256 = '{digest}', bytes = {size} WHERE name = 'captions/{part.name}'")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "part gone": (lambda out: first_part(out).unlink(), "is gone"),
    "part cut short": (
        lambda out: first_part(out).write_bytes(first_part(out).read_bytes()[:-9]),
        "size diff",
    ),
    "part flipped": (lambda out: flip(first_part(out), 0.3), "sha256"),
    "part says something else": (rewrite, "something else than the ledger in 1 rows"),
    "part outdated": (lambda out: change(out, "UPDATE part SET outdated = 1"), "have changed since"),
    "part twice": (
        lambda out: shutil.copy(first_part(out), out / "captions/part-00000-00077.parquet"),
        "no ledger",
    ),
    "foreign file": (lambda out: (out / "captions/mine.parquet").write_text("x"), "no part of this run"),
    "failures gone": (lambda out: (out / "failures/part-00000.parquet").unlink(), "is gone"),
    "caption lost": (
        lambda out: change(out, "DELETE FROM caption WHERE item = 2"),
        "are done with captions|is done with",
    ),
    "caption moved": (
        lambda out: change(out, "UPDATE caption SET part = NULL WHERE item = 2"),
        "holds 1 rows that do not belong",
    ),
    "part forgotten": (
        lambda out: change(out, "DELETE FROM part WHERE name LIKE 'cap%0.parquet'"),
        "does not list",
    ),
    "video lost": (lambda out: change(out, "DELETE FROM item WHERE ordinal = 3"), "belong to no video"),
    "second ledger": (lambda out: shutil.copy(ledger(out), ledger(out, 1)), "is in shard 0 and in shard 1"),
    "ledger gone": (lambda out: ledger(out).unlink(), "is gone, 3 of its parts are there"),
    "ledger damaged": (
        lambda out: [flip(ledger(out), at / 40) for at in range(8, 36)],
        "damaged|cannot be read",
    ),
    "settings gone": (lambda out: (out / ".specvlm/run.json").unlink(), "is gone"),
    "settings cut": (lambda out: (out / ".specvlm/run.json").write_text("{"), "not readable"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_every_kind_of_damage(specvlm: Specvlm, out: Path, damage: str) -> None:
    make_run(out, [[*videos(25), Video("f", b"/v/f.mp4", state="failed")]], part_rows=10)
    assert findings(out) == []
    hurt, words = DAMAGES[damage]
    hurt(out)
    done = specvlm("status", out, "--verify")
    assert done.code == 1
    lines = done.out.splitlines()
    assert lines == findings(out)
    assert any(re.search(words, line) for line in lines), lines


def test_verify_as_json(specvlm: Specvlm, out: Path) -> None:
    make_run(out, [videos(2)], count=2)
    fill(ledger(out), videos(1, first=50))
    found = specvlm("status", out, "--verify", "--json").json
    assert (found["schema"], found["ok"], found["problems"]) == (1, True, [])
    assert [note.split(":")[0] for note in found["notes"]] == ["shard 0", "shard 1"]


def test_verify_wants_a_caption_for_each_prompt(out: Path) -> None:
    make_run(out, [[Video("a", b"/v/a.mp4", ("one", "two")), Video("b", b"/v/b.mp4", ("one",))]])
    change(out, 'UPDATE item SET prompts = \'["p", "q"]\'')
    assert [line.partition("video ")[2] for line in findings(out)] == [
        "b is done with captions [0], 2 were asked for"
    ]


def test_nothing_from_outside_reaches_the_terminal_raw(specvlm: Specvlm, out: Path) -> None:
    hostile = "\x1b]0;x\x07\u202e[red]\n"
    bad = Video(f"id{hostile}", f"/v/{hostile}.mp4".encode(), state="failed")
    make_run(out, [[bad], [bad]])
    change(out, f"UPDATE item SET error = 'it {hostile}', error_type = 'E{hostile}'")
    for arguments in ([], ["--verify"]):
        done = specvlm("status", out, *arguments)
        text = (done.out + done.err).replace("\n", "")
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
        assert "[red]" in text
