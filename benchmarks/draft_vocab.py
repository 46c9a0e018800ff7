"""Measure what a trimmed draft vocabulary saves and costs, with the full one beside it in turns, in one process.

    python benchmarks/draft_vocab.py demo --clips 24 --repeat 3
    python benchmarks/draft_vocab.py shapes --keep 16384
    python benchmarks/draft_vocab.py shapes --device cuda --dtype bfloat16 --layers 28 --draft-layers 36

`demo`: half of the demo draft's tokens, by the tokenizer's order and counted in captions of other clips. `shapes`: the
LM head of published shapes with random weights and few layers, so that the step times are those of such a draft, and
its share of right guesses is not. Every caption must be that of plain decoding. Prints Markdown for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from acceptance import PROMPT, conditions, drawn
from modelled import Pair, RandomCaptioner, build, find_shape

import specvlm
from specvlm.captioner import Captioner, PreparedVideo
from specvlm.drafts.base import Draft
from specvlm.drafts.compressor import CompressorConfig
from specvlm.drafts.head import HeadDraft
from specvlm.drafts.head_model import HeadConfig, HeadModel
from specvlm.drafts.kept_tokens import Choosing, MostUsed, choose_ids
from specvlm.drafts.small_model import SmallModelDraft
from specvlm.preset import find_preset
from specvlm.published import Shape
from specvlm.sampling import id_list
from specvlm.words import counted

TREES = ("chain", "static", "dynamic")
FRAMES = 2
LEVEL = 4  # nodes of a tree's level whose LM head is timed alone


class Ran(NamedTuple):
    """One caption."""

    decode_s: float
    draft_s: float
    rounds: int
    accepted: int


class Row(NamedTuple):
    """One line of a table: medians over turns of sums over videos."""

    round_ms: float  # the draft's part of a round
    decode_s: float
    accepted: float  # guesses of a round


def run(captioner: Captioner, video: PreparedVideo, asked: dict[str, Any]) -> tuple[Ran, tuple[int, ...]]:
    """One caption."""
    caption = captioner.caption(video, **asked)
    stats = caption.stats
    assert stats.draft_s is not None
    return Ran(stats.decode_s, stats.draft_s, stats.num_drafts, stats.num_accepted_tokens), caption.token_ids


def in_turns(
    captioner: Captioner,
    videos: Sequence[PreparedVideo],
    drafts: dict[str, Draft],
    repeat: int,
    asked: dict[str, Any],
) -> dict[str, Row]:
    """All drafts on each video in turn, another one first every time; one turn more at the beginning warms up."""
    plain = [
        captioner.caption(v, speculate=False, max_new_tokens=asked["max_new_tokens"]).token_ids
        for v in videos
    ]
    turns: dict[str, list[list[Ran]]] = {name: [] for name in drafts}
    names = list(drafts)
    for turn in range(repeat + 1):
        runs: dict[str, list[Ran]] = defaultdict(list)
        for index, video in enumerate(videos):
            shift = (turn + index) % len(names)
            for name in names[shift:] + names[:shift]:
                captioner.draft = drafts[name]
                ran, written = run(captioner, video, asked)
                if written != plain[index]:
                    raise SystemExit(f"{name}, {asked}, video {index}: not the caption of plain decoding")
                runs[name].append(ran)
        if turn:
            for name in names:
                turns[name].append(runs[name])
    return {name: _row(each) for name, each in turns.items()}


def _row(turns: list[list[Ran]]) -> Row:
    def total(ran: list[Ran], name: str) -> float:
        return float(sum(getattr(one, name) for one in ran))

    rounds = total(turns[0], "rounds")
    return Row(
        statistics.median(total(one, "draft_s") / rounds * 1e3 for one in turns),
        statistics.median(total(one, "decode_s") for one in turns),
        total(turns[0], "accepted") / rounds,
    )


def head_ms(drafts: dict[str, Any], like: torch.Tensor, width: int, turns: int = 30) -> dict[str, float]:
    """The LM head alone over as many hidden states as a level has, in turns: medians."""
    states = torch.randn(1, LEVEL, width, dtype=like.dtype, device=like.device)
    times: dict[str, list[float]] = defaultdict(list)
    with torch.inference_mode():
        for _, (name, draft) in itertools.product(range(turns), drafts.items()):
            _wait(like.device)
            began = time.perf_counter()
            draft.guessable.logits(states)
            _wait(like.device)
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(each[2:]) * 1e3 for name, each in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tell(rows: dict[str, Row], tree: str, alone: dict[str, float]) -> None:
    """Lines of the table; the first row is the full vocabulary."""
    full = next(iter(rows.values()))
    for name, row in rows.items():
        print(
            f"| {name} | {tree} | {alone[name]:.3f} | {row.round_ms:.2f} | {row.round_ms / full.round_ms:.2f} "
            f"| {row.accepted:.2f} | {full.decode_s / row.decode_s:.3f} |",
            flush=True,
        )


HEADING = (
    "| draft guesses from | tree | LM head, ms | draft of a round, ms | x full | accepted | decode: x full |\n"
    "|---|---|---|---|---|---|---|"
)


# --- the demo pair ---


def demo(options: argparse.Namespace) -> None:
    """Half of the demo draft's tokens."""
    preset = find_preset(options.preset)
    assert preset is not None
    captioner = specvlm.load(options.preset)
    draft = captioner.draft
    assert isinstance(draft, SmallModelDraft)
    clips = [
        captioner.prepare(drawn(i, preset.frames, captioner.frame_multiple), PROMPT)
        for i in range(options.clips + options.counted)
    ]
    others = [
        captioner.caption(v, max_new_tokens=options.max_new_tokens).text for v in clips[options.clips :]
    ]
    size = draft.vocabulary // 2
    ends = id_list(captioner.generation_config.eos_token_id)
    by = Choosing(captioner.processor.tokenizer, draft.vocabulary, ends)
    drafts: dict[str, Draft] = {f"all {draft.vocabulary} tokens": draft}
    for name, texts in (("the tokenizer's first", []), (f"counted in {len(others)} other captions", others)):
        ids = choose_ids(MostUsed(size, texts), by)
        drafts[f"{size}, {name}"] = SmallModelDraft(draft.model, draft.vocabulary, ids)
    print(
        f"\nPreset `{options.preset}`, {options.clips} held-out clips, {options.repeat} turns, {conditions()}.\n"
    )
    print(HEADING)
    weight = draft.model.model.get_output_embeddings().weight
    alone = head_ms(drafts, weight, weight.shape[1])
    for tree in TREES:
        asked = {"tree": tree, "max_new_tokens": options.max_new_tokens}
        tell(in_turns(captioner, clips[: options.clips], drafts, options.repeat, asked), tree, alone)
    print("\nAll captions are those of plain decoding.")


