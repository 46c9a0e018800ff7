"""`specvlm train` from its flags to its folder, in this process, over a tiny random target."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer.main
from safetensors.torch import load_file

import specvlm
from specvlm.batch import CaptionBatch
from specvlm.captioner import Captioner
from specvlm.drafts.compressor import MODES, OPERATORS, CompressorConfig
from specvlm.drafts.head import HeadDraft
from specvlm.drafts.head_model import read_config
from specvlm.training import folder, memory
from specvlm.training.objective import ObjectiveSettings
from specvlm.training.ranks import Alone
from specvlm_cli import app
from specvlm_cli.caption.failure import Failure
from specvlm_cli.commands.train_flags import CompressorName
from specvlm_cli.exits import FatalError
from specvlm_cli.readers import DecodingPool
from specvlm_cli.training import lessons, source, start
from specvlm_cli.training.captions import LEFT_OUT_NAME, NAME, Blame, Captions, LeftOut, LeftOuts
from specvlm_cli.training.register import Register
from specvlm_cli.training.samples import Split, TrainingVideo
from specvlm_cli.training.writing import Lesson, Writer
from tests.cli.conftest import Result, snapshot
from tests.cli.test_real import save
from tests.cli.train_reader import PLACE
from tests.tiny import Size

ROOT = Path(__file__).parents[2]


@dataclass
class Train:
    """Runs the command; videos are texts."""

    target: Path
    capfd: pytest.CaptureFixture[str]

    def __call__(self, *arguments: object, json_: bool = True, **flags: object) -> Result:
        given: dict[str, object] = {
            "target": self.target,
            "prompt": "What is it?",
            "accumulate": 2,
            "evaluate_every": 3,
            "learning_rate": 1e-3,
            "max_new_tokens": 6,
            "held_out": 0.2,
        } | flags
        words = [str(one) for one in arguments]
        for name, value in given.items():
            for one in value if isinstance(value, list) else [] if value is None else [value]:
                words += [f"--{name.replace('_', '-')}", str(one)]
        self.capfd.readouterr()
        code = app.main(["train", *words, *(["--json"] if json_ else [])])
        return Result(code, *self.capfd.readouterr())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save(root / "target", "qwen", Size(seed=1))
    save(root / "draft", "qwen", Size(layers=1, seed=2))
    return root


@pytest.fixture
def train(
    models: Path, forked_readers: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Train:
    monkeypatch.setattr(start, "DecodingPool", partial(DecodingPool, reader=PLACE))
    monkeypatch.setattr(folder, "curve", lambda _: b"")  # it takes longer than all else
    return Train(models / "target", capfd)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    return texts(tmp_path / "videos", *(f"video {number}" for number in range(5)))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "head"


def texts(folder: Path, *contents: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(contents):
        (folder / f"{number}.mp4").write_text(content)
    return folder


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(max((out / ".specvlm").glob("checkpoint-*[0-9]")) / "state.safetensors")


def same(one: Path, other: Path) -> bool:
    """Bitwise the same weights and moments, and the same head kept."""
    ours, theirs = weights(one), weights(other)
    return (
        ours.keys() == theirs.keys()
        and all(torch.equal(value, theirs[name]) for name, value in ours.items())
        and (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    )


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def captions_of(out: Path) -> dict[str, str]:
    with sqlite3.connect(out / ".specvlm" / NAME) as database:
        return dict(database.execute("SELECT key, tokens FROM caption"))


# --- flags ---


def test_help_names_the_defaults_of_the_library() -> None:
    group: Any = typer.main.get_command(app.app)
    told = {one.name: one.help or "" for one in group.commands["train"].params}
    objective, compressor = ObjectiveSettings(), CompressorConfig()
    for name, value in {
        "cross_entropy": objective.cross_entropy,
        "smooth_l1": objective.smooth_l1,
        "unroll": objective.unroll,
        "compression_ratio": compressor.ratio,
        "queries": compressor.queries,
    }.items():
        assert told[name].endswith(f"Default: {value:g}."), name
    assert told["operators"].endswith(f"Default: {','.join(compressor.operators)}.")


def test_every_mode_and_operator_is_a_compressor() -> None:
    assert set(get_args(CompressorName)) == {*MODES, *OPERATORS} - {"single"}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--learning-rate", "0"], "--learning-rate 0.0 is out of range"),
        (["--accumulate", "0"], "--accumulate 0 is out of range; give 1 to 1048576 samples a step"),
        (["--epochs", "0"], "--epochs 0 is out of range"),
        (["--seed", "-1"], "--seed -1 is out of range"),
        (["--clip-norm", "0"], "--clip-norm 0.0 is out of range; give a norm above 0"),
        (["--smooth-l1", "-1"], "--smooth-l1 -1.0 is out of range"),
        (["--smooth-l1", "0", "--cross-entropy", "0"], "leave nothing to learn"),
        (["--held-out", "1"], "--held-out 1 is out of range"),
        (["--held-out", "nowhere"], "nowhere"),
        (["--checkpoint-every", "often"], "--checkpoint-every often is not a time"),
        (["--head-device", "moon"], "--head-device 'moon' is unknown; give cuda"),
        (["--device-map", "moon"], "--device-map 'moon' is unknown; give cuda"),
        (
            ["--compressor", "pool", "--operators", "pool"],
            "--operators pool has no effect on --compressor pool",
        ),
        (["--operators", "pool"], "takes 2 to 6 operators, not 1"),
        (["--operators", "pool,shrink"], "'shrink' is unknown; choose from prune"),
        (["--compression-ratio", "0"], "--compression-ratio 0.0 is out of range"),
        (["--fps", "1", "--num-frames", "2"], "exclude each other"),
        (["--max-runtime", "0s"], "--max-runtime 0s leaves no time"),
    ],
)
def test_what_makes_no_sense_is_refused(
    flags: list[str], told: str, train: Train, videos: Path, out: Path
) -> None:
    said = train(videos, "-o", out, *flags, **{flags[0][2:].replace("-", "_"): None})
    assert (said.code, said.out) == (2, "")
    assert told in said.err
    assert said.err.count("\n") == 1
    assert not out.exists()


def test_without_videos_or_a_folder_there_is_one_line(train: Train, tmp_path: Path) -> None:
    assert app.main(["train", "-o", str(tmp_path)]) == 2
    assert "nothing to learn from: give a folder" in train.capfd.readouterr().err
    assert app.main(["train", str(tmp_path)]) == 2
    assert "'--out'" in train.capfd.readouterr().err
    empty = texts(tmp_path / "empty")
    said = train(empty, "-o", tmp_path / "head")
    assert said.code == 2
    assert said.err.endswith(f"{empty}: no video is there; check the path and what is mounted there\n")


@pytest.mark.parametrize("what", ["file", "model", "captions"])
def test_a_folder_of_something_else_is_refused(what: str, train: Train, videos: Path, out: Path) -> None:
    if what == "file":
        out.write_text("")
    else:
        (out / ".specvlm").mkdir(parents=True)
        name = "model.safetensors" if what == "model" else ".specvlm/run.json"
        (out / name).write_text("{}")
    said = train(videos, "-o", out)
    assert said.code == 2
    assert ("is a file" if what == "file" else "is not empty, and no head was trained in it") in said.err


def test_one_video_is_too_few_to_hold_one_out(train: Train, out: Path, tmp_path: Path) -> None:
    one = texts(tmp_path / "one", "video 0")
    said = train(one, "-o", out)
    assert said.code == 2
    assert "1 video given, and nothing would be left to learn from; give more, or --held-out 0" in said.err
    said = train(one, "-o", out, held_out=0)
    assert (said.code, said.json["steps"], said.json["best"]["mean_accepted_tokens"]) == (0, 1, None)
    assert read_config(out).training["held_out_videos"] == 0


# --- a training ---


def test_a_training_from_end_to_end(train: Train, videos: Path, out: Path, models: Path) -> None:
    said = train(videos, "-o", out, epochs=3)
    assert said.code == 0, said.err
    result = said.json
    assert (result["steps"], result["total_steps"], result["samples"], result["captions"]) == (6, 6, 12, 4)
    assert [entry["step"] for entry in log_of(out)] == [0, 3, 6]
    assert result["best"] == max(reversed(log_of(out)), key=lambda entry: entry["mean_accepted_tokens"])
    assert result["last"] == log_of(out)[-1]
    assert sorted(path.name for path in out.iterdir()) == [
        ".specvlm",
        "config.json",
        "curve.png",
        "log.jsonl",
        "model.safetensors",
    ]
    config = read_config(out)
    told = config.training
    assert (config.target, str(config.target_revision)[:7]) == (str(models / "target"), "sha256:")
    assert (told["train_samples"], told["held_out_videos"], told["seed"]) == (4, 1, 0)
    assert (told["learning_rate"], told["smooth_l1"], told["specvlm_version"]) == (
        1e-3,
        1.0,
        specvlm.__version__,
    )
    assert told["reached"] == result["best"]


def test_the_logged_figure_is_that_of_the_saved_head(
    train: Train, videos: Path, out: Path, tmp_path: Path
) -> None:
    """A captioner that loads the folder as anyone would, over the same held-out videos."""
    held = texts(tmp_path / "held", "video 90", "video 91", "text")
    said = train(videos, "-o", out, held_out=held, epochs=4, learning_rate=1e-2)
    assert said.code == 3
    from tests.cli.train_reader import read

    captioner = specvlm.load(str(train.target), draft=str(out))
    stats = [
        captioner.caption(
            read(str(held / name).encode(), specvlm.FrameSettings()),
            "What is it?",
            tree="dynamic",
            max_new_tokens=6,
        ).stats
        for name in ("0.mp4", "1.mp4")
    ]
    best = read_config(out).training["reached"]
    rounds = sum(one.num_drafts for one in stats)
    assert (best["num_drafts"], best["held_out"]) == (rounds, 2)
    assert best["mean_accepted_tokens"] == sum(one.num_accepted_tokens for one in stats) / rounds
    assert stats[0].method == "specvlm-head/select/dynamic"


def test_a_finished_training_is_left_alone(train: Train, videos: Path, out: Path) -> None:
    assert train(videos, "-o", out).code == 0
    before = snapshot(out)
    said = train(videos, "-o", out)
    assert (said.code, said.json["steps"]) == (0, 2)
    assert "nothing to do: 2 steps are done; give more --epochs to continue" in said.err
    assert snapshot(out) == before
    assert train(videos, "-o", out, "-q", json_=False) == Result(0, "", "")
    more = train(videos, "-o", out, epochs=2)
    assert (more.code, more.json["steps"], more.json["captions"]) == (0, 4, 0)
    assert "going on from step 2 of 4" in more.err


OTHERS: list[tuple[dict[str, object], str]] = [
    ({"learning_rate": 1e-4}, "--learning-rate was 0.001, is now 0.0001"),
    ({"seed": 1}, "--seed was 0, is now 1"),
    ({"compressor": "pool"}, "--compressor was "),
    ({"max_new_tokens": 7}, "--max-new-tokens was 6, is now 7"),
    ({"prompt": "Why?"}, '--prompt was "What is it?", is now "Why?"'),
    ({"evaluate_every": 2}, "--evaluate-every was 3, is now 2"),
    ({"limit": 4}, "the list of videos was"),
    ({"num_frames": 8}, "--num-frames was null, is now 8"),
]


def test_other_settings_are_refused(train: Train, videos: Path, out: Path) -> None:
    (out / ".specvlm").mkdir(parents=True)
    assert train(videos, "-o", out, max_steps=1).code == 0
    before = snapshot(out)
    for flags, told in OTHERS:
        said = train(videos, "-o", out, **flags)
        assert said.code == 2
        assert told in said.err
        assert said.err.rstrip().endswith("give those, or another folder with -o")
        assert snapshot(out) == before


def test_another_target_behind_the_same_name_is_refused(
    train: Train, videos: Path, out: Path, tmp_path: Path
) -> None:
    train.target = save(tmp_path / "target", "qwen", Size(seed=1))
    assert train(videos, "-o", out).code == 0
    save(tmp_path / "target", "qwen", Size(seed=5))
    said = train(videos, "-o", out, epochs=2)
    assert said.code == 2
    assert "was begun with other settings: target_revision was" in said.err


def test_neither_draft_nor_guesses_of_the_head_change_anything(
    train: Train, videos: Path, tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, drafted, guessed = (tmp_path / name for name in ("plain", "drafted", "guessed"))
    assert train(videos, "-o", plain, epochs=2).code == 0
    assert train(videos, "-o", drafted, epochs=2, draft=models / "draft").code == 0
    monkeypatch.setattr(source, "GUESSES_FROM", 0.0)
    heads: list[bool] = []
    original = Writer.step

    def step(self: Writer, author: Captioner) -> list[Lesson]:
        ended = original(self, author)
        heads.extend([isinstance(author.draft, HeadDraft)] * len(ended))
        return ended

    monkeypatch.setattr(Writer, "step", step)
    assert train(videos, "-o", guessed, epochs=2).code == 0
    assert heads == [True] * 4
    assert same(plain, drafted)
    assert same(plain, guessed)
    assert captions_of(plain) == captions_of(drafted) == captions_of(guessed)


def test_flags_reach_the_head(train: Train, videos: Path, tmp_path: Path) -> None:
    made: dict[str, Path] = {}
    for name, flags in {
        "default": {},
        "pool": {"compressor": "pool", "compression_ratio": 3},
        "concat": {"compressor": "concat", "operators": "resampler,text-only", "queries": 3},
        "unroll": {"unroll": 1},
        "clip": {"clip_norm": 1e-3},
    }.items():
        made[name] = tmp_path / name
        assert train(videos, "-o", made[name], max_steps=1, held_out=0, **flags).code == 0
    configs = {name: read_config(out) for name, out in made.items()}
    assert (configs["pool"].compressor.name, configs["pool"].compressor.ratio) == ("pool", 3.0)
    assert configs["concat"].compressor == CompressorConfig("concat", ("resampler", "text-only"), 5.0, 3)
    assert configs["unroll"].training["unroll"] == 1
    for name in ("unroll", "clip"):
        assert not same(made[name], made["default"])


# --- samples ---


def test_each_video_and_prompt_is_a_sample(train: Train, videos: Path, out: Path) -> None:
    said = train(videos, "-o", out, prompt=["What is it?", "Where is it?"], epochs=2)
    assert said.code == 0
    assert (said.json["captions"], said.json["samples"], said.json["steps"]) == (8, 16, 8)
    assert log_of(out)[0]["held_out"] == 2


def test_manifests_bring_parts_and_prompts_of_their_own(
    train: Train, videos: Path, out: Path, tmp_path: Path
) -> None:
    rows = ["path,start,end,prompt", f"{videos}/0.mp4,0,1,Who?", f"{videos}/0.mp4,1,2,Who?"]
    rows += [f"{videos}/1.mp4,,,What?", f"{videos}/1.mp4,,,Where?", f"{videos}/2.mp4,2,1,Why?", ",,,Which?"]
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("\n".join(rows) + "\n")
    said = train(manifest, "-o", out, held_out=0)
    assert said.code == 3, said.err
    assert (said.json["samples"], said.json["captions"]) == (4, 4)
    assert said.json["left_out"] == said.err.count("left out: ") == 2


def test_bad_videos_are_noted_once_and_left_out(train: Train, out: Path, tmp_path: Path) -> None:
    """One that is no video, one that hangs its reader, one that cannot be read, one that can the second time."""
    bad = ["text", "stuck", "stale", "flaky", "video 1", "video 2", "video 3"]
    place = texts(tmp_path / "videos", *bad)
    said = train(place, "-o", out, epochs=2, held_out=0, decode_timeout="1s", decode_workers=4)
    assert said.code == 3
    assert (said.json["samples"], said.json["left_out"], said.json["captions"]) == (8, 3, 4)
    lines = [line for line in said.err.splitlines() if line.startswith("left out: ")]
    assert sorted(re.findall(r"(\d)\.mp4: .*\((\w+), (\w+)\)", "\n".join(lines))) == [
        ("0", "open", "NotAVideoError"),
        ("1", "decode", "DecodeTimeout"),
        ("2", "open", "VideoUnavailableError"),
    ]
    (place / "1.mp4").write_text("video 9")  # mended, but noted
    again = train(place, "-o", out, epochs=3, held_out=0)
    assert (again.code, again.json["samples"], again.json["captions"]) == (3, 12, 0)
    assert "left out" not in again.err.split("step")[0]


def test_held_out_videos_may_be_bad_too(train: Train, videos: Path, out: Path, tmp_path: Path) -> None:
    held = texts(tmp_path / "held", "video 8", "text")
    said = train(videos, "--exit-zero", "-o", out, held_out=held, epochs=2)
    assert (said.code, said.json["left_out"], said.json["samples"]) == (0, 1, 10)
    assert [entry["held_out"] for entry in log_of(out)] == [1, 1, 1]


def test_a_held_out_folder_is_never_learned_from(
    train: Train, videos: Path, out: Path, tmp_path: Path
) -> None:
    """The same files, given twice."""
    said = train(videos, videos / "1.mp4", "-o", out, held_out=videos / "0.mp4")
    assert said.code == 0
    assert said.json["samples"] == 4


def test_no_usable_video_is_fatal(train: Train, out: Path, tmp_path: Path) -> None:
    said = train(texts(tmp_path / "videos", "text", "text more", "text again"), "-o", out)
    assert (said.code, said.out) == (1, "")
    assert "none of the videos could be learned from; the first: " in said.err


@dataclass
class Outage:
    """Something breaks at the nth sample, and is mended later."""

    videos: Path
    patch: pytest.MonkeyPatch

    @property
    def away(self) -> Path:
        return self.videos.with_name("away")

    def at(self, sample: int, happen: Callable[[], object]) -> None:
        original, count = lessons.Lessons._taught, iter(range(1, 1000))

        def taught(this: Any, *arguments: Any) -> Any:
            if next(count) == sample:
                happen()
            return original(this, *arguments)

        self.patch.setattr(lessons.Lessons, "_taught", taught)

    def folder(self) -> None:
        self.at(3, lambda: self.videos.rename(self.away))

    def files(self) -> None:
        def happen() -> None:
            self.away.mkdir()
            for path in list(self.videos.iterdir()):
                path.rename(self.away / path.name)

        self.at(3, happen)

    def device(self) -> None:
        def broken(*_: Any, **__: Any) -> Any:
            raise RuntimeError(
                "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might"
            )

        self.at(3, lambda: self.patch.setattr(CaptionBatch, "step", broken))

    def mend(self) -> None:
        for path in self.away.iterdir() if self.away.exists() else ():
            self.videos.mkdir(exist_ok=True)
            path.rename(self.videos / path.name)


# Longer than the outages last, and with captions still to be written when they come.
STRUCK: dict[str, Any] = {"epochs": 3, "evaluate_every": 100, "checkpoint_every": 1, "batch_size": 1}
_SPARED: dict[Path, Path] = {}


@pytest.fixture
def spared(train: Train, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that no outage hit; the videos have the same content in every test."""
    if train.target not in _SPARED:
        out = tmp_path_factory.mktemp("spared") / "whole"
        assert train(videos, "-o", out, **STRUCK).code == 0
        _SPARED[train.target] = out
    return _SPARED[train.target]


