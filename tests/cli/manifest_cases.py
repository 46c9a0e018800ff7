"""Made-up manifests, most of them wrong in some way, and what must hold of whatever is read from them.

Used by the tests at a small size, and by `tests.faults.manifests` at full size.
"""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from specvlm_cli.console.safe_text import clean
from specvlm_cli.exits import UsageError
from specvlm_cli.inputs import InputOptions, Inputs, Item
from specvlm_cli.inputs.columns import IDS, PATHS, PROMPTS, TIMES


@dataclass(frozen=True)
class Case:
    """A manifest and how it is read."""

    suffix: str
    content: bytes
    options: InputOptions

    def write(self, folder: Path) -> Path:
        path = folder / f"clips{self.suffix}"
        path.write_bytes(self.content)
        return path


_USUAL = (*PATHS, *IDS, *(name for pair in TIMES for name in pair), *PROMPTS)
_OTHERS = ("score", "speaker", "tags", "a.b", "é", "x\ny", "Path", "START", "", "caption")
_NAMES = st.one_of(st.sampled_from(_USUAL), st.sampled_from(_OTHERS))
_CAPTIONS = {"id", "path", "start", "end", "prompt", "caption"}  # which are not kept
_GOOD = {
    **dict.fromkeys(PATHS, st.integers(0, 99).map("clips/{}.mp4".format)),
    **dict.fromkeys(IDS, st.integers(0, 10**6).map(str)),
    **dict.fromkeys((start for start, _ in TIMES), st.sampled_from(("0", "1.5", "0:01:02.5", "01:02"))),
    **dict.fromkeys((end for _, end in TIMES), st.sampled_from(("100", "1e3", "1:00:00"))),
    **dict.fromkeys(PROMPTS, st.sampled_from(("What happens?", "Who?\nWhere?", "Was gibt es? é"))),
}
_TEXT = st.one_of(
    st.sampled_from(
        (
            "a.mp4",
            "b.mp4",
            "../c.mp4",
            "/d.mp4",
            "./a.mp4",
            "",
            "http://x/v.mp4",
            "x\0y",
            "nan",
            "-1",
            "1e400",
        )
    ),
    st.sampled_from(("1:99", "\x1b[31m", "a\r\nb", "=1+1", '"', "'")),
    st.text(max_size=12),
    st.integers(4090, 5000).map("x".__mul__),
)
_ANY_TEXT = st.one_of(_TEXT, st.text(st.characters(exclude_categories=()), max_size=6))
_NUMBERS = st.one_of(st.floats(), st.integers(-(2**70), 2**70), st.sampled_from((0.0, 1.0, 2.5, 10.0)))
_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), _NUMBERS, _ANY_TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_ANY_TEXT, inner, max_size=3)),
    max_leaves=6,
)
_INT64 = st.integers(-(2**63), 2**63 - 1)


def _struct(value: int) -> dict[str, Any]:
    return {"bytes": b"\xff\x00", "path": f"{value}.mp4"}


# Arrow type -> its values.
_TYPES: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.string(): _TEXT,
    pa.large_string(): _TEXT,
    pa.string_view(): _TEXT,
    pa.dictionary(pa.int32(), pa.string()): _TEXT,
    pa.binary(): st.binary(max_size=12),
    pa.large_binary(): st.binary(max_size=12),
    pa.binary(4): st.binary(min_size=4, max_size=4),
    pa.int64(): _INT64,
    pa.uint64(): st.integers(0, 2**64 - 1),
    pa.int8(): st.integers(-128, 127),
    pa.dictionary(pa.int8(), pa.int64()): st.integers(0, 9),
    pa.float64(): st.floats(),
    pa.float32(): st.floats(width=32),
    pa.float16(): st.floats(width=16),
    pa.bool_(): st.booleans(),
    pa.null(): st.none(),
    pa.decimal128(9, 3): st.decimals(-99999, 99999, places=3),
    pa.timestamp("us", tz="UTC"): st.datetimes(),
    pa.timestamp("ns"): _INT64,
    pa.date32(): st.dates(),
    pa.time64("us"): st.times(),
    pa.duration("us"): st.timedeltas(timedelta(-9999), timedelta(9999)),
    pa.list_(pa.string()): st.lists(_TEXT, max_size=3),
    pa.large_list(pa.string()): st.lists(_TEXT, max_size=3),
    pa.list_(pa.dictionary(pa.int32(), pa.string())): st.lists(_TEXT, max_size=3),
    pa.list_(pa.float64(), 2): st.lists(st.floats(), min_size=2, max_size=2),
    pa.list_(pa.list_(pa.int64())): st.lists(st.lists(_INT64, max_size=2), max_size=2),
    pa.map_(pa.string(), pa.int64()): st.lists(st.tuples(_TEXT, _INT64), max_size=2),
    pa.struct({"bytes": pa.binary(), "path": pa.string()}): st.integers(0, 9).map(_struct),
}


