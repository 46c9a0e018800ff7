"""Which tokens are worth guessing: counted in captions, kept in a file, chosen for a draft.

A vocabulary file is what `specvlm vocab` writes: token ids, the most used first, with how often captions use them, and
a fingerprint of the tokenizer that these ids are of. Imports neither torch nor models; what becomes of the tokens is
`vocabulary.py`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from specvlm.errors import ConfigError, Setting

FORMAT = 1
_BATCH = 1000  # texts that are tokenized at once
_REMEDY = "write it again with specvlm vocab"


class MostUsed(NamedTuple):
    """The tokens that some texts use most; the tokenizer's first ones where they use fewer."""

    size: int  # tokens, ends of sequence included
    texts: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class KeptTokens:
    """What a vocabulary file says.

    Attributes:
        tokenizer: Fingerprint of the tokenizer.
        counts: (token, how often), the most used first; 0 times: it fills up.
        tokens: All that were counted, kept or not.
        distinct: Different ones among them.
        texts: In which they were counted.
        sources: Where these texts came from.
    """

    tokenizer: str
    counts: tuple[tuple[int, int], ...]
    tokens: int
    distinct: int
    texts: int
    sources: tuple[str, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens alone."""
        return tuple(token for token, _ in self.counts)

    @property
    def coverage(self) -> float | None:
        """Counted tokens that are kept / all counted tokens; None: none was counted."""
        return sum(count for _, count in self.counts) / self.tokens if self.tokens else None

    def as_json(self) -> dict[str, Any]:
        """Content of the file."""
        return {
            "specvlm_vocab": FORMAT,
            "tokenizer": self.tokenizer,
            "sources": list(self.sources),
            "texts": self.texts,
            "tokens": self.tokens,
            "distinct": self.distinct,
            "coverage": self.coverage,
            "kept": [list(pair) for pair in self.counts],
        }


# What `specvlm.load` takes: how many, the tokens themselves, or where they stand.
DraftVocab = int | str | os.PathLike[str] | Sequence[int] | MostUsed | KeptTokens


def fingerprint(tokenizer: Any) -> str:
    """16 hex digits for a tokenizer's tokens and their ids."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


def count_tokens(tokenizer: Any, texts: Iterable[str]) -> tuple[Counter[int], int]:
    """How often texts use each token, and how many texts there are. They are read once, in batches."""
    counts: Counter[int] = Counter()
    number = 0
    rest = iter(texts)
    while batch := list(islice(rest, _BATCH)):
        number += len(batch)
        counts.update(chain.from_iterable(tokenizer(batch, add_special_tokens=False)["input_ids"]))
    return counts, number


def by_use(counts: Counter[int]) -> list[tuple[int, int]]:
    """Tokens and how often they are used, the most used first, the lower id first where they tie."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def in_order(tokenizer: Any) -> list[int]:
    """The tokenizer's own tokens by id, those that were added to it left out.

    The ids of byte-pair tokens are in the order of their merges, the commonest first.
    """
    return sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder))


def filled(counts: Counter[int], tokenizer: Any, size: int) -> list[tuple[int, int]]:
    """The `size` most used tokens and how often; where fewer are used, the tokenizer's first ones, 0 times."""
    found = by_use(counts)[:size]
    unused = (token for token in in_order(tokenizer) if token not in counts)
    return found + [(token, 0) for token, _ in zip(unused, range(size - len(found)), strict=False)]


def covering(counts: Counter[int], share: float) -> list[tuple[int, int]]:
    """The fewest tokens that make up this share of all that were counted."""
    wanted, held = share * counts.total(), 0
    out: list[tuple[int, int]] = []
    for token, count in by_use(counts):
        if held >= wanted:
            break
        out.append((token, count))
        held += count
    return out


def read_kept(path: str | os.PathLike[str]) -> KeptTokens:
    """Read a vocabulary file.

    Raises:
        ConfigError: It cannot be read, or is none.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{os.fspath(path)}: {error.strerror}; give a number of tokens, e.g. 16000, or a file that specvlm "
            "vocab wrote"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{os.fspath(path)}: no vocabulary file, it is not JSON; {_REMEDY}") from error
    return _parsed(os.fspath(path), found)


def _parsed(name: str, found: Any) -> KeptTokens:
    if not isinstance(found, dict) or not isinstance(found.get("specvlm_vocab"), int):
        raise ConfigError(f"{name}: no vocabulary file; give one that specvlm vocab wrote")
    if found["specvlm_vocab"] != FORMAT:
        raise ConfigError(
            f"{name}: its format is {found['specvlm_vocab']}, this version knows {FORMAT}; upgrade specvlm, or "
            f"{_REMEDY}"
        )
    kept = KeptTokens(
        tokenizer=found.get("tokenizer"),  # type: ignore[arg-type]  # looked at below
        counts=tuple(map(_pair, listed)) if isinstance(listed := found.get("kept"), list) else (),
        tokens=found.get("tokens", -1),
        distinct=found.get("distinct", -1),
        texts=found.get("texts", -1),
        sources=tuple(map(str, told)) if isinstance(told := found.get("sources"), list) else (),
    )
    if not isinstance(listed, list) or not _is_sound(kept):
        raise ConfigError(f"{name}: this vocabulary file is broken; {_REMEDY}")
    if not kept.counts:
        raise ConfigError(f"{name}: this vocabulary file keeps no token; {_REMEDY}, from captions")
    return kept


def _pair(value: Any) -> tuple[Any, Any]:
    return (value[0], value[1]) if isinstance(value, list) and len(value) == 2 else (None, None)


def _is_sound(kept: KeptTokens) -> bool:
    numbers = (kept.tokens, kept.distinct, kept.texts, *chain.from_iterable(kept.counts))
    return isinstance(kept.tokenizer, str) and _are_counts(numbers) and len(set(kept.ids)) == len(kept.ids)


def _are_counts(values: Iterable[object]) -> bool:
    return all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in values)


class Choosing(NamedTuple):
    """What a draft's tokens are chosen from."""

    tokenizer: Any  # of target and draft
    shared: int  # tokens that both have rows for
    ends: Sequence[int]  # of sequence, which are always kept


def choose_ids(wanted: DraftVocab, by: Choosing) -> list[int]:
    """The tokens that a draft may guess, ascending, ends of sequence among them.

    Args:
        wanted: How many, the tokens themselves, or the path of a vocabulary file.
        by: What they are chosen from.

    Raises:
        ConfigError: So many cannot be chosen, or the file or a token is not of this tokenizer.
    """
    if isinstance(wanted, int):
        wanted = MostUsed(wanted)
    if isinstance(wanted, MostUsed):
        check_size(wanted.size, by)
        return most_used(count_tokens(by.tokenizer, wanted.texts)[0], wanted.size, by)
    name = "the draft vocabulary"
    if isinstance(wanted, (str, os.PathLike)):
        name, wanted = os.fspath(wanted), read_kept(wanted)
    if isinstance(wanted, KeptTokens):
        if wanted.tokenizer != (ours := fingerprint(by.tokenizer)):
            raise ConfigError(
                f"{name}: made with another tokenizer (fingerprint {wanted.tokenizer}, that of the target is "
                f"{ours}); {_REMEDY} for this target"
            )
        wanted = [token for token in wanted.ids if token < by.shared]
    return _checked(name, wanted, by)


def _checked(name: str, ids: Sequence[int], by: Choosing) -> list[int]:
    if not ids:
        raise ConfigError(f"{name} keeps no token; give some")
    for token in ids:
        if not _are_counts([token]) or token >= by.shared:
            raise ConfigError(
                f"{name} holds {token!r}, the tokens that target and draft share are 0 to {by.shared - 1}; "
                "give some of these"
            )
    return sorted({*ids, *_ends(by)})


def _ends(by: Choosing) -> list[int]:
    return [token for token in by.ends if token < by.shared]


def check_size(size: int, by: Choosing) -> None:
    """Refuse a number of tokens that leaves nothing to guess, or nothing out.

    Raises:
        ConfigError: It is one.
    """
    fewest, most = len(_ends(by)) + 1, by.shared - 1
    if isinstance(size, bool) or not fewest <= size <= most:
        fix = f"target and draft share {by.shared} tokens, so give {fewest} to {most}, or leave it out"
        raise ConfigError(Setting("draft_vocab", size), "is out of range", fix=fix)


def most_used(counts: Counter[int], size: int, by: Choosing) -> list[int]:
    """The `size` tokens that are used most, ascending, ends of sequence among them.

    Tokens that only the padding of one of the models has a row for are never used, and so never kept.
    """
    ends = _ends(by)
    used = Counter({token: n for token, n in counts.items() if token < by.shared and token not in ends})
    chosen = filled(used, by.tokenizer, size - len(ends))
    return sorted({*ends, *(token for token, _ in chosen)})


def unseen_share(counts: Counter[int], size: int, by: Choosing) -> float:
    """The share of tokens to come that a choice of `size` leaves out because they were never counted, estimated.

    Good and Turing's estimate: those counted once / all; of those, here, the ones that would not have filled up either.
    """
    fill = [token for token, count in filled(counts, by.tokenizer, size - len(_ends(by))) if not count]
    last, total = max(fill, default=-1), counts.total()
    return sum(count == 1 and token > last for token, count in counts.items()) / total if total else 1.0