@pytest.mark.parametrize(
    ("what", "told"),
    [
        (
            "folder",
            r"no such file \(open, VideoNotFoundError\): no fault of this video; fix that and start again",
        ),
        ("files", r"error: 4 samples in a row failed, the last: .*; fix that and start again"),
        ("device", r"error: .*CUDA error: an illegal .*\(generate, RuntimeError\): no fault of this video"),
    ],
)
def test_an_outage_costs_no_sample(
    what: str, told: str, train: Train, videos: Path, tmp_path: Path, spared: Path
) -> None:
    """The weights at the end are those of a training that it did not hit."""
    with pytest.MonkeyPatch.context() as patch:
        outage = Outage(videos, patch)
        getattr(outage, what)()
        said = train(videos, "-o", tmp_path / "hit", **STRUCK)
    assert (said.code, said.out) == (1, "")
    assert re.search(told, said.err.splitlines()[-1]), said.err
    outage.mend()
    again = train(videos, "-o", tmp_path / "hit", **STRUCK)
    assert (again.code, again.json["steps"], again.json["left_out"]) == (0, 6, 0), again.err
    assert "going on from step " in again.err
    assert same(tmp_path / "hit", spared)


def test_a_missing_video_is_tried_again_by_the_next_start(train: Train, videos: Path, out: Path) -> None:
    rows = [f"{videos}/{number}.mp4" for number in range(6)]
    manifest = videos.with_name("manifest.csv")
    manifest.write_text("\n".join(["path", *rows]) + "\n")
    said = train(manifest, "-o", out, held_out=0)
    assert (said.code, said.json["samples"], said.json["left_out"]) == (3, 5, 1)
    (videos / "5.mp4").write_text("video 5")
    said = train(manifest, "-o", out, held_out=0, epochs=2)
    assert (said.code, said.json["samples"], said.json["left_out"]) == (0, 11, 0)


