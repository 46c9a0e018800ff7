"""Which tokens captions use: counted, chosen, kept in a file; wrong files and numbers explained."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from specvlm.drafts.kept_tokens import (
    Choosing,
    DraftVocab,
    KeptTokens,
    MostUsed,
    choose_ids,
    count_tokens,
    covering,
    filled,
    fingerprint,
    in_order,
    read_kept,
)
from specvlm.errors import ConfigError
from tests.tiny import processor_for

TOKENIZER = processor_for("qwen").tokenizer
ENDS = [TOKENIZER.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
SHARED = 290
BY = Choosing(TOKENIZER, SHARED, ENDS)


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def test_tokens_are_counted_over_all_texts() -> None:
    counts, texts = count_tokens(TOKENIZER, (text for text in ["abba", "", "ab"] * 700))
    a, b = ids_of("ab")
    assert texts == 2100
    assert counts == {a: 2100, b: 2100}


def test_the_tokenizers_order_has_no_added_tokens() -> None:
    assert in_order(TOKENIZER) == list(range(256))


def test_the_most_used_come_first_and_are_filled_up() -> None:
    counts = Counter({7: 3, 200: 9, 5: 3, 1: 1})
    assert filled(counts, TOKENIZER, 3) == [(200, 9), (5, 3), (7, 3)]
    assert filled(counts, TOKENIZER, 7) == [(200, 9), (5, 3), (7, 3), (1, 1), (0, 0), (2, 0), (3, 0)]


@pytest.mark.parametrize(("share", "kept"), [(0.5, 1), (0.9, 2), (0.91, 3), (0.999, 4), (1.0, 4)])
def test_the_fewest_tokens_that_cover_a_share(share: float, kept: int) -> None:
    counts = Counter({7: 50, 200: 40, 5: 9, 1: 1})
    assert covering(counts, share) == [(7, 50), (200, 40), (5, 9), (1, 1)][:kept]


def test_the_fingerprint_is_that_of_tokens_and_ids() -> None:
    assert fingerprint(TOKENIZER) == fingerprint(processor_for("qwen").tokenizer)
    assert fingerprint(TOKENIZER) != fingerprint(processor_for("llava").tokenizer)


def test_a_number_takes_what_texts_use_and_then_the_first_tokens() -> None:
    text = "zebra"
    assert choose_ids(5, BY) == sorted([*ENDS, 0, 1, 2])
    assert choose_ids(MostUsed(5, [text + "zz"]), BY) == sorted(
        [*ENDS, ids_of("z")[0], *sorted(ids_of("ebra"))[:2]]
    )
    assert choose_ids(MostUsed(9, [text]), BY) == sorted({*ENDS, *ids_of(text), 0, 1})
    assert choose_ids(MostUsed(4, ["<|im_end|>" * 9 + "z"]), BY) == sorted({*ENDS, *ids_of("z"), 0})


def kept_file(folder: Path, **changes: Any) -> Path:
    kept = KeptTokens(fingerprint(TOKENIZER), ((200, 9), (5, 1)), 12, 3, 2, ("a.txt",))
    path = folder / "vocab.json"
    path.write_text(json.dumps(kept.as_json() | changes))
    return path


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    kept = read_kept(kept_file(tmp_path))
    assert kept == KeptTokens(fingerprint(TOKENIZER), ((200, 9), (5, 1)), 12, 3, 2, ("a.txt",))
    assert (kept.ids, kept.coverage) == ((200, 5), 10 / 12)
    for wanted in (kept_file(tmp_path), str(kept_file(tmp_path)), kept, [5, 200, 5]):
        assert choose_ids(wanted, BY) == sorted([*ENDS, 5, 200])


def test_what_only_the_targets_padding_has_is_left_out() -> None:
    """A draft with fewer rows than the tokenizer has tokens; an end of sequence may be among them."""
    kept = KeptTokens(fingerprint(TOKENIZER), ((200, 9), (5, 1)), 12, 3, 2)
    assert choose_ids(kept, Choosing(TOKENIZER, 100, ENDS)) == [5]
    assert choose_ids(4, Choosing(TOKENIZER, 100, ENDS)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"specvlm_vocab": 2}, "its format is 2, this version knows 1"),
        ({"specvlm_vocab": None}, "no vocabulary file; give one that specvlm vocab wrote"),
        ({"kept": []}, "keeps no token"),
        ({"kept": None}, "broken"),
        ({"kept": [[1, 2, 3]]}, "broken"),
        ({"kept": [[1, 2], [1, 3]]}, "broken"),
        ({"kept": [[-1, 2]]}, "broken"),
        ({"kept": [[1.5, 2]]}, "broken"),
        ({"kept": [[[1], 2]]}, "broken"),
        ({"tokens": "many"}, "broken"),
        ({"tokenizer": 3}, "broken"),
        ({"tokenizer": "0123456789abcdef"}, "made with another tokenizer (fingerprint 0123456789abcdef"),
    ],
    ids=str,
)
def test_wrong_files_are_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    path = kept_file(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        choose_ids(path, BY)
    assert str(caught.value).startswith(str(path))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[", b"\xff\xfe", b"[1, 2]", b"3", b"[" * 100_000], ids=repr)
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "vocab.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="no vocabulary file"):
        read_kept(path)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory; give a number of tokens"):
        read_kept(tmp_path / "16k")


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (0, "draft_vocab=0 is out of range; target and draft share 290 tokens, so give 3 to 289"),
        (2, "draft_vocab=2 is out of range"),
        (290, "draft_vocab=290 is out of range"),
        (True, "draft_vocab=True is out of range"),
        (MostUsed(1000, ["a"]), "draft_vocab=1000 is out of range"),
        ([], "keeps no token"),
        ([5, 290], "holds 290, the tokens that target and draft share are 0 to 289"),
        ([-1], "holds -1"),
        ([1.5], "holds 1.5"),
    ],
    ids=str,
)
def test_wrong_numbers_and_tokens_are_refused(wanted: DraftVocab, told: str) -> None:
    with pytest.raises(ConfigError, match=r"[^\n]*") as caught:
        choose_ids(wanted, BY)
    assert told in str(caught.value)
