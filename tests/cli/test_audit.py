"""`specvlm audit`: equal captions are called equal, every other one is found, and the run folder stays as it is."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from specvlm.bench.reference import Reference, StockCaption
from specvlm.captioner import Captioner
from specvlm.config import FrameSettings, GenerationSettings, SpeculationSettings
from specvlm.packaged import demo_folder
from specvlm.records import Frames
from specvlm_cli import app
from specvlm_cli.audit import differences, work
from specvlm_cli.audit.comparing import RowInputs, RowVerdict, compare
from specvlm_cli.audit.made_with import How, MadeWith
from specvlm_cli.audit.sample import RowPlace, parse_sample
from specvlm_cli.caption import engine
from specvlm_cli.caption.settings import CaptionSettings, ModelChoice, config_hash
from specvlm_cli.commands.audit import around
from specvlm_cli.exits import UsageError
from specvlm_cli.readers import DecodingPool, read_client
from specvlm_cli.run import lock
from specvlm_cli.run.ledger import NO_FILE, Ledger
from specvlm_cli.run.parts import PartFiles
from specvlm_cli.run.shard import shard_of
from specvlm_cli.workers import worker
from tests.cli import drive
from tests.cli.conftest import Specvlm
from tests.cli.fake_reader import READER
from tests.cli.made import Video, fill, make_run

ROOT = Path(__file__).parents[2]
CLIPS = [ROOT / "examples/videos" / name for name in ("two-meet.mp4", "one-grows.mp4")]
PROMPTS = ("Describe the video in detail.", "What moves?")
TOKENS = 32
FLAGS = ("--num-frames", 8, "--max-new-tokens", TOKENS, "--preset", "demo", "--tree", "static", "-q")
LOAD = engine.load_captioner


@cache
def loaded(name: str, dtype: str) -> Captioner:
    return LOAD(ModelChoice(name, draft="none", dtype=dtype, name=name), quiet=True)


def cached(asked: list[ModelChoice]) -> Callable[..., Captioner]:
    """Return what loads each target once for all tests, and notes what was asked for."""

    def load(models: ModelChoice, device: str | None = None, *, quiet: bool) -> Captioner:
        asked.append(models)
        return loaded(models.target, models.dtype)

    return load


@pytest.fixture(autouse=True)
def loads(monkeypatch: pytest.MonkeyPatch) -> list[ModelChoice]:
    """Return what is loaded during a test."""
    asked: list[ModelChoice] = []
    monkeypatch.setattr(engine, "load_captioner", cached(asked))
    return asked


def caption(out: Path, clips: Sequence[Path], *flags: object) -> Path:
    """Make a run with the demo pair, as the product does, in forks of this process."""
    with pytest.MonkeyPatch.context() as patch:
        drive.fork_children(patch.setattr, worker)
        assert app.main([str(one) for one in ("caption", *clips, *FLAGS, *flags, "-o", out)]) == 0
    return out


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two videos in `videos`, and their captions for two prompts, audited, in `run`."""
    folder = tmp_path_factory.mktemp("greedy")
    (folder / "videos").mkdir()
    clips = [Path(shutil.copy(clip, folder / "videos")) for clip in CLIPS]
    asked = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    caption(folder / "run", clips, *asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "load_captioner", cached([]))
        assert app.main(["audit", str(folder / "run"), "--sample", "all", "-q"]) == 0
    return folder


@pytest.fixture
def audited(greedy: Path, out: Path) -> Path:
    """A copy of that run with its verdicts, so that an audit makes changed rows alone."""
    shutil.copytree(greedy / "run", out)
    return out


@pytest.fixture
def run(audited: Path) -> Path:
    """A copy of that run without an audit; its videos are those of all tests."""
    shutil.rmtree(audited / "audit")
    return audited


def contents(out: Path) -> dict[str, str]:
    """Return the hash of every file outside of `audit`, with its time."""
    return {
        str(
            path.relative_to(out)
        ): f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns}"
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.relative_to(out).parts[0] != "audit"
    }


def stored(out: Path) -> list[dict[str, Any]]:
    """Return the rows of a ledger, in its order."""
    with closing(sqlite3.connect(out / ".specvlm/state-00000.db")) as database:
        found = database.execute("SELECT row FROM caption ORDER BY item, prompt_index").fetchall()
    return [json.loads(row) for (row,) in found]