def test_what_fails_while_others_do_not_is_kept(tmp_path: Path) -> None:
    """What the machine may have done is kept once another sample could be used."""

    def failed(name: str, blame: Blame) -> LeftOut:
        return LeftOut(name, 0, 0, name, Failure("generate", "Kind", "no"), blame)

    told: list[LeftOut] = []
    with LeftOuts.open(tmp_path / LEFT_OUT_NAME) as kept:
        register = Register(kept, Alone(), told.append, 100)
        register.note([failed("own", Blame.VIDEO)], [])
        assert register.settled
        register.note([failed("unsure", Blame.UNSURE)], [])
        register.note([failed("passing", Blame.PASSING)], [])
        assert not register.settled
        assert [left.name for left in kept.left_out()] == ["own"]
        register.note([], [TrainingVideo("good", b"/good", None, None, ("Hi.",))])
        assert register.settled
        assert [left.name for left in kept.left_out()] == ["own", "unsure"]
        for number in range(7):
            register.note([failed(f"{number}", Blame.UNSURE)], [])
        with pytest.raises(FatalError, match="8 samples in a row failed, the last: 7: no "):
            register.note([failed("7", Blame.UNSURE)], [])
        assert [left.name for left in kept.left_out()] == ["own", "unsure"]
    assert [left.name for left in told] == ["own", "unsure", "passing", *"01234567"]


