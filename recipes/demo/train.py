"""Train a demo checkpoint: `python -m recipes.demo.train --family qwen --role target --work D --minutes 33`.

One recipe for all families and both roles. A target goes through three stages by the clock: the vision
tower alone, taught what each cell of the picture shows; then a shallow text model on captions; then, with
layers that add nothing at first put between the trained ones, the full depth. A draft has no third stage and
sees pruned video tokens. Features that a tower adds behind the first text layers (DeepStack) are trained along:
what a cell shows must be read from a video token without them and with them. `--extend` starts from a finished
checkpoint at full depth, so that it learns clips of other numbers of frames. The run is seeded, writes a
checkpoint every two minutes and resumes from it when started again. The clock is the CPU time of a thread, so
that a busy machine shortens no stage. It is a recipe for toy models on two CPU cores, not a trainer for large
ones.
"""

import argparse
import json
import math
import random
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForImageTextToText, PreTrainedModel

from recipes.demo.batches import CELL_FACTS, IGNORED, Batch, Drawer
from recipes.demo.models import (
    CHECKPOINTS,
    FRAMES,
    Role,
    build_model,
    build_processor,
    deepened,
    places,
    save_folder,
    text_layers,
)
from recipes.demo.tokenizer import Family

SECONDS_BETWEEN_SAVES: Final = 120
PRUNE_RATIOS: Final = (0.0, 0.5, 0.9, 0.9, 0.95)
_WINDOWS: Final = "flash_windows_of_demo_training"


@dataclass
class Plan:
    """Everything that decides a run."""

    family: Family
    role: Role
    minutes: float
    batch_size: int = 32
    learning_rate: float = 3e-3
    seed: int = 0
    vision_share: float = 0.1
    """Share of the time in which only the vision tower learns."""
    deepen_at: float = 0.65
    """Share of the time after which the text model gets its full depth."""
    cell_weight: float = 0.3
    """Weight of the cell loss relative to the caption loss."""
    start: str = ""
    """Training state (`shallow.pt`) of another run, or a finished checkpoint, whose text model starts this one."""
    extend: str = ""
    """Finished checkpoint of the same family and role that this run continues with, for other clips."""
    layers: int = 0
    """Text layers at the end; 0: those of the role's sizes."""
    frames: list[int] = field(default_factory=lambda: [FRAMES])
    """Frames of a clip. Each batch draws one of these numbers; a batch of longer clips has fewer clips."""


@dataclass
class Progress:
    """How far a run has come; stored with every checkpoint."""

    step: int = 0
    elapsed_s: float = 0.0
    layers: int = 0
    since_rebuild: int = 0


@dataclass
class Seen:
    """What the vision tower makes of a batch of clips."""

    tokens: Tensor
    """[B, V, width], put into the prompt."""
    deep: list[Tensor]
    """Each [B, V, width]: added behind the first text layers, one each."""

    @property
    def levels(self) -> list[Tensor]:
        """The tokens as they enter the text model, and with everything that is added to them."""
        return [self.tokens, self.tokens + torch.stack(self.deep).sum(0)] if self.deep else [self.tokens]


