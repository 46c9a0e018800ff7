"""`specvlm vocab`, and `--draft-vocab`: what is kept, where it is counted, what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from specvlm.bench.clips import example_clips
from specvlm.config import ModelSettings
from specvlm.drafts.kept_tokens import KeptTokens, MostUsed, read_kept
from specvlm_cli import app, vocab
from specvlm_cli.caption import engine
from tests.cli.conftest import Specvlm, rows, snapshot

DEMO = ("--preset", "demo")
HALF = 312  # of the demo draft's 624 rows


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return engine.load_tokenizer(ModelSettings("demo"), quiet=True)


def counted(tokenizer: Any, *texts: str) -> Counter[int]:
    return Counter(token for text in texts for token in tokenizer(text)["input_ids"])


# specvlm vocab


def test_captions_of_a_run_are_counted_with_its_targets_tokenizer(
    specvlm: Specvlm, videos: Path, out: Path, tmp_path: Path, tokenizer: Any
) -> None:
    for shard in range(2):
        assert specvlm("caption", videos, "-o", out, *DEMO, "--shard", f"{shard}/2", "-q").code == 0
    before, file = snapshot(out), tmp_path / "vocab.json"
    result = specvlm("vocab", out, "-o", file, "--json")
    expected = counted(tokenizer, *(row["caption"] for row in rows(out)))
    assert (result.code, result.err) == (0, "")
    assert snapshot(out) == before
    kept = read_kept(file)
    assert dict(kept.counts) == expected
    assert [count for _, count in kept.counts] == sorted(expected.values(), reverse=True)
    assert result.json == {
        "schema": 1,
        "file": str(file),
        "target": "specvlm-demo/qwen-target",
        "tokenizer": kept.tokenizer,
        "captions": 4,
        "text_files": 0,
        "tokens": expected.total(),
        "distinct": len(expected),
        "vocabulary": 600,
        "kept": len(expected),
        "coverage": 1.0,
    }


def test_texts_are_counted_line_ends_and_all(specvlm: Specvlm, tmp_path: Path, tokenizer: Any) -> None:
    one, two, file = tmp_path / "one.txt", tmp_path / "two.txt", tmp_path / "vocab.json"
    one.write_text("A red circle.\n\nIt moves.\n" * 9000)  # more than is tokenized in one piece
    two.write_text("A blue one.")
    result = specvlm("vocab", "--text", one, "--text", two, "-o", file, *DEMO)
    expected = counted(tokenizer, one.read_text(), two.read_text())
    assert dict(read_kept(file).counts) == expected
    assert result.out.splitlines() == [
        f"counted   {expected.total()} tokens in 2 text files",
        f"distinct  {len(expected)} of 600 in the tokenizer",
        f"kept      {len(expected)}, 100.00% of what was counted",
        f"file      {file}; for --draft-vocab",
    ]


def test_how_much_is_kept(specvlm: Specvlm, tmp_path: Path) -> None:
    text, file = tmp_path / "text.txt", tmp_path / "vocab.json"
    text.write_text("a red circle and a red square and a blue one")
    asked = ("vocab", "--text", text, "-o", file, *DEMO)
    assert specvlm(*asked, "-q").out == ""
    whole = read_kept(file)
    assert "kept      300, 2" in specvlm(*asked, "--size", 300).out
    assert read_kept(file).counts[: whole.distinct] == whole.counts
    assert len(read_kept(file).ids) == 300
    specvlm(*asked, "--size", 2)
    assert read_kept(file).counts == whole.counts[:2]
    specvlm(*asked, "--coverage", 0.5)
    half = read_kept(file)
    assert half.counts == whole.counts[: len(half.counts)]
    assert sum(count for _, count in half.counts[:-1]) < whole.tokens / 2
    assert half.coverage is not None
    assert half.coverage >= 0.5


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("-o", "new.json", *DEMO), "nothing to count; give a run folder, or text files with --text"),
        (("--text", "text.txt", *DEMO), "nowhere to write to; give a file with -o"),
        (("--text", "text.txt", "-o", "new.json"), "text files have no tokenizer; give --target or --preset"),
        (("--text", "gone.txt", "-o", "new.json", *DEMO), "--text gone.txt: No such file or directory"),
        (("--text", "binary", "-o", "new.json", *DEMO), "--text binary: it is not UTF-8 text"),
        (("--text", "empty.txt", "-o", "new.json", *DEMO), "empty.txt: no captions there"),
        (("folder", "-o", "new.json"), "folder: not a run folder"),
        (("--text", "text.txt", "-o", "text.txt", *DEMO), "text.txt exists and is not a vocabulary file"),
        (("--text", "text.txt", "-o", "folder", *DEMO), "a folder is there"),
        (("--text", "text.txt", "-o", "gone/new.json", *DEMO), "there is no folder gone"),
        (("--text", "text.txt", "-o", "new.json", *DEMO, "--size", 601), "the tokenizer has 600 tokens"),
        (("--text", "text.txt", "-o", "new.json", *DEMO, "--size", 0), "--size"),
        (("--text", "text.txt", "-o", "new.json", *DEMO, "--coverage", 0), "--coverage 0.0 is out of range"),
        (("--text", "text.txt", "-o", "new.json", *DEMO, "--coverage", "nan"), "--coverage nan is out of"),
        (("--text", "text.txt", "-o", "new.json", *DEMO, "--coverage", 1, "--size", 9), "exclude each other"),
        (("--text", "text.txt", "-o", "new.json", "--preset", "x"), "--preset x is unknown"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(
    specvlm: Specvlm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_text("a red circle")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    before = snapshot(tmp_path)
    result = specvlm("vocab", *arguments)
    assert (result.code, result.out, len(result.err.splitlines())) == (2, "", 1)
    assert told in result.err
    assert snapshot(tmp_path) == before


def test_a_run_without_captions_is_told(specvlm: Specvlm, videos: Path, out: Path, tmp_path: Path) -> None:
    assert specvlm("caption", videos, "-o", out, *DEMO, "-q").code == 0
    for path in [*(out / "captions").iterdir(), out / ".specvlm" / "state-00000.db"]:
        path.unlink()
    result = specvlm("vocab", out, "-o", tmp_path / "vocab.json")
    assert (result.code, "no captions there" in result.err) == (2, True)
    assert not (tmp_path / "vocab.json").exists()


# --draft-vocab


def test_a_number_is_counted_in_the_captions_that_are_there(
    specvlm: Specvlm, videos: Path, out: Path
) -> None:
    """In the run's own ledger; more of them at each start; and it is no other setting."""
    first = specvlm("caption", videos, "-o", out, *DEMO, "--draft-vocab", 40, "--limit", 1)
    assert (first.code, first.err.count("--draft-vocab 40: counted in the captions to come")) == (0, 1)
    second = specvlm("caption", videos, "-o", out, *DEMO, "--draft-vocab", 50)
    assert (second.code, second.err.count("--draft-vocab 50: counted in one earlier caption")) == (0, 1)
    third = specvlm("caption", videos, "-o", out, *DEMO, "--overwrite")
    assert third.code == 0
    chosen = [settings.models.draft_vocab for settings in specvlm.loads]
    assert chosen[0] == MostUsed(40, [])
    assert isinstance(chosen[1], MostUsed)
    assert (chosen[1].size, len(chosen[1].texts)) == (50, 1)
    assert chosen[1].texts[0] in {row["caption"] for row in rows(out)}
    assert chosen[2] is None
    assert len({row["config_hash"] for row in rows(out)}) == 1