def test_the_split_is_seeded_and_bounded() -> None:
    class TrainingVideo:
        def __init__(self, number: int) -> None:
            self.id = f"{number}"

    videos: Any = [TrainingVideo(number) for number in range(100)]
    chosen = {seed: Split(0.1, 50, seed).chosen(videos) for seed in (0, 1)}
    assert len(chosen[0]) == len(chosen[1]) == 10
    assert chosen[0] != chosen[1]
    assert Split(0.1, 50, 0).chosen(videos[::-1]) == chosen[0]
    assert Split(0.1, 4, 0).chosen(videos) < chosen[0]
    assert len(Split(0.001, 50, 0).chosen(videos)) == 1
    assert Split(0.0, 50, 0).chosen(videos) == set()


# --- what is kept ---


def test_captions_are_found_by_what_they_depend_on(train: Train, videos: Path, tmp_path: Path) -> None:
    """Files of other names, a lost checkpoint and other learning settings need no generation; another prompt does."""
    first, other = tmp_path / "first", tmp_path / "other"
    assert train(videos, "-o", first).json["captions"] == 4
    (other / ".specvlm").mkdir(parents=True)
    (other / ".specvlm" / NAME).write_bytes((first / ".specvlm" / NAME).read_bytes())
    held_out = captions_of(first).keys()
    for path in list(videos.iterdir()):
        path.rename(path.with_stem(f"renamed-{path.stem}"))
    said = train(videos, "-o", other, learning_rate=1e-4, held_out=0)
    assert said.json["captions"] == 1, "the one that was held out before"
    assert held_out < captions_of(other).keys()
    third = tmp_path / "third"
    (third / ".specvlm").mkdir(parents=True)
    (third / ".specvlm" / NAME).write_bytes((first / ".specvlm" / NAME).read_bytes())
    assert train(videos, "-o", third, prompt="Who?", held_out=0).json["captions"] == 5


