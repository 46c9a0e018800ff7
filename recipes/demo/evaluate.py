"""Measure demo checkpoints on held-out clips, through the stock processor and the stock `generate()`.

`python -m recipes.demo.evaluate --target FOLDER [--draft FOLDER] [--clips 300] [--frames 8]` prints JSON: the share of
facts right by kind, the share of captions exactly right, and for a draft the mean accepted tokens per round
that its ranking of the target's own tokens gives. That last figure replays rounds on recorded logits with
uniform pruning; it runs no speculative decoding, but for greedy decoding the accepted tokens are the same.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoProcessor, PreTrainedModel

from recipes.demo.batches import Batch
from recipes.demo.captions import FACT_KINDS, PROMPTS, caption_for, compare, facts_in, facts_of
from recipes.demo.clips import CLIP_SECONDS, Scene, render, scene_for, seed_for
from recipes.demo.models import FRAMES
from recipes.demo.train import caption_logits, load_model, video_tokens

SIDE: Final = 192
_ROWS: Final = 25
"""Clips of `FRAMES` frames in a batch."""
STATIC_TREE: Final = (
    *("0", "1", "2", "3", "00", "01", "02", "10", "11", "20", "21", "30"),
    *("000", "001", "002", "010", "011", "020", "021", "100", "0000", "0001", "0002", "00000", "00001"),
)
"""The 25 paths of draft ranks that the paper's static tree tries in one round."""
CHAIN: Final = tuple("0" * depth for depth in range(1, 6))


@dataclass(frozen=True)
class Captioned:
    """One clip with what a model said of it."""

    scene: Scene
    inputs: dict[str, Tensor]
    token_ids: list[int]
    text: str


