"""Measure a folder of videos: `specvlm caption` against a loop over `transformers`, in videos per hour.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --threads 1 --caption-flags "--batch-size 16 --tree chain"

The example clips lie twelve times in a temporary folder, each under a name of its own. The command captions them in a
process of its own, and so does a loop as a person would write it: read all files, preprocess them, sort the prompts by
length, `generate()` on left-padded batches of 8, 16 and 32; its fastest batch size counts, in each turn anew. All take
turns, with the same number of threads, in OMP_NUM_THREADS. Loading models counts for none of them: the command's time
runs from the moment at which its models are ready, before it has read a video, to `created_at` of its last row; the
loop's from the first file to the last text, after a first batch that is not timed. Prints Markdown for
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

BATCH_SIZES = (8, 16, 32)
LIMIT = 256  # tokens; as `specvlm caption` has it


class Timed(NamedTuple):
    """One folder captioned."""

    seconds: float
    captions: dict[str, str]  # names of the files -> texts


def copies(folder: Path, times: int) -> None:
    """Lay the example clips into the folder, `times` times."""
    from specvlm.bench.clips import example_clips

    for clip in example_clips():
        path = Path(str(clip.video))
        for number in range(times):
            shutil.copyfile(path, folder / f"{number:02d}-{path.name}")


# --- in processes of their own ---


def stock(folder: Path, preset: str, batch_size: int) -> Timed:
    """The loop over `transformers`."""
    import torch

    import specvlm
    from specvlm.bench.stock import batches, generate, stackable, stock_attention
    from specvlm.families.base import ModelInputs
    from specvlm.preset import find_preset
    from specvlm.video import read_video

    chosen = find_preset(preset)
    assert chosen is not None
    captioner = specvlm.load(preset, draft="none")
    target, processor = captioner.target, captioner.processor

    def caption(paths: list[Path]) -> dict[str, str]:
        found: dict[str, str] = {}
        frames = [
            read_video(path, captioner.frames, frame_multiple=captioner.frame_multiple) for path in paths
        ]
        inputs = [target.family.prepare(processor, one, chosen.prompt) for one in frames]
        named = list(zip(paths, inputs, strict=True))
        for batch in batches(named, lambda pair: pair[1].prompt_tokens, batch_size):
            written = [tokens for part in stackable([one for _, one in batch]) for tokens in _run(part)]
            texts = processor.tokenizer.batch_decode(written, skip_special_tokens=True)
            found |= {path.name: text.strip() for (path, _), text in zip(batch, texts, strict=True)}
        return found

    def _run(part: list[ModelInputs]) -> list[tuple[int, ...]]:
        return generate(target.model, target.embedding_device, part, LIMIT).token_ids

    paths = sorted(folder.iterdir())
    with stock_attention([target.model]), torch.inference_mode():
        caption(paths[:batch_size])
        began = time.perf_counter()
        captions = caption(paths)
        return Timed(time.perf_counter() - began, captions)


def ours(folder: Path, preset: str, flags: list[str]) -> Timed:
    """The command, whose models are ready when its runner begins."""
    import pyarrow.parquet as pq

    from specvlm_cli import app
    from specvlm_cli.caption import coordinator

    began: list[datetime] = []
    run: Callable[..., None] = coordinator.Coordinator.run

    def noting(*given: Any) -> None:
        began.append(datetime.now(UTC))
        run(*given)

    coordinator.Coordinator.run = noting  # type: ignore[method-assign, assignment]
    with tempfile.TemporaryDirectory(prefix="specvlm-out-") as out:
        code = app.main(["caption", str(folder), "-o", out, "--preset", preset, "-q", *flags])
        if code:
            raise SystemExit(f"specvlm caption: exit code {code}")
        rows = pq.read_table(Path(out) / "captions").to_pylist()
    ended: datetime = max(row["created_at"] for row in rows)
    captions = {Path(row["path"]).name: row["caption"] for row in rows}
    return Timed((ended - began[0]).total_seconds(), captions)


def apart(arguments: list[str], threads: int) -> Timed:
    """Run this script in a process of its own, with so many threads."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {}),
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return Timed(*json.loads(done.stdout.splitlines()[-1]))


# --- the comparison ---


def measure(folder: Path, options: argparse.Namespace) -> dict[str, list[Timed]]:
    """Everything once in each turn, another one first every time."""
    common = ["--preset", options.preset, "--folder", str(folder)]
    methods = {f"transformers, batches of {size}": [*common, "--stock", str(size)] for size in BATCH_SIZES}
    methods["specvlm caption"] = [*common, "--ours", f"--caption-flags={options.caption_flags}"]
    names, found = list(methods), {name: list[Timed]() for name in methods}
    for turn in range(options.repeat):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(apart(methods[name], options.threads))
            print(f"turn {turn + 1}, {name}: {found[name][-1].seconds:.2f} s", file=sys.stderr)
    return found


def report(found: dict[str, list[Timed]], options: argparse.Namespace) -> None:
    """The table, and the ratio of each turn."""
    import torch
    from acceptance import conditions

    if options.threads:
        torch.set_num_threads(options.threads)  # which the conditions tell
    files = len(found["specvlm caption"][0].captions)
    flags = f" {options.caption_flags}" if options.caption_flags else ""
    print(
        f"\n{files} files, preset `{options.preset}`, `specvlm caption{flags}`, "
        f"OMP_NUM_THREADS={options.threads or 'not set'}, {options.repeat} turns, {conditions()}.\n"
    )
    print("| | videos per hour | p10 to p90 over turns |\n|---|---:|---:|")
    for name, timed in found.items():
        rates = [3600.0 * files / one.seconds for one in timed]
        print(f"| {name} | {median(rates):,.0f} | {_spread(rates, ',.0f')} |")
    *theirs, own = found.values()
    ratios = [
        min(one.seconds for one in turn) / mine.seconds
        for turn, mine in zip(zip(*theirs, strict=True), own, strict=True)
    ]
    print(f"| ratio to the fastest of the others | {median(ratios):.2f} | {_spread(ratios, '.2f')} |")
    same = sum(own[0].captions.get(name) == text for name, text in theirs[0][0].captions.items())
    print(f"\n{same} of {files} captions are the same as those of {next(iter(found))}.")


def _spread(values: list[float], form: str) -> str:
    if len(values) < 2:
        return ""
    tenths = quantiles(values, n=10, method="inclusive")
    return f"{tenths[0]:{form}} to {tenths[-1]:{form}}"


def main() -> None:
    """Measure and print; or, called by itself, caption the folder in one of the ways."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--copies", type=int, default=12, help="how often each of the eight clips is there")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="in OMP_NUM_THREADS; 0: as each chooses")
    parser.add_argument("--caption-flags", default="", help="further flags of specvlm caption, in one word")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stock", type=int, metavar="BATCH_SIZE", help=argparse.SUPPRESS)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stock is not None:
        print(json.dumps(stock(options.folder, options.preset, options.stock)))
    elif options.ours:
        print(json.dumps(ours(options.folder, options.preset, shlex.split(options.caption_flags))))
    else:
        with tempfile.TemporaryDirectory(prefix="specvlm-videos-") as folder:
            copies(Path(folder), options.copies)
            report(measure(Path(folder), options), options)


if __name__ == "__main__":
    main()