def test_captions_of_another_training_bring_none_of_its_left_out_samples(
    train: Train, out: Path, tmp_path: Path
) -> None:
    assert train(texts(tmp_path / "one", "text", "video 1", "video 2"), "-o", out, held_out=0).code == 3
    other = tmp_path / "other"
    (other / ".specvlm").mkdir(parents=True)
    (other / ".specvlm" / NAME).write_bytes((out / ".specvlm" / NAME).read_bytes())
    said = train(texts(tmp_path / "two", "video 0", "video 1", "video 2"), "-o", other, held_out=0)
    assert (said.code, said.json["samples"], said.json["captions"], said.json["left_out"]) == (0, 3, 1, 0)


def test_only_tokens_are_kept(train: Train, videos: Path, out: Path, models: Path) -> None:
    assert train(videos, "-o", out).code == 0
    captioner = specvlm.load(str(models / "target"))
    from tests.cli.train_reader import read

    written = {
        captioner.caption(
            read(str(path).encode(), specvlm.FrameSettings()), "What is it?", max_new_tokens=6
        ).token_ids
        for path in videos.iterdir()
    }
    kept = [tuple(json.loads(tokens)) for tokens in captions_of(out).values()]
    assert len(kept) == 4
    assert set(kept) < written
    names = {path.name for path in (out / ".specvlm").iterdir()}
    assert names == {NAME, LEFT_OUT_NAME, "lock", "train.json", "checkpoint-00000001", "checkpoint-00000002"}