def plant(out: Path, number: int, **changes: object) -> dict[str, Any]:
    """Change one row, in the ledger and in its part; return it as it is now."""
    ledger = out / ".specvlm/state-00000.db"
    row = stored(out)[number] | changes
    with closing(sqlite3.connect(ledger, isolation_level=None)) as database:
        places = database.execute(
            "SELECT item, prompt_index FROM caption ORDER BY item, prompt_index"
        ).fetchall()
        database.execute(
            "UPDATE caption SET row = ? WHERE (item, prompt_index) = (?, ?)",
            (json.dumps(row), *places[number]),
        )
        database.execute("UPDATE part SET outdated = 1")
    with Ledger.open(ledger) as opened:
        PartFiles(out, 0).close_part(opened, 1000)
    (part,) = (out / "captions").glob("part-00000-*.parquet")
    assert row["caption"] in pq.read_table(part).column("caption").to_pylist()
    return row


def listed(out: Path) -> list[dict[str, Any]]:
    """Return the rows of the file of differences."""
    (file,) = (out / "audit").glob("[!.]*.parquet")
    table = pq.read_table(file)
    assert table.schema.equals(differences.SCHEMA)
    return list(table.to_pylist())


# Against the real target


def test_a_clean_run_is_equal_and_stays_as_it_is(
    specvlm: Specvlm, run: Path, loads: list[ModelChoice]
) -> None:
    before = contents(run)
    done = specvlm("audit", run, "--sample", "all", "--json")
    assert (done.code, done.err) == (0, "")
    found = done.json
    assert (found["captions"], found["chosen"], found["compared"], found["equal"]) == (4, 4, 4, 4)
    assert (found["made_now"], found["left"], found["stopped"], found["differences"]) == (4, 0, None, [])
    assert contents(run) == before
    assert listed(run) == []
    (models,) = loads
    assert (models.name, models.target, models.draft, models.dtype) == (
        "specvlm-demo/qwen-target",
        str(demo_folder("qwen-target")),
        "none",
        "float32",
    )
    again = specvlm("audit", run, "--sample", "all", "--json")
    assert (again.code, again.json["equal"], again.json["made_now"]) == (0, 4, 0)
    assert len(loads) == 1, "nothing was to be made, so nothing is loaded"
    assert specvlm("status", run, "--verify").code == 0
    assert contents(run) == before


def test_a_changed_word_is_found_with_its_token_and_margin(specvlm: Specvlm, audited: Path) -> None:
    text = stored(audited)[1]["caption"]
    words = text.split()
    row = plant(audited, 1, caption=" ".join([*words[:3], "walrus", *words[4:]]))
    done = specvlm("audit", audited, "--sample", "all")
    assert done.code == 3
    told = dict(re.split(r"  +", line, maxsplit=1) for line in done.out.splitlines() if "  " in line)
    assert (told["equal"].split()[0], told["different"].split()[0]) == ("3", "1")
    (line,) = [line for line in done.out.splitlines() if "walrus" in line]
    assert row["path"] in line
    assert PROMPTS[1] in line
    (found,) = listed(audited)
    assert (found["id"], found["path"], found["prompt"]) == (row["id"], row["path"], row["prompt"])
    assert (found["outcome"], found["differs"]) == ("different", ["caption"])
    assert (found["run_text"], found["stock_text"]) == (row["caption"], text)
    assert found["margin"] > 0
    captioner = loaded(str(demo_folder("qwen-target")), "float32")
    tokens = captioner.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert captioner.detokenize(tokens[: found["token_index"]]) == " ".join(words[:3])


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"completion_tokens": 11}, ["completion_tokens"]),
        ({"finish_reason": "stop"}, ["finish_reason"]),
        ({"prompt": "What is its colour?"}, ["prompt_tokens", "prompt", "prompt_sha256"]),
        ({"config_hash": "0" * 16}, ["config_hash"]),
        ({"target_model": "specvlm-demo/llava-target"}, ["target_model"]),
        ({"target_revision": "sha256:0123456789abcdef"}, ["target_revision"]),
        ({"video_tokens": 1, "prompt_tokens": 2}, ["prompt_tokens", "video_tokens"]),
    ],
    ids=lambda one: "-".join(one)[:40],
)
def test_a_row_that_says_something_else_is_found(
    specvlm: Specvlm, audited: Path, changes: dict[str, object], differs: list[str]
) -> None:
    row = plant(audited, 0, **changes)
    found = specvlm("audit", audited, "--sample", "all", "--json")
    assert (found.code, found.json["equal"], found.json["different"]) == (3, 3, 1)
    (only,) = listed(audited)
    assert (only["id"], only["prompt_index"]) == (row["id"], 0)
    assert set(differs) <= set(only["differs"])
    assert [found.json["differences"][0][name] for name in ("id", "differs")] == [row["id"], only["differs"]]