def _mostly(chance: int) -> st.SearchStrategy[bool]:
    """Return true in all but one of so many cases."""
    return st.integers(1, chance).map(lambda number: number > 1)


@st.composite
def _cell(draw: st.DrawFn, name: str, other: st.SearchStrategy[Any]) -> Any:
    """Return what a column of this name may well hold, or something else."""
    return draw(_GOOD.get(name, other) if draw(_mostly(6)) else other)


@st.composite
def _column(draw: st.DrawFn, name: str, rows: int) -> pa.Array:
    if name in _GOOD and draw(_mostly(4)):
        kind, values = pa.string(), _cell(name, _TEXT)
    else:
        kind = draw(st.sampled_from(list(_TYPES)))
        values = _TYPES[kind]
    nulls = draw(_mostly(2))
    return pa.array([draw(values) if not nulls or draw(_mostly(4)) else None for _ in range(rows)], kind)


@st.composite
def _names(draw: st.DrawFn) -> list[str]:
    """Return the names of columns, most often with a path among them, and each once."""
    names = draw(st.lists(_NAMES, max_size=5, unique=draw(_mostly(8))))
    if draw(_mostly(8)) and not set(names) & set(PATHS):
        names.append(draw(st.sampled_from(PATHS)))
    return names or ["path"]


@st.composite
def _parquet(draw: st.DrawFn, names: list[str]) -> bytes:
    rows = draw(st.integers(0, 6))
    columns = [draw(_column(name, rows)) for name in names]
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_arrays(columns, names=names),
        sink,
        row_group_size=draw(st.sampled_from((1, 3, 100))),
        compression=draw(st.sampled_from(("none", "snappy", "zstd", "lz4", "gzip"))),
        use_dictionary=draw(st.booleans()),
        data_page_version=draw(st.sampled_from(("1.0", "2.0"))),
        store_schema=draw(st.booleans()),
        write_page_checksum=draw(st.booleans()),
    )
    return sink.getvalue()


@st.composite
def _csv(draw: st.DrawFn, names: list[str]) -> bytes:
    rows = [
        [draw(_cell(name, _ANY_TEXT)) for name in names][: None if draw(_mostly(8)) else 1]
        for _ in range(draw(st.integers(0, 6)))
    ]
    sink = io.StringIO()
    line_end = "\n" if draw(_mostly(3)) else draw(st.sampled_from(("\r\n", "\r")))
    csv.writer(sink, lineterminator=line_end).writerows([names, *rows])
    if not draw(_mostly(6)):
        sink.write(draw(_ANY_TEXT))
    mark = b"" if draw(_mostly(4)) else draw(st.sampled_from((b"\xef\xbb\xbf", b"\xff\xfe")))
    return mark + sink.getvalue().encode("utf-8", "surrogatepass")


@st.composite
def _jsonl(draw: st.DrawFn, names: list[str]) -> bytes:
    rows: list[Any] = [
        {name: draw(_cell(name, _JSON)) for name in names if draw(_mostly(8))}
        for _ in range(draw(st.integers(0, 6)))
    ]
    if not draw(_mostly(6)):
        rows.append(draw(_JSON))
    lines = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in rows]
    if not draw(_mostly(6)):
        lines.append(draw(_ANY_TEXT))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