def test_captions_survive_whatever_happens_to_the_process(tmp_path: Path) -> None:
    """Two connections see each other's captions at once: nothing waits in memory."""
    path = tmp_path / NAME
    with Captions.open(path) as one, Captions.open(path) as other:
        one.add("key", [1, 2, 3])
        assert other.tokens("key") == (1, 2, 3)
        assert other.tokens("none") is None
    with LeftOuts.open(tmp_path / LEFT_OUT_NAME) as one, LeftOuts.open(tmp_path / LEFT_OUT_NAME) as other:
        for since in (7, 3, 5):
            one.leave_out(LeftOut("video", -1, since, "a\x1b[31mb", Failure("open", "Kind", f"at {since}")))
        assert [(left.since, left.name) for left in other.left_out()] == [(3, "a\\x1b[31mb")]
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("delete",)


@pytest.mark.parametrize("how", ["damaged", pytest.param("other", marks=pytest.mark.slow)])
def test_a_damaged_store_is_one_line(how: str, train: Train, videos: Path, out: Path) -> None:
    assert train(videos, "-o", out).code == 0
    path = out / ".specvlm" / NAME
    if how == "damaged":
        path.write_bytes(b"no database" * 1000)
    else:
        path.unlink()
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE mine (x)")
    said = train(videos, "-o", out, epochs=2)
    assert said.code == 1
    told = "delete it to have the captions made again" if how == "damaged" else "is no file of this version's"
    assert told in said.err
    path.unlink()
    assert train(videos, "-o", out, epochs=2).json["captions"] == 4