def test_a_row_of_another_checkpoint_is_found(specvlm: Specvlm, audited: Path) -> None:
    """Nothing but the text gives it away."""
    other = loaded(str(demo_folder("qwen-draft")), "float32")
    number, row = next(one for one in enumerate(stored(audited)) if "two-meet" in one[1]["path"])
    frames = FrameSettings(num_frames=8)
    made = other.caption(row["path"], row["prompt"], frames=frames, speculate=False, max_new_tokens=TOKENS)
    assert made.text != row["caption"]
    plant(audited, number, caption=made.text)
    assert specvlm("audit", audited, "--sample", "all").code == 3
    (found,) = listed(audited)
    assert (found["differs"], found["stock_text"]) == (["caption"], row["caption"])


def test_a_row_of_other_frames_is_found(specvlm: Specvlm, audited: Path) -> None:
    captioner = loaded(str(demo_folder("qwen-target")), "float32")
    row = stored(audited)[3]
    prepared = captioner.prepare(row["path"], row["prompt"], frames=FrameSettings(num_frames=2))
    made = captioner.caption(prepared, speculate=False, max_new_tokens=TOKENS)
    plant(audited, 3, caption=made.text, num_frames=2, frame_times_s=[0.0, 1.0])
    assert specvlm("audit", audited, "--sample", "all").code == 3
    (found,) = listed(audited)
    assert set(found["differs"]) >= {"caption", "num_frames", "frame_times_s"}


@pytest.mark.parametrize(
    ("gone", "equal", "differs"),
    [({"start", "end"}, 4, []), ({"prompt"}, 3, [["prompt"]])],
    ids=["part", "prompt"],
)
def test_a_row_may_lack_columns(
    specvlm: Specvlm, audited: Path, gone: set[str], equal: int, differs: list[list[str]]
) -> None:
    plant(audited, 0, **dict.fromkeys(gone))
    with closing(sqlite3.connect(audited / ".specvlm/state-00000.db", isolation_level=None)) as database:
        lacks = json.dumps({name: value for name, value in stored(audited)[0].items() if name not in gone})
        database.execute(
            "UPDATE caption SET row = ? WHERE prompt_index = 0 AND item = (SELECT min(item) FROM caption)",
            (lacks,),
        )
    found = specvlm("audit", audited, "--sample", "all", "--json")
    assert (found.code, found.json["equal"]) == (0 if equal == 4 else 3, equal)
    assert [one["differs"] for one in found.json["differences"]] == differs


def test_text_that_is_no_unicode_is_refused_in_one_line(specvlm: Specvlm, audited: Path) -> None:
    row = json.dumps(stored(audited)[0] | {"caption": "a\udc80b"})
    with closing(sqlite3.connect(audited / ".specvlm/state-00000.db", isolation_level=None)) as database:
        database.execute(
            "UPDATE caption SET row = ? WHERE prompt_index = 0 AND item = (SELECT min(item) FROM caption)",
            (row,),
        )
    done = specvlm("audit", audited, "--sample", "all")
    assert done.code == 1
    assert "the ledger is damaged (a row whose 'caption' is 'a\\udc80b')" in done.err


def test_a_row_of_fewer_frames_for_want_of_memory_is_made_of_those(specvlm: Specvlm, audited: Path) -> None:
    captioner = loaded(str(demo_folder("qwen-target")), "float32")
    row = stored(audited)[0]
    frames, _ = captioner._read(row["path"], FrameSettings(num_frames=8))
    half = frames._replace(pixels=frames.pixels[::2], times_s=frames.times_s[::2])
    made = captioner.caption(half, row["prompt"], speculate=False, max_new_tokens=TOKENS)
    stats = {name: getattr(made.stats, name) for name in ("num_frames", "prompt_tokens", "video_tokens")}
    assert stats["num_frames"] == 4
    flags = [*row["flags"], "reduced_frames"]
    plant(audited, 0, caption=made.text, frame_times_s=half.times_s.tolist(), flags=flags, **stats)
    assert specvlm("audit", audited, "--sample", "all").code == 0


def test_a_file_that_is_another_one_now_is_not_compared(
    specvlm: Specvlm, run: Path, greedy: Path, loads: list[ModelChoice]
) -> None:
    first, second = (greedy / "videos" / clip.name for clip in CLIPS)
    kept = first.stat()
    second.rename(greedy / "elsewhere.mp4")
    try:
        os.utime(first, ns=(kept.st_atime_ns, kept.st_mtime_ns + 1))
        done = specvlm("audit", run, "--sample", "all", "--json")
    finally:
        os.utime(first, ns=(kept.st_atime_ns, kept.st_mtime_ns))
        (greedy / "elsewhere.mp4").rename(second)
    assert (done.code, done.json["changed"], done.json["missing"], done.json["compared"]) == (3, 2, 2, 0)
    assert loads == [], "there was nothing to caption"
    assert {(Path(row["path"]).name, row["outcome"]) for row in listed(run)} == {
        (first.name, "changed"),
        (second.name, "missing"),
    }
    assert all(row["error"] and row["stock_text"] is None for row in listed(run))
    back = specvlm("audit", run, "--sample", "all", "--json")
    assert (back.code, back.json["equal"], back.json["made_now"]) == (0, 4, 4)