def prepared(processor: Any, frames: NDArray[np.uint8], prompt: str) -> dict[str, Tensor]:
    """Model inputs of one clip, frames [F, height, width, 3] spread evenly over its four seconds."""
    content = [{"type": "video"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    fps = len(frames) / CLIP_SECONDS
    seen = {"fps": fps, "total_num_frames": len(frames), "frames_indices": list(range(len(frames)))}
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    made = processor(
        text=[text], videos=[video], video_metadata=[seen], do_sample_frames=False, return_tensors="pt"
    )
    return {key: value if isinstance(value, Tensor) else torch.tensor(value) for key, value in made.items()}


def load_processor(folder: Path) -> Any:
    """A checkpoint's processor as stock classes load it."""
    kind: Any = AutoProcessor
    return kind.from_pretrained(folder)


def caption_clips(
    model: Any, processor: Any, scenes: list[Scene], prompt: str, frames: int = FRAMES
) -> list[Captioned]:
    """Caption clips greedily, several rows at a time; all prompts have one length, so nothing is padded."""
    times = (np.arange(frames) * CLIP_SECONDS / frames).astype(np.float32)
    rows = max(1, _ROWS * FRAMES // frames)
    told: list[Captioned] = []
    for start in range(0, len(scenes), rows):
        some = scenes[start : start + rows]
        inputs = [prepared(processor, render(s, times, SIDE, SIDE), prompt) for s in some]
        joined = {key: torch.cat([i[key] for i in inputs]) for key in inputs[0]}
        whole = model.generate(**joined, max_new_tokens=200, do_sample=False)
        made = whole[:, joined["input_ids"].shape[1] :]
        for scene, given, ids in zip(some, inputs, made.tolist(), strict=True):
            ends = [i for i, token in enumerate(ids) if token in model.generation_config.eos_token_id]
            ids = ids[: ends[0] + 1] if ends else ids
            text = processor.tokenizer.decode(ids, skip_special_tokens=True)
            told.append(Captioned(scene, given, ids, text))
    return told


def accuracy(told: list[Captioned]) -> dict[str, float]:
    """Share of facts right, in all and by kind, and share of captions right to the letter."""
    right: dict[str, int] = dict.fromkeys(FACT_KINDS, 0)
    total = dict(right)
    for one in told:
        for kind, (hits, of) in compare(facts_in(one.text), facts_of(one.scene)).items():
            right[kind] += hits
            total[kind] += of
    shares = {kind: round(right[kind] / total[kind], 4) for kind in FACT_KINDS if total[kind]}
    facts = sum(right.values()) / sum(total.values())
    exact = sum(one.text == caption_for(one.scene) for one in told) / len(told)
    return {"facts": round(facts, 4), **shares, "exact_captions": round(exact, 4)}


def ranks_of(model: PreTrainedModel, one: Captioned, prune_ratio: float) -> list[int]:
    """Rank that the draft gives to each of the target's tokens, seeing an even share of the video tokens."""
    pixels = {k: v for k, v in one.inputs.items() if k in ("pixel_values_videos", "video_grid_thw")}
    batch = Batch(
        pixels=pixels,
        prompt_ids=one.inputs["input_ids"],
        caption_ids=torch.tensor([one.token_ids]),
        weights=torch.ones(1, len(one.token_ids)),
        cells={},
        scenes=[one.scene],
        seconds_per_grid=float(one.inputs.get("second_per_grid_ts", torch.ones(1))[0]),
    )
    seen = video_tokens(model, batch)
    count = seen.tokens.shape[1]
    kept = max(1, round(count * (1 - prune_ratio)))
    keep = None if prune_ratio == 0 else torch.linspace(0, count - 1, kept).round().long()[None]
    logits = caption_logits(model, batch, seen, keep)[0]
    own = logits.gather(1, torch.tensor(one.token_ids)[:, None])
    ranks: list[int] = (logits > own).sum(1).tolist()
    return ranks


def accepted_per_round(ranks: list[int], paths: tuple[str, ...]) -> list[int]:
    """Accepted tokens of each round: the longest path of the tree that the target's tokens follow."""
    tree, accepted, at = set(paths), [], 1
    while at < len(ranks):
        depth = 0
        while at + depth < len(ranks) and "".join(map(str, ranks[at : at + depth + 1])) in tree:
            depth += 1
        accepted.append(depth)
        at += depth + 1
    return accepted


def acceptance(draft: PreTrainedModel, told: list[Captioned]) -> dict[str, dict[str, float]]:
    """Mean accepted tokens per round, the bonus not counted, by prune ratio and shape of tree."""
    table: dict[str, dict[str, float]] = {}
    for ratio in (0.0, 0.5, 0.8, 0.9, 0.95, 0.98):
        ranks = [ranks_of(draft, one, ratio) for one in told]
        row = {
            name: round(float(np.mean([n for r in ranks for n in accepted_per_round(r, paths)])), 3)
            for name, paths in (("chain", CHAIN), ("static", STATIC_TREE))
        }
        first = float(np.mean([rank == 0 for r in ranks for rank in r]))
        table[str(ratio)] = row | {"first_choice": round(first, 4)}
    return table


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument(
        "--frames", type=int, default=FRAMES, help="frames of each clip, over its four seconds"
    )
    parser.add_argument("--prompt", default=PROMPTS[0])
    parser.add_argument("--mistakes", type=int, default=0, help="print this many wrong captions")
    parser.add_argument("--repetition-penalty", type=float)
    options = parser.parse_args(argv)
    began = time.monotonic()
    model = load_model(options.target)
    if options.repetition_penalty:
        model.generation_config.repetition_penalty = options.repetition_penalty
    processor = load_processor(options.target)
    scenes = [scene_for(seed_for("held-out", i)) for i in range(options.clips)]
    told = caption_clips(model, processor, scenes, options.prompt, options.frames)
    report: dict[str, Any] = {"clips": len(told), "frames": options.frames, "target": accuracy(told)}
    if options.draft:
        draft = load_model(options.draft)
        report["accepted"] = acceptance(draft, told)
        own = caption_clips(draft, load_processor(options.draft), scenes, options.prompt, options.frames)
        report["draft_alone"] = accuracy(own)
    report["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(report, indent=1))
    wrong = [one for one in told if one.text != caption_for(one.scene)]
    for one in wrong[: options.mistakes]:
        print(f"said: {one.text}\ntrue: {caption_for(one.scene)}\n")


if __name__ == "__main__":
    main()