def test_too_little_memory_is_told_before_the_first_step(
    train: Train, videos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1000)
    said = train(videos, "-o", out)
    assert (said.code, said.out) == (1, "")
    assert re.search(
        r"the longest of the first 2 videos: \d+ prompt tokens and 6 of a caption need about 0\.0 GiB "
        r"in addition to the loaded models, and cpu has 0\.0 GiB free; "
        r"give fewer frames \(--num-frames or --max-frames\)",
        said.err,
    )
    assert not list(out.glob(".specvlm/checkpoint-*"))
    monkeypatch.undo()
    monkeypatch.setattr(start, "DecodingPool", partial(DecodingPool, reader=PLACE))
    assert train(videos, "-o", out).code == 0


def test_the_estimate_of_memory_grows_with_what_takes_it(models: Path) -> None:
    captioner = specvlm.load(str(models / "target"))
    captioner.target.keep_features()
    from specvlm.drafts.head_model import HeadConfig, HeadModel
    from tests.tiny import random_frames

    target = captioner.target
    heads = {
        mode: HeadModel.fresh(
            target,
            HeadConfig(
                "t", None, target.family.name, target.hidden_size, compressor=CompressorConfig(mode, ())
            ),
            0,
        )
        for mode in ("none",)
    }
    heads["pool"] = HeadModel.fresh(
        target,
        HeadConfig(
            "t",
            None,
            target.family.name,
            target.hidden_size,
            compressor=CompressorConfig("single", ("pool",)),
        ),
        0,
    )
    few, many = (captioner.prepare(random_frames(0, frames=n), "Hi.").inputs for n in (4, 40))

    def need(inputs: Any = few, head: str = "none", **more: Any) -> int:
        needed = memory.need(target, heads[head], memory.SampleSize(inputs, **{"written": 64} | more))
        return needed.target + needed.head

    assert need(many) > need() > need(head="pool")
    assert need(written=640) > need()
    assert need(unroll=2) > need()
    weights = sum(weight.numel() for weight in heads["none"].parameters())
    assert need(moments=True) - need() == pytest.approx(1.2 * 8 * weights, abs=2)
    free = memory.free_bytes(torch.device("cpu"))
    assert free is None or free > 1 << 20
    assert memory.shortage(target, heads["none"], memory.SampleSize(few, 64)) is None