class CellHead(nn.Module):
    """Throw-away head that reads the facts of a cell from its video token."""

    def __init__(self, width: int, facts: tuple[str, ...]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, CELL_FACTS[name]) for name in facts})

    def forward(self, tokens: Tensor, cells: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Mean loss over kinds of fact, and the share of labelled cells that are right."""
        tokens = self.norm(tokens)
        losses, right = [], {}
        for name, head in self.heads.items():
            labels = cells[name].flatten()
            logits = head(tokens).flatten(0, 1)
            weight = torch.ones(CELL_FACTS[name])
            if name == "colour":
                weight[-1] = 0.15
            losses.append(functional.cross_entropy(logits, labels, weight=weight, ignore_index=IGNORED))
            known = labels != IGNORED if name != "colour" else labels < CELL_FACTS[name] - 1
            right[name] = float((logits.argmax(-1) == labels)[known].float().mean())
        return torch.stack(losses).mean(), right


class Trainer:
    """One run: model, heads, optimizers and the clock."""

    def __init__(self, plan: Plan, work: Path) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.work = plan, work
        self.sizes = CHECKPOINTS[plan.family, plan.role]
        self.processor = build_processor(plan.family)
        self.tokenizer = self.processor.tokenizer
        self.drawer = Drawer(plan.family, self.processor)
        self.layers = plan.layers or self.sizes.text_layers
        self.progress = Progress(layers=self.layers if plan.extend else self.sizes.first_layers)
        seen = [fact for fact in CELL_FACTS if fact != "motion" or plan.family != "llava"]
        self.heads = nn.ModuleDict({"vision": CellHead(self.sizes.text_width, tuple(seen))})
        if self.sizes.first_layers > 1:
            self.heads["text"] = CellHead(self.sizes.text_width, ("motion", "row", "column", "size"))
        saved = work / "last.pt"
        state = torch.load(saved, weights_only=True) if saved.exists() else None
        if state:
            self.progress = Progress(**state["progress"])
        self._adopt(self._fresh(self.progress.layers))
        if state:
            self.model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])
            for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
        elif plan.extend:
            self.model.load_state_dict(self._deepened(load_model(Path(plan.extend))).state_dict())
        elif plan.start:
            self._start_from(Path(plan.start))

    def run(self) -> None:
        """Train until the minutes are used up, then write the folder."""
        last_save, began = time.monotonic(), _clock_s() - self.progress.elapsed_s
        while self.share < 1:
            self._deepen_when_due()
            line = self._step()
            self.progress.elapsed_s = _clock_s() - began
            if self.progress.step % 20 == 0:
                print(json.dumps(line), flush=True)
            if time.monotonic() - last_save > SECONDS_BETWEEN_SAVES:
                self.save()
                last_save = time.monotonic()
        self.save()

    @property
    def share(self) -> float:
        """Share of the time that is used."""
        return self.progress.elapsed_s / (60 * self.plan.minutes)

    def save(self) -> None:
        """Write the checkpoint to resume from, and the Hugging Face folder as it stands."""
        self.work.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "progress": asdict(self.progress),
        }
        torch.save(state, self.work / "last.part")
        (self.work / "last.part").replace(self.work / "last.pt")
        save_folder(self._deepened(self.model), self.processor, self.work / "model")
        (self.work / "plan.json").write_text(json.dumps(asdict(self.plan) | asdict(self.progress), indent=1))

    def _fresh(self, layers: int) -> PreTrainedModel:
        return build_model(self.plan.family, self.plan.role, self.tokenizer, layers)

    def _deepened(self, model: PreTrainedModel) -> PreTrainedModel:
        return deepened(model, self.plan.family, self.plan.role, self.tokenizer, self.layers)

    def _adopt(self, model: PreTrainedModel) -> None:
        self.model = model.train()
        self.progress.since_rebuild = 0
        _use_fast_windows(model)
        self.optimizers = _optimizers(model, self.heads, self.plan.learning_rate)
        self._middle: Tensor | None = None
        if "text" in self.heads:
            first = self.sizes.first_layers
            middle = places(self.sizes, first, self.progress.layers)[first // 3]
            text_layers(model)[middle].register_forward_hook(self._keep_middle)

    def _keep_middle(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._middle = output[0] if isinstance(output, tuple) else output

    def _start_from(self, found_at: Path) -> None:
        """Take over the text model of another run, and its cell heads, so that the towers speak alike.

        A finished checkpoint has no heads. Of its layers every so many-th is taken: those that it started with.
        """
        if found_at.is_dir():
            state: dict[str, Any] = {"model": load_model(found_at).state_dict(), "heads": {}}
        else:
            state = torch.load(found_at, weights_only=True)
        text = fewer_layers(state["model"], self.progress.layers)
        for part, found in ((self.model, text), (self.heads, state["heads"])):
            own = part.state_dict()
            own.update({k: v for k, v in found.items() if k in own and v.shape == own[k].shape})
            part.load_state_dict(own)

    def _deepen_when_due(self) -> None:
        if self.share >= self.plan.deepen_at and self.progress.layers < self.layers:
            self.save()
            (self.work / "last.pt").replace(self.work / "shallow.pt")
            self.progress.layers = self.layers
            self._adopt(self._deepened(self.model))

    def _rate(self) -> float:
        flat = 0.4
        decay = 0.5 * (1 + math.cos(math.pi * max(0.0, (self.share - flat) / (1 - flat))))
        return max(decay, 0.01) * min(1.0, (self.progress.since_rebuild + 1) / 50)

    def _step(self) -> dict[str, Any]:
        began = time.monotonic()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_rate"] * self._rate()
        captions = self.share >= self.plan.vision_share
        ones = max(0.4, 1 - 3 * max(0.0, self.share - self.plan.vision_share)) if captions else 0.4
        frames = random.Random(self.progress.step).choice(self.plan.frames)
        batch = self.drawer.batch(self.progress.step, self.plan.batch_size, ones, frames)
        loss, line = self._losses(batch, captions)
        loss.backward()  # type: ignore[no-untyped-call]
        for part in (self.model, self.heads):
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.since_rebuild += 1
        line |= {"step": self.progress.step, "frames": frames, "share": round(self.share, 3)}
        line["layers"] = self.progress.layers
        return line | {"loss": round(float(loss.detach()), 4), "step_s": round(time.monotonic() - began, 2)}

    def _losses(self, batch: Batch, captions: bool) -> tuple[Tensor, dict[str, Any]]:
        seen = video_tokens(self.model, batch)
        labelled = batch.cells["colour"].shape[1]
        read = [self.heads["vision"](level[:, :labelled], batch.cells) for level in seen.levels]
        cell_loss = torch.stack([loss for loss, _ in read]).mean()
        line: dict[str, Any] = {"cells": {k: round(v, 3) for k, v in read[-1][1].items()}}
        if not captions:
            return cell_loss, line
        ratio = 0.0
        if self.plan.role == "draft":
            ratio = PRUNE_RATIOS[self.progress.step % len(PRUNE_RATIOS)]
        rows, count = seen.tokens.shape[:2]
        keep = kept_tokens(rows, count, ratio, self.progress.step)
        logits = caption_logits(self.model, batch, seen, keep)
        loss = self._caption_loss(batch, logits)
        line |= accuracies(batch, logits) | {"prune": ratio, "caption_loss": round(float(loss.detach()), 4)}
        total = loss + self.plan.cell_weight * cell_loss
        if "text" in self.heads and self._middle is not None:
            spots = video_spots(self.model, batch)[:labelled]
            middle_loss, right = self.heads["text"](self._middle[:, spots], batch.cells)
            line["text_cells"] = {k: round(v, 3) for k, v in right.items()}
            total = total + self.plan.cell_weight * middle_loss
        return total, line

    def _caption_loss(self, batch: Batch, logits: Tensor) -> Tensor:
        weights = batch.weights.flatten()
        losses = functional.cross_entropy(logits.flatten(0, 1), batch.caption_ids.flatten(), reduction="none")
        return (losses * weights).sum() / weights.sum()


def load_model(folder: Path) -> PreTrainedModel:
    """A checkpoint as stock classes load it, in float32 for the CPU."""
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    ready: PreTrainedModel = model.eval()
    return ready


def video_id(model: PreTrainedModel) -> int:
    """Token id of a video token in the prompt."""
    return int(model.config.video_token_id)


def video_spots(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Where the video tokens are in the prompt, [V]; with text between them for Qwen3-VL."""
    return (batch.prompt_ids[0] == video_id(model)).nonzero()[:, 0]


def video_tokens(model: PreTrainedModel, batch: Batch) -> Seen:
    """What the vision tower makes of the clips."""
    made = model.model.get_video_features(**batch.pixels, return_dict=True)
    if "video_grid_thw" not in batch.pixels:
        return Seen(made.pooler_output, [])
    deep = getattr(made, "deepstack_features", None) or []
    return Seen(torch.stack(list(made.pooler_output)), [torch.stack(list(level)) for level in deep])


def fewer_layers(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The text model's weights in `state`, with only so many of its layers, evenly spread."""
    text = {k: v for k, v in state.items() if "language_model" in k or "lm_head" in k}
    numbered = re.compile(r"\.layers\.(\d+)\.")
    found = {int(hit.group(1)) for hit in map(numbered.search, text) if hit}
    step = max(1, len(found) // layers)
    for index in sorted(found):
        own = {k: text.pop(k) for k in [*text] if f".layers.{index}." in k}
        if index % step == 0:
            text |= {k.replace(f".layers.{index}.", f".layers.{index // step}."): v for k, v in own.items()}
    return text


def kept_tokens(rows: int, count: int, ratio: float, seed: int) -> Tensor | None:
    """Video tokens a pruned draft sees, [B, kept], or None for all; every second time evenly spread."""
    if ratio == 0:
        return None
    kept = max(1, round(count * (1 - ratio)))
    generator = torch.Generator().manual_seed(seed)
    if seed % 2:
        return torch.rand(rows, count, generator=generator).argsort(1)[:, :kept].sort(1).values
    return torch.linspace(0, count - 1, kept).round().long().expand(rows, kept)


def caption_logits(model: PreTrainedModel, batch: Batch, seen: Seen, keep: Tensor | None) -> Tensor:
    """Logits of every caption token, [B, C, vocabulary], with only the kept video tokens in the prompt.

    A token that goes takes its rows of all features with it. Those that stay keep their positions, and so does
    the text between them.
    """
    rows, length = batch.caption_ids.shape
    ids = torch.cat([batch.prompt_ids.expand(rows, -1), batch.caption_ids[:, :-1]], dim=1)
    spots = video_spots(model, batch)
    sequence = model.get_input_embeddings()(ids).index_copy(1, spots, seen.tokens)
    positions = position_ids(model, batch, ids.shape[1])[..., 0, :]
    visual = torch.zeros_like(ids, dtype=torch.bool).index_fill(1, spots, True)
    deep = seen.deep
    if keep is None:
        positions = positions[..., None, :].expand(*positions.shape[:-1], rows, -1)
    else:
        stays = (~visual).scatter(1, spots[keep], True)
        index = stays.nonzero()[:, 1].view(rows, -1)
        sequence, deep = _rows(sequence, index), [_rows(level, keep) for level in deep]
        positions, visual = positions[..., index], visual.gather(1, index)
    hidden = model.model.language_model(
        inputs_embeds=sequence, position_ids=positions, use_cache=False, **_extras(deep, visual)
    ).last_hidden_state
    logits: Tensor = model.lm_head(hidden[:, -length:])
    return logits


def _rows(features: Tensor, index: Tensor) -> Tensor:
    return features.gather(1, index[..., None].expand(-1, -1, features.shape[-1]))


def _extras(deep: list[Tensor], visual: Tensor) -> dict[str, Any]:
    """What else a text model takes: no mask but the causal one, and what DeepStack adds at visual positions."""
    if not deep:
        return {"attention_mask": {"full_attention": None}}
    return {
        "attention_mask": None,
        "visual_pos_masks": visual,
        "deepstack_visual_embeds": [level.flatten(0, 1) for level in deep],
    }


def position_ids(model: PreTrainedModel, batch: Batch, length: int) -> Tensor:
    """Positions of one row: [3, 1, S] for M-RoPE, else [1, S]."""
    if "video_grid_thw" not in batch.pixels:
        return torch.arange(length)[None]
    ids = torch.zeros(1, length, dtype=torch.long)
    ids[0, : batch.prompt_ids.shape[1]] = batch.prompt_ids[0]
    kinds = (ids == video_id(model)).int() * 2
    grid = batch.pixels["video_grid_thw"][:1]
    seconds = torch.tensor([batch.seconds_per_grid])
    found, _ = model.model.get_rope_index(ids, kinds, video_grid_thw=grid, second_per_grid_ts=seconds)
    positions: Tensor = found
    return positions


def accuracies(batch: Batch, logits: Tensor) -> dict[str, float]:
    """Share of right tokens among those that carry facts and among all, with the true caption before them."""
    right = logits.detach().argmax(-1) == batch.caption_ids
    facts, told = batch.weights > 1, batch.weights > 0
    return {
        "fact_tokens": round(float(right[facts].float().mean()), 4),
        "tokens": round(float(right[told].float().mean()), 4),
        "captions": round(float((right | ~told).all(1).float().mean()), 3),
    }


def _clock_s() -> float:
    return time.process_time() / torch.get_num_threads()


def _optimizers(model: PreTrainedModel, heads: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for all else."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and not any(w in name for w in ("embed", "lm_head"))
        (matrices if inner else rest).append(parameter)
    groups = [{"params": some, "weight_decay": 0.0} for some in (rest, list(heads.parameters()))]
    made: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-9),
    ]
    for optimizer in made:
        for group in optimizer.param_groups:
            group["base_rate"] = rate
    return made


def _windows(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention inside each window, all windows of one length at once instead of one by one."""
    lengths = kwargs["cu_seq_lens_q"].diff()
    if bool((lengths == lengths[0]).all()):
        sizes = (query.shape[1], len(lengths), -1, query.shape[-1])
        split = [t[0].reshape(sizes).transpose(0, 1) for t in (query, key, value)]
        same = functional.scaled_dot_product_attention(split[0], split[1], split[2], scale=kwargs["scaling"])
        return same.transpose(1, 2).flatten(0, 1)[None], None
    starts = kwargs["cu_seq_lens_q"][:-1]
    out = torch.empty_like(query)
    for length in lengths.unique().tolist():
        index = starts[lengths == length][:, None] + torch.arange(length)
        parts = [t[0][:, index].transpose(0, 1) for t in (query, key, value)]
        done = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], scale=kwargs["scaling"])
        out[0, :, index.flatten()] = done.transpose(0, 1).flatten(1, 2)
    return out.transpose(1, 2), None


def _use_fast_windows(model: PreTrainedModel) -> None:
    if hasattr(model.model, "visual"):
        AttentionInterface.register(_WINDOWS, _windows)
        model.model.visual.config._attn_implementation = _WINDOWS


def _arguments(argv: list[str] | None) -> Iterator[Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=get_args(Family), required=True)
    parser.add_argument("--role", choices=("target", "draft"), required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--batch-size", type=int, default=Plan.batch_size)
    parser.add_argument("--learning-rate", type=float, default=Plan.learning_rate)
    parser.add_argument("--vision-share", type=float, default=Plan.vision_share)
    parser.add_argument("--deepen-at", type=float, default=Plan.deepen_at)
    parser.add_argument(
        "--start", default="", help="shallow.pt or checkpoint folder whose text model starts this one"
    )
    parser.add_argument(
        "--extend", default="", help="checkpoint folder of the same family and role to continue with"
    )
    parser.add_argument(
        "--layers", type=int, default=0, help="text layers; with --extend, new layers add nothing at first"
    )
    parser.add_argument(
        "--frames",
        type=int,
        nargs="+",
        default=[FRAMES],
        help="frames of a clip; each batch draws one number",
    )
    parser.add_argument("--threads", type=int, default=2)
    found = vars(parser.parse_args(argv))
    torch.set_num_threads(found.pop("threads"))
    yield found.pop("work")
    yield Plan(**found)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    work, plan = _arguments(argv)
    Trainer(plan, work).run()


if __name__ == "__main__":
    main()