def test_a_video_that_gives_no_frames_is_unreadable(specvlm: Specvlm, audited: Path, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    film.write_text("not a video")
    row = stored(audited)[0]
    with closing(sqlite3.connect(audited / ".specvlm/state-00000.db", isolation_level=None)) as database:
        sql = "UPDATE item SET size_bytes = ?, mtime_ns = ? WHERE id = ?"
        database.execute(sql, (film.stat().st_size, film.stat().st_mtime_ns, row["id"]))
    for number in (0, 1):
        plant(audited, number, path=str(film))
    done = specvlm("audit", audited, "--sample", "all", "--json")
    assert (done.code, done.json["unreadable"], done.json["equal"]) == (3, 2, 2)
    assert "NotAVideoError" in listed(audited)[0]["error"]
    again = specvlm("audit", audited, "--sample", "all", "--json")
    assert (again.code, again.json["made_now"], again.json["unreadable"]) == (3, 2, 2), "it is tried again"


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that sampled."""
    out = tmp_path_factory.mktemp("sampled") / "run"
    return caption(out, CLIPS, "--temperature", "3", "--seed", 11, "--top-k", 40)


def test_a_run_that_sampled_is_equal(sampled: Path, greedy: Path, specvlm: Specvlm, out: Path) -> None:
    shutil.copytree(sampled, out)
    assert all(
        row["caption"] not in (one["caption"] for one in stored(greedy / "run")) for row in stored(out)
    )
    assert specvlm("audit", out, "--sample", "all", "--json").json["equal"] == 2
    words = stored(out)[0]["caption"].split()
    plant(out, 0, caption=" ".join(reversed(words)))
    assert specvlm("audit", out, "--sample", "all").code == 3
    (found,) = listed(out)
    assert found["token_index"] == 0


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_the_reference_is_the_plain_caption(
    penalty: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a repetition penalty and a nucleus in the generation config, which are applied once."""
    captioner = loaded(str(demo_folder("qwen-target")), "float32")
    config = captioner.generation_config
    monkeypatch.setattr(config, "repetition_penalty", penalty)
    monkeypatch.setattr(config, "top_p", 0.95)
    monkeypatch.setattr(captioner, "_decoders", {})
    frames, _ = captioner._read(CLIPS[0], FrameSettings(num_frames=4))
    options: dict[str, Any] = {"max_new_tokens": 16, "temperature": temperature, "seed": 7}
    plain = captioner.caption(frames, PROMPTS[0], speculate=False, **options)
    made = Reference(captioner, GenerationSettings(**options), None).caption(frames, PROMPTS[0])
    assert made.token_ids == plain.token_ids
    assert (made.text, made.finish_reason) == (plain.text, plain.finish_reason)
    assert len(made.margins) == len(made.token_ids)
    assert min(made.margins) > 0
    assert captioner.target.model.generation_config is config


def test_another_target_of_the_same_name_is_refused(specvlm: Specvlm, run: Path) -> None:
    file = run / ".specvlm/run.json"
    said = json.loads(file.read_text())
    said["resolved"]["target_revision"] = "sha256:0123456789abcdef"
    file.write_text(json.dumps(said))
    refused = specvlm("audit", run, "--sample", "all")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "is not the target of the captions, although it has its name: target_revision was" in refused.err


# With a fake target: which rows, and what becomes of an audit that is cut short

SETTINGS = CaptionSettings(
    ModelChoice("fake/target", name="fake/target"),
    ("Describe it.",),
    None,
    FrameSettings(),
    GenerationSettings(max_new_tokens=20),
    SpeculationSettings(),
).fingerprint()


class FakeStock:
    """Writes "a caption" about every video."""

    def __init__(self, journal: Path, at: int = 0, number: signal.Signals | None = None) -> None:
        """At caption `at` of this start, the signal comes."""
        self._journal, self._at, self._number, self._calls = journal, at, number, 0
        info = SimpleNamespace(target_revision=None)
        self.captioner = SimpleNamespace(frame_multiple=1, info=info, detokenize=lambda tokens: "a caption")

    def caption(self, frames: Frames, prompt: str, stop: Callable[[], bool]) -> StockCaption:
        self._calls += 1
        if self._number is not None and self._calls == self._at:
            os.kill(os.getpid(), self._number)
        with self._journal.open("a") as file:
            file.write(f"{frames.source.size_bytes if frames.source else 0}\n")
        return StockCaption(tuple(range(13)), "a caption", "stop", (1.0,) * 13, 150, 128)


@pytest.fixture
def fake(specvlm: Specvlm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Put a fake target in place; the videos are text files."""
    monkeypatch.setattr(work, "DecodingPool", partial(DecodingPool, reader=READER))

    def put(at: int = 0, number: signal.Signals | None = None) -> None:
        monkeypatch.setattr(
            work, "open_stock", lambda made_with, how: FakeStock(tmp_path / "journal", at, number)
        )

    put()
    return put


def made(tmp_path: Path) -> int:
    """Return how many captions fake targets have written."""
    with suppress(FileNotFoundError):
        return len((tmp_path / "journal").read_text().splitlines())
    return 0


def fake_videos(folder: Path, numbers: Iterable[int], **row: object) -> list[Video]:
    folder.mkdir(exist_ok=True)
    found = []
    for number in numbers:
        path = folder / f"{number:04d}.mp4"
        path.write_text("video")
        os.utime(path, ns=(1, 1))  # what the fake reader says
        said = {"config_hash": config_hash(SETTINGS), "frame_times_s": [float(one) for one in range(8)]}
        said["prompt_sha256"] = hashlib.sha256(b"Describe it.").hexdigest()
        found.append(Video(f"id{number}", os.fsencode(path), row=said | row))
    return found


def fake_run(out: Path, shards: Sequence[Sequence[Video]]) -> Path:
    make_run(out, shards)
    settle(out, len(shards))
    return out


def settle(out: Path, shards: int = 1) -> None:
    """Have `run.json` name settings, and the ledgers stamps of files."""
    file = out / ".specvlm/run.json"
    known = {"settings": SETTINGS, "config_hash": config_hash(SETTINGS)}
    file.write_text(json.dumps(json.loads(file.read_text()) | known))
    for shard in range(shards):
        with closing(
            sqlite3.connect(out / f".specvlm/state-{shard:05d}.db", isolation_level=None)
        ) as database:
            database.execute("UPDATE item SET size_bytes = 5, mtime_ns = 1")


@pytest.fixture
def faked(fake: Callable[..., None], out: Path, tmp_path: Path) -> Path:
    """A run of two shards with twenty captions that a fake target writes again."""
    videos = fake_videos(tmp_path / "films", range(20))
    return fake_run(out, [videos[:12], videos[12:]])


def test_a_sample_is_the_same_each_time_and_part_of_a_larger_one(
    specvlm: Specvlm, faked: Path, tmp_path: Path
) -> None:
    for size, chosen, now in (("3", 3, 3), ("3", 3, 0), ("8", 8, 5), ("all", 20, 12), ("1%", 1, 0)):
        found = specvlm("audit", faked, "--sample", size, "--json").json
        assert (found["sample"], found["chosen"], found["equal"], found["made_now"]) == (
            size,
            chosen,
            chosen,
            now,
        )
    assert made(tmp_path) == 20
    assert specvlm("audit", faked, "--json").json["sample"] == "1%"


def place(number: int, index: int = 0) -> RowPlace:
    return RowPlace(0, number, index, f"id{number}", NO_FILE, own_prompts=False)


def test_shares_and_numbers_choose_by_one_order() -> None:
    places = [place(number, index) for number in range(1000) for index in range(2)]
    chosen = [set(parse_sample(size).of(reversed(places))) for size in ("5", "1%", "37", "10%", "900", "all")]
    assert all(less <= more for less, more in pairwise(chosen))
    assert [len(chosen[number]) for number in (0, 2, 4, 5)] == [5, 37, 900, 2000]
    assert 100 < len(chosen[3]) < 300
    assert parse_sample("10%").of(places) == sorted(chosen[3])
    fewer = set(parse_sample("10%").of(places[:1000]))
    assert fewer == {one for one in chosen[3] if one.ordinal < 500}, "rows that are added move no other"
    assert len(parse_sample("0.000001%").of(places)) == 2, "at least one video"
    assert parse_sample("all").of([]) == parse_sample("1%").of([]) == parse_sample("9").of([]) == []


@pytest.mark.parametrize("size", ["0", "0%", "101%", "-1", "1.5", "some", "", "%", "1e3", "5 %", "\x1b[1m"])
def test_what_is_no_sample_is_refused(size: str) -> None:
    with pytest.raises(UsageError, match="is no sample; give a share above 0%") as refused:
        parse_sample(size)
    assert "\x1b" not in str(refused.value)


def test_shards_divide_a_sample(specvlm: Specvlm, faked: Path, tmp_path: Path) -> None:
    chosen = []
    for index in range(3):
        found = specvlm("audit", faked, "--sample", "15", "--shard", f"{index}/3", "--json")
        assert found.code == 0
        chosen.append(found.json["chosen"])
        assert Path(found.json["differences_file"]).name == f"differences-{index:05d}-of-00003.parquet"
    assert (sum(chosen), made(tmp_path)) == (15, 15)
    whole = specvlm("audit", faked, "--sample", "all", "--shard", "1/3", "--json").json
    assert whole["chosen"] == sum(shard_of(f"id{number}", 3) == 1 for number in range(20))


def test_a_signal_stops_and_the_next_start_resumes(
    specvlm: Specvlm, faked: Path, fake: Callable[..., None], tmp_path: Path
) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        fake(6, number)
        before = made(tmp_path)
        done = specvlm("audit", faked, "--sample", "all", "--json")
        assert (done.code, done.json["stopped"]) == (75, number.name)
        assert done.json["made_now"] == 5, "the sixth was cut short"
        assert done.json["left"] == 20 - done.json["equal"]
        assert f"stopped by {number.name}, {done.json['left']} left; start again to resume" in done.err
        assert made(tmp_path) == before + 6
    fake()
    done = specvlm("audit", faked, "--sample", "all", "--json")
    assert (done.code, done.json["equal"], done.json["made_now"]) == (0, 20, 10)


def test_after_a_kill_nothing_is_lost_and_nothing_is_made_twice(
    specvlm: Specvlm, faked: Path, fake: Callable[..., None], tmp_path: Path
) -> None:
    before = contents(faked)
    fake(8, signal.SIGKILL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns about other threads
        child = os.fork()
    if child == 0:
        with suppress(BaseException):
            drive.fork_children(setattr, read_client)
            app.main(["audit", str(faked), "--sample", "all", "-q"])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    fake()
    done = specvlm("audit", faked, "--sample", "all", "--json")
    assert (done.code, done.json["equal"], done.json["made_now"]) == (0, 20, 13)
    assert made(tmp_path) == 20
    assert contents(faked) == before


def test_only_new_and_changed_rows_are_made(specvlm: Specvlm, faked: Path, tmp_path: Path) -> None:
    assert specvlm("audit", faked, "--sample", "all").code == 0
    fill(faked / ".specvlm/state-00001.db", fake_videos(tmp_path / "films", range(20, 23)))
    settle(faked, 2)
    found = specvlm("audit", faked, "--sample", "all", "--json").json
    assert (found["captions"], found["equal"], found["made_now"]) == (23, 23, 3)
    plant(faked, 4, caption="another")
    found = specvlm("audit", faked, "--sample", "all", "--json").json
    assert (found["equal"], found["different"], found["made_now"]) == (22, 1, 1)
    found = specvlm("audit", faked, "--sample", "all", "--again", "--json").json
    assert (found["equal"], found["different"], found["made_now"]) == (22, 1, 23)


def test_prompts_that_were_added_make_no_row_another_one(specvlm: Specvlm, faked: Path) -> None:
    assert specvlm("audit", faked, "--sample", "all").code == 0
    file = faked / ".specvlm/run.json"
    more = SETTINGS | {"prompt": ["Describe it.", "What moves?"]}
    known = {"settings": more, "config_hash": config_hash(more)}
    file.write_text(json.dumps(json.loads(file.read_text()) | known))
    found = specvlm("audit", faked, "--sample", "all", "--json").json
    assert (found["equal"], found["made_now"]) == (20, 0)
    assert specvlm("audit", faked, "--sample", "all", "--again", "--json").json["equal"] == 20


def test_it_works_while_a_run_goes_on_and_alone_on_its_shard(specvlm: Specvlm, faked: Path) -> None:
    with lock.take(faked / ".specvlm/state-00000.lock", "run"):
        assert specvlm("audit", faked, "--sample", "all").code == 0
    with lock.share(faked / "audit/verdicts-00000-of-00001.lock", alone=True):
        busy = specvlm("audit", faked)
        assert (busy.code, busy.out) == (75, "")
        assert busy.err.endswith("another audit of this shard is at work; wait for that to end\n")
        assert specvlm("audit", faked, "--shard", "0/2").code == 0


def test_rows_that_a_run_takes_out_meanwhile_are_left(
    specvlm: Specvlm, faked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `caption --overwrite` does."""
    write = FakeStock.caption

    def take_out(self: FakeStock, *arguments: Any) -> StockCaption:
        with closing(sqlite3.connect(faked / ".specvlm/state-00001.db", isolation_level=None)) as database:
            database.execute("DELETE FROM caption")
        return write(self, *arguments)

    monkeypatch.setattr(FakeStock, "caption", take_out)
    done = specvlm("audit", faked, "--sample", "all", "--json")
    assert (done.code, done.json["equal"], done.json["left"]) == (75, 12, 8)
    assert done.err == "the run took captions out meanwhile, 8 left; start again to resume\n"
    again = specvlm("audit", faked, "--sample", "all", "--json")
    assert (again.code, again.json["captions"], again.json["made_now"]) == (0, 12, 0)


def test_the_number_format_is_that_of_the_rows_wherever_it_is_audited() -> None:
    for asked, found, has_cuda, loaded_as in (
        ("auto", "float32", False, "float32"),
        ("auto", "float32", True, "float32"),
        ("auto", "bfloat16", True, "auto"),
        ("auto", "bfloat16", False, "bfloat16"),
        ("auto", None, True, "auto"),
        ("float16", "float16", True, "float16"),
    ):
        made = replace(MADE_WITH, settings={"dtype": asked}, resolved={"dtype": found})
        assert made.models(How("cpu"), has_cuda=has_cuda).dtype == loaded_as
    commit = replace(
        MADE_WITH, settings={"dtype": "auto", "revision": "main"}, resolved={"target_revision": "a" * 40}
    )
    assert commit.models(How(), has_cuda=True).revision == "a" * 40
    hashed = replace(commit, resolved={"target_revision": "sha256:0123456789abcdef"})
    assert hashed.models(How(), has_cuda=True).revision == "main"


def test_a_target_that_always_fails_ends_the_audit(
    specvlm: Specvlm, faked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: FakeStock, *_: object) -> StockCaption:
        self._calls += 1
        if self._calls == 2:
            return StockCaption(tuple(range(13)), "a caption", "stop", (1.0,) * 13, 150, 128)
        raise RuntimeError("out of\n\x1b[1mmemory")

    with monkeypatch.context() as patch:
        patch.setattr(FakeStock, "caption", fail)
        done = specvlm("audit", faked, "--sample", "all")
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert (
            "stock generate() failed on 5 captions in a row (last: RuntimeError: out of \\x1b[1mmemory)"
            in done.err
        )
        few = specvlm("audit", faked, "--sample", "3", "--again", "--json")
        assert (few.code, few.json["failed"], few.json["equal"]) == (3, 2, 1)
    assert specvlm("audit", faked, "--sample", "all", "--json").json["made_now"] == 19


def test_text_from_outside_is_made_harmless(
    specvlm: Specvlm, fake: Callable[..., None], out: Path, tmp_path: Path
) -> None:
    (video,) = fake_videos(tmp_path / "films", [1])
    path = tmp_path / "films/\x1b[2J.mp4"
    Path(os.fsdecode(video.path)).rename(path)
    hostile = replace(video, path=os.fsencode(path), captions=("a \x1b[31mcap\ntion\u202e",))
    fake_run(out, [[hostile]])
    done = specvlm("audit", out)
    assert done.code == 3
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", done.out)
    assert "\\x1b[2J.mp4" in done.out
    assert "1 of 1 captions" in done.out
    assert listed(out)[0]["run_text"] == "a \x1b[31mcap\ntion\u202e"
    quiet = specvlm("audit", out, "-q")
    assert (quiet.code, quiet.out, quiet.err) == (3, "", "")


def test_wrong_use_is_one_line_and_exit_2(specvlm: Specvlm, tmp_path: Path, faked: Path) -> None:
    empty = fake_run(
        tmp_path / "empty", [[replace(fake_videos(tmp_path / "films", [1])[0], state="pending")]]
    )
    for arguments, words in (
        ((tmp_path / "films",), "not a run folder; give the output folder of specvlm caption"),
        ((tmp_path / "nowhere",), "nowhere: no such folder"),
        ((empty,), "no caption is finished yet; run specvlm caption first"),
        ((faked, "--sample", "half"), "--sample 'half' is no sample"),
        ((faked, "--shard", "3/2"), "--shard 3/2: shards count from 0 to 1"),
        ((faked, "--device-map", "rubbish"), "--device-map 'rubbish' is unknown"),
        ((faked, "--decode-timeout", "soon"), "--decode-timeout soon"),
        ((), "Missing argument 'OUT'"),
    ):
        refused = specvlm("audit", *arguments)
        assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1), arguments
        assert words in refused.err
    assert not (faked / "audit").exists()
    assert not (empty / "audit").exists()


@contextmanager
def swapped(path: Path, said: str | None) -> Iterator[None]:
    """Have a file say something else, or be gone."""
    kept = path.read_bytes()
    path.unlink()
    if said is not None:
        path.write_text(said)
    yield
    path.write_bytes(kept)


def test_a_folder_that_is_not_as_a_run_leaves_it_is_refused(
    specvlm: Specvlm, faked: Path, tmp_path: Path
) -> None:
    state = faked / ".specvlm"
    said = json.loads((state / "run.json").read_text())
    odd = said | {"settings": said["settings"] | {"prompt": 3}}
    for path, text, words in (
        (state / "run.json", None, "run.json: is gone"),
        (state / "run.json", "{", "run.json: not readable"),
        (
            state / "run.json",
            json.dumps(odd),
            "does not say how captions were made (TypeError: prompt is no text",
        ),
        (state / "state-00001.db", None, "state-00001.db: is gone; start specvlm caption again"),
        (state / "state-00001.db", "not a ledger", "the ledger is damaged"),
    ):
        with swapped(path, text):
            refused = specvlm("audit", faked)
        assert (refused.code, refused.err.count("\n")) == (1, 1), words
        assert words in refused.err
    (tmp_path / "elsewhere").mkdir()
    (faked / "audit").symlink_to(tmp_path / "elsewhere")
    refused = specvlm("audit", faked)
    assert (refused.code, "a link, which specvlm does not follow here" in refused.err) == (1, True)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_files_of_an_audit_that_are_not_its_own_are_refused(
    specvlm: Specvlm, faked: Path, tmp_path: Path
) -> None:
    assert specvlm("audit", faked, "--sample", "2").code == 0
    file = faked / "audit/verdicts-00000-of-00001.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as database:
        database.execute("UPDATE verdict SET found = '{}'")
    for text in (None, "rubbish " * 100):
        if text is not None:
            file.write_text(text)
        refused = specvlm("audit", faked, "--sample", "2")
        assert (refused.code, refused.err.count("\n")) == (1, 1)
        assert "verdicts-00000-of-00001.db is damaged" in refused.err
        assert "delete it to have all captions compared again" in refused.err
    file.unlink()
    (tmp_path / "mine").write_text("mine")
    file.symlink_to(tmp_path / "mine")
    assert specvlm("audit", faked).code == 1
    assert (tmp_path / "mine").read_text() == "mine"
    file.unlink()
    assert specvlm("audit", faked, "--sample", "2").code == 0


# What differs, and where

MADE_WITH = MadeWith("t", ("p",), None, FrameSettings(), GenerationSettings(), {}, {}, frozenset({"h"}))
WORDS = ("a", " red", " ball", " moves", ".", "")


def verdict(caption: str, reason: Any = "stop", count: int = 6, **kept: str) -> RowVerdict:
    """Compare a row with what stock wrote: the first `count` of `WORDS`, the last of which is the end."""
    row = {"caption": caption, "prompt": "p", "target_model": "t", "config_hash": "h", **kept}

    def decode(ids: Sequence[int]) -> str:
        return "".join(WORDS[one] for one in ids).strip()

    ids = tuple(range(count))
    stock = StockCaption(ids, decode(ids), reason, tuple(float(one) for one in ids), 1, 1)
    return compare(row, stock, RowInputs(MADE_WITH, None, None, (0.0,)), decode)


@pytest.mark.parametrize(
    ("caption", "index"),
    [
        ("a red ball moves.", None),
        ("a blue ball moves.", 1),
        ("the red ball moves.", 0),
        ("a red", 2),
        ("", 0),
        ("a red ball moves. And more", 5),
        ("a red balloon", 3),
    ],
)
def test_where_a_text_leaves_stock(caption: str, index: int | None) -> None:
    found = verdict(caption)
    assert (found.outcome, found.token_index) == ("equal" if index is None else "different", index)
    assert found.margin == (None if index is None else float(index))


def test_where_a_text_goes_on_there_is_no_margin() -> None:
    found = verdict("a red ball moves. And more", reason="length", count=5)
    assert (found.token_index, found.margin) == (5, None)


def test_a_kept_column_named_token_ids_is_the_users() -> None:
    assert verdict("a red ball moves.", token_ids="17 of them").outcome == "equal"


def test_both_texts_are_shown_around_the_difference() -> None:
    ours, theirs = "word " * 40 + "red" + " word" * 40, "word " * 40 + "blue" + " word" * 40
    shown = around(ours, theirs)
    assert all(one.startswith("…") and one.endswith("…") and len(one) <= 62 for one in shown)
    assert "red" in shown[0]
    assert "blue" in shown[1]
    assert around("same", "same") == around("one", None) == ("", "")