def test_float16_is_refused(train: Train, videos: Path, out: Path) -> None:
    said = train(videos, "-o", out, dtype="float16")
    assert said.code == 2
    assert "--dtype float16 overflows in training; give --dtype bfloat16 or float32" in said.err


def test_bfloat16_trains_on_the_cpu_with_a_head_in_float32(train: Train, videos: Path, out: Path) -> None:
    said = train(videos, "-o", out, dtype="bfloat16", head_device="cpu")
    assert said.code == 0, said.err
    assert weights(out)["head.join.weight"].dtype == torch.float32
    assert load_file(out / "model.safetensors")["join.weight"].dtype == torch.bfloat16


def test_messages_and_the_log_file(train: Train, videos: Path, out: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    said = train(videos, "-o", out, "-v", json_=False, log_file=log)
    assert said.code == 0
    assert said.out == ""
    for told in ("loading ", "step 0: ", "step 1/2, loss ", "2 steps of 2 done in", "best head: "):
        assert told in said.err
        assert told in log.read_text()
    assert len([line for line in said.err.splitlines() if re.search(r"\d\.mp4: ", line)]) == 4
    assert train(videos, "-o", tmp_path / "quiet", "-q", json_=False) == Result(0, "", "")


# --- real ---


def test_the_demo_target_learns_from_real_clips(capfd: pytest.CaptureFixture[str], out: Path) -> None:
    """Video files, the shipped target and its own draft; a head that `caption` takes."""
    words = [str(ROOT / "examples" / "videos"), "-o", str(out), "--limit", "4", "--num-frames", "4"]
    learning = [
        "--max-new-tokens",
        "10",
        "--held-out",
        "0.25",
        "--accumulate",
        "1",
        "--learning-rate",
        "1e-3",
    ]
    assert app.main(["train", *words, *learning, "--preset", "demo", "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert (said["steps"], said["captions"], said["left_out"]) == (3, 3, 0)
    log = log_of(out)
    assert log[-1]["loss"] > 0
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    captioner = specvlm.load("demo", draft=str(out))
    clip = str(ROOT / "examples" / "videos" / "one-grows.mp4")
    speculative = captioner.caption(clip, max_new_tokens=12, tree="dynamic")
    assert speculative.token_ids == captioner.caption(clip, max_new_tokens=12, speculate=False).token_ids