@st.composite
def _mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """Return content with bits turned over, and pieces cut out or put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(("flip", "byte", "cut", "insert", "zero")))
        if kind == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and data:
            data[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[place : place + draw(st.integers(1, 40))]
        elif kind == "insert":
            data[place:place] = draw(st.binary(max_size=20))
        elif kind == "zero":
            data[place : place + 8] = bytes(len(data[place : place + 8]))
    return bytes(data)


@st.composite
def _options(draw: st.DrawFn, names: list[str]) -> InputOptions:
    """Return options that ask for columns, of which some are not there."""
    flags = ("path_column", "id_column", "start_column", "end_column", "prompt_column")
    asked = draw(st.lists(st.sampled_from(flags), max_size=2))
    there = st.sampled_from(names)
    own = [name for name in names if name not in _CAPTIONS]
    kept = (
        draw(st.lists(st.sampled_from(own), max_size=2))
        if own and draw(_mostly(5))
        else draw(st.lists(_NAMES, max_size=2))
    )
    columns = {flag: draw(there if draw(_mostly(3)) else st.one_of(st.just(""), _NAMES)) for flag in asked}
    return InputOptions(**columns, keep_columns=tuple(kept))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Return a manifest of any format, some of them damaged."""
    names = draw(_names())
    suffix, made = draw(st.sampled_from(((".parquet", _parquet), (".csv", _csv), (".jsonl", _jsonl))))
    content = draw(made(names))
    if not draw(_mostly(4)):
        content = draw(_mutated(content))
    return Case(suffix, content, draw(_options(names)) if draw(st.booleans()) else InputOptions())


def flags(options: InputOptions) -> list[str]:
    """Return options as flags of the command line."""
    asked = {
        "--path-column": options.path_column,
        "--id-column": options.id_column,
        "--start-column": options.start_column,
        "--end-column": options.end_column,
        "--prompt-column": options.prompt_column,
        "--keep-columns": ",".join(options.keep_columns) or None,
    }
    return [word for flag, value in asked.items() if value is not None for word in (flag, value)]


def read(path: Path, options: InputOptions) -> list[Item] | str:
    """Return the items of a manifest, each checked, or the line that says why there are none.

    Any other error than a UsageError is raised.
    """
    try:
        inputs = Inputs([str(path)], options)
        items = list(inputs)
    except UsageError as error:
        check_line(str(error))
        return str(error)
    for item in items:
        check(item, dict(inputs.kept))
    assert inputs.report.rows == len(items)
    again = list(Inputs([str(path)], options))
    assert [item.id for item in again] == [item.id for item in items]
    return items


def check_line(message: str) -> None:
    """A message is one line that a terminal can be given."""
    assert message == clean(message)
    assert 0 < len(message) < 1500


def check(item: Item, kinds: dict[str, str]) -> None:
    """What holds of every item."""
    assert item.id == item.id.encode().decode()
    assert 0 < len(item.id) <= 1024
    assert item.path == b"" or (item.path.startswith(b"/") and b"\0" not in item.path)
    assert item.start_s is None or (0 <= item.start_s < math.inf and math.copysign(1, item.start_s) == 1)
    assert item.end_s is None or (item.start_s or 0) < item.end_s < math.inf
    if item.problem is not None:
        check_line(item.problem)
        return
    assert item.path
    assert item.prompts is None or 0 < len(item.prompts) <= 100
    for prompt in item.prompts or ():
        assert prompt.strip()
        assert not {"\0", "\x1b", "\r"} & set(prompt)
        prompt.encode()
    if kinds:
        assert item.kept is not None
        check_kept(item.kept, kinds)
    else:
        assert item.kept is None


def check_kept(text: str, kinds: dict[str, str]) -> None:
    """Kept values are of the types that were promised, and can be stored as JSON and as UTF-8."""
    text.encode()
    types = {"bool": bool, "int64": int, "float64": float, "string": str}
    kept = json.loads(text, parse_constant=_refuse)
    assert set(kept) == set(kinds)
    for name, value in kept.items():
        assert value is None or type(value) is types[kinds[name]], (name, value, kinds)
        assert kinds[name] != "int64" or value is None or -(2**63) <= value < 2**63


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")