# --- published shapes ---


def few_layers(shape: Shape, layers: int) -> Shape:
    """A shape with so many layers in the decoder and one in the vision tower, which no draft step runs through.

    The LM head is tied to the embeddings, for the sake of memory: a step reads the one or the other all the same.
    """
    text = replace(shape.text, layers=layers, tied=True)
    return replace(shape, text=text, vision=replace(shape.vision, depth=1))


def kept(written: Sequence[int], keep: int, shared: int) -> list[int]:
    """So many tokens, spread over all, with every second one that the caption uses and none of the others."""
    used = list(dict.fromkeys(written))
    out = set(used[::2])
    for token in range(0, shared, max(1, shared // keep - 1)):
        if len(out) < keep and token not in used:
            out.add(token)
    spare = (token for token in range(shared) if token not in out and token not in used)
    out.update(itertools.islice(spare, keep - len(out)))
    return sorted(out)


class Kind(NamedTuple):
    """One kind of draft."""

    name: str
    make: Callable[[Sequence[int] | None], Draft]  # over some tokens
    width: int  # of its hidden states


def small_model(captioner: RandomCaptioner, options: argparse.Namespace) -> Kind:
    """A smaller model of the family, which is never right."""
    target = captioner.target
    shape = few_layers(find_shape(options.draft_shape), options.draft_layers)
    small = build(shape, target.device, target.dtype, seed=1)
    shared = min(target.vocabulary, small.vocabulary)
    name = f"{shape.name}, {counted(options.draft_layers, 'layer')}"
    return Kind(name, lambda ids: SmallModelDraft(small, shared, ids), shape.text.hidden)


def itself(captioner: RandomCaptioner, options: argparse.Namespace) -> Kind:
    """The target's own weights, which are right wherever they may guess: accepted guesses are compared, too."""
    target = captioner.target
    hidden = captioner.pair.target.text.hidden
    return Kind("the target itself", lambda ids: SmallModelDraft(target, target.vocabulary, ids), hidden)


def head(captioner: RandomCaptioner, options: argparse.Namespace) -> Kind:
    """A trained head, but for the training."""
    target, hidden = captioner.target, captioner.pair.target.text.hidden
    config = HeadConfig("modelled", None, target.family.name, hidden, compressor=CompressorConfig("none", ()))
    model = HeadModel.fresh(target, config, seed=0).to(target.device, target.dtype)
    model.eval().requires_grad_(False)
    return Kind("a one-layer head", lambda ids: HeadDraft(model, target, ids), hidden)


KINDS = {"small": small_model, "itself": itself, "head": head}


def compare(
    captioner: RandomCaptioner,
    kind: Kind,
    videos: Sequence[PreparedVideo],
    written: Sequence[Sequence[int]],
    options: argparse.Namespace,
) -> None:
    """One kind of draft with its whole vocabulary and with a trimmed one."""
    whole = kind.make(None)
    ids = kept([token for one in written for token in one], options.keep, whole.vocabulary)
    drafts = {
        f"{kind.name}: all {whole.vocabulary:,}": whole,
        f"{kind.name}: {options.keep:,}": kind.make(ids),
    }
    alone = head_ms(drafts, captioner.target.model.get_output_embeddings().weight, kind.width)
    for tree in options.trees:
        # Random weights give another text where video tokens are missing, so none is.
        asked = {"tree": tree, "max_new_tokens": options.max_new_tokens, "prune_ratio": 0.0}
        tell(in_turns(captioner, videos, drafts, options.repeat, asked), tree, alone)
    captioner.draft = None
    captioner._decoders.clear()  # a head needs features, which their caches lack


def shapes(options: argparse.Namespace) -> None:
    """A published pair with few layers and random weights."""
    torch.manual_seed(0)
    shape = few_layers(find_shape(options.shape), options.layers)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    captioner = RandomCaptioner(Pair(shape, None, 0.0), build(shape, device, dtype), None)
    videos = [captioner.video(FRAMES, seed) for seed in range(options.clips)]
    written = [
        captioner.caption(v, speculate=False, max_new_tokens=options.max_new_tokens).token_ids for v in videos
    ]
    print(
        f"\n{shape.name}, {counted(options.layers, 'layer')}, random weights, {dtype} on {device}, "
        f"{counted(options.clips, 'prompt')} of {videos[0].inputs.prompt_tokens} tokens, "
        f"{options.max_new_tokens} tokens each, {counted(options.repeat, 'turn')}, "
        f"{conditions()}.\n"
    )
    print(HEADING)
    for kind in options.kinds:  # one at a time, so that memory holds one
        compare(captioner, KINDS[kind](captioner, options), videos, written, options)
    print("\nAll captions are those of plain decoding.")


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    which = parser.add_subparsers(required=True)
    one = which.add_parser("demo")
    one.add_argument("--preset", default="demo")
    one.add_argument("--clips", type=int, default=24)
    one.add_argument("--counted", type=int, default=50, help="other clips, whose captions are counted")
    one.add_argument("--repeat", type=int, default=3)
    one.add_argument("--max-new-tokens", type=int, default=200)
    one.set_defaults(run=demo)
    two = which.add_parser("shapes")
    two.add_argument("--shape", default="qwen2.5-vl-7b")
    two.add_argument("--layers", type=int, default=1)
    two.add_argument("--draft-shape", default="qwen2.5-vl-3b")
    two.add_argument("--draft-layers", type=int, default=2)
    two.add_argument("--keep", type=int, default=16384)
    two.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    two.add_argument("--trees", nargs="+", default=["chain"])
    two.add_argument("--clips", type=int, default=1)
    two.add_argument("--repeat", type=int, default=3)
    two.add_argument("--max-new-tokens", type=int, default=12)
    two.add_argument("--device", default="cpu")
    two.add_argument("--dtype", default="float32")
    two.set_defaults(run=shapes)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