def test_of_many_captions_the_latest_are_counted(
    specvlm: Specvlm, videos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specvlm("caption", videos, "-o", out, *DEMO, "-q")
    monkeypatch.setattr(vocab, "MOST_CAPTIONS", 3)
    assert len(vocab.most_used(9, out).texts) == 3
    assert vocab.most_used(9, out / "gone").texts == []


def test_a_file_is_read_before_anything_else(
    specvlm: Specvlm, videos: Path, out: Path, tmp_path: Path
) -> None:
    file = tmp_path / "vocab.json"
    kept = KeptTokens("0123", ((5, 3), (200, 1)), 4, 2, 1)
    vocab.write(kept, file, "0.1.0")
    assert specvlm("caption", videos, "-o", out, *DEMO, "--draft-vocab", file, "-q").code == 0
    assert specvlm.loads[0].models.draft_vocab == kept
    file.write_text("{}")
    result = specvlm("caption", videos, "-o", out, *DEMO, "--draft-vocab", file)
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert f"--draft-vocab {file}: no vocabulary file; give one that specvlm vocab wrote" in result.err


@pytest.mark.parametrize("command", ["caption", "bench"])
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--draft-vocab", 9, "--draft", "none"), "--draft-vocab 9 has no draft to go with; give --draft"),
        (("--draft-vocab", 0), "--draft-vocab 0 leaves nothing to guess"),
        (("--draft-vocab", ""), "--draft-vocab is empty"),
        (("--draft-vocab", "16k"), "--draft-vocab 16k: No such file or directory; give a number of tokens"),
    ],
    ids=str,
)
def test_a_wrong_flag_is_refused(
    specvlm: Specvlm, videos: Path, out: Path, command: str, arguments: tuple[object, ...], told: str
) -> None:
    methods = ("--methods", "stock,plain") if command == "bench" and "none" in arguments else ()
    result = specvlm(command, videos, "-o", out, *arguments, *methods)
    assert (result.code, result.out) == (2, "")
    assert told in result.err.splitlines()[-1]
    assert not specvlm.loads


@pytest.fixture(scope="module")
def clip() -> Path:
    return Path(str(example_clips()[0].video))


def test_the_demo_pair_guesses_from_what_was_counted(
    forked: None, clip: Path, out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The whole way: caption, count, and caption anew from half of the tokens."""
    asked = ["caption", str(clip), "-o", str(out), *DEMO, "--tree", "static", "--baseline-sample", "1", "-q"]
    assert app.main([*asked, "--draft-vocab", str(HALF)]) == 0
    (whole,) = rows(out)  # one caption does not tell enough
    file = tmp_path / "vocab.json"
    assert app.main(["vocab", str(out), "-o", str(file), "--size", str(HALF), "-q"]) == 0
    assert app.main([*asked, "--draft-vocab", str(file), "--overwrite"]) == 0
    (half,) = rows(out)
    assert (whole["exact_match"], half["exact_match"]) == (True, True)
    assert whole["caption"] == half["caption"]
    assert 0 < half["num_drafts"] <= whole["num_drafts"]
    assert capfd.readouterr().err == ""


def test_a_file_for_another_target_ends_the_start(
    forked: None, clip: Path, out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "vocab.json"
    vocab.write(KeptTokens("0123456789abcdef", ((5, 3),), 3, 1, 1), file, "0.1.0")
    capfd.readouterr()
    assert app.main(["caption", str(clip), "-o", str(out), *DEMO, "--draft-vocab", str(file)]) == 2
    assert "made with another tokenizer (fingerprint 0123456789abcdef" in capfd.readouterr().err
    assert json.loads((out / ".specvlm" / "run.json").read_text())["settings"] == {}
