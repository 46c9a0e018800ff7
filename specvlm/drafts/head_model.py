"""The weights of a trained head: one decoder layer of the target's own kind, the join before it, the compressor.

EAGLE (arXiv 2401.15077) and EAGLE-2 (arXiv 2406.16858) draft in the target's feature space; SpecVLM (arXiv
2509.11815, section 3.1) adds a normalisation of the inputs, against overflow, and a compressor of video tokens. Only
what is trained is here and in a head's folder: embeddings and LM head stay the target's own, frozen.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from specvlm.attention import ATTENTION
from specvlm.drafts.compressor import Compressed, Compressor, CompressorConfig, VideoPairs, stretches
from specvlm.drafts.kinds import HEAD_TYPE
from specvlm.durable import write_whole
from specvlm.errors import IncompatibleDraftError, ModelLoadError
from specvlm.files import read_text
from specvlm.model import TextModel, VideoLM

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_FORMAT = 1
# Of a target's text config, for the one layer of its kind that a head has.
_DROPPED = ("vocab_size", "num_hidden_layers", "layer_types", "max_window_layers", "pad_token_id")


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """What a head was made for, and how it is built.

    Attributes:
        target: Name of its target.
        target_revision: The target's commit, or fingerprint of all files where it is a folder; None: not known.
        family: Of its target, as `model_type` in config.json.
        hidden_size: Width of the target's hidden states.
        layer: Whose outputs it reads: -1, the last one's, behind the norm. This version reads no other.
        compressor: In front of its prefill.
        training: How it was trained, for the record.
        target_fingerprint: Hash of the target's weights and config.json, whatever its name; None: not known, as in
            heads of early versions, which are compared by `target_revision`.
    """

    target: str
    target_revision: str | None
    family: str
    hidden_size: int
    layer: int = -1
    compressor: CompressorConfig = field(default_factory=CompressorConfig)
    training: Mapping[str, Any] = field(default_factory=dict)
    target_fingerprint: str | None = None

    def __post_init__(self) -> None:
        if self.layer != -1:
            raise ValueError(
                f"it reads layer {self.layer!r} of its target, this version reads the last one, -1, only"
            )

    def as_json(self) -> dict[str, Any]:
        """For config.json."""
        return {"model_type": HEAD_TYPE, "format": _FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> HeadConfig:
        """What `as_json` gave.

        Raises:
            KeyError, TypeError, ValueError: It is something else.
        """
        if found["model_type"] != HEAD_TYPE or found["format"] != _FORMAT:
            raise ValueError(f"its format is {found['format']!r}, not {_FORMAT}")
        known = {
            f.name: found[f.name] for f in fields(cls) if f.name in found or f.name != "target_fingerprint"
        }
        compressor = dict(known["compressor"])
        compressor["operators"] = tuple(compressor["operators"])
        known["compressor"] = CompressorConfig(**compressor)
        if not isinstance(known["hidden_size"], int):
            raise ValueError(f"its hidden_size is {known['hidden_size']!r}")
        return cls(**known)


def _one_layer(target: VideoLM) -> Any:
    """A fresh text model of the target's own class with one layer, no embeddings and no last norm."""
    config = copy.deepcopy(target.text.config)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 1, None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[-1:]
    config._attn_implementation = ATTENTION
    text = type(target.text)(config)
    text.embed_tokens, text.norm = None, nn.Identity()
    return text


class Shown(NamedTuple):
    """What a target shows a head of one video: its prompt, and perhaps what it wrote behind it."""

    features: torch.Tensor  # [1, n, hidden], the target's
    following: torch.Tensor  # [1, n, hidden], the embeddings of the tokens that follow
    positions: torch.Tensor  # int64 [P, n]
    video: torch.Tensor  # int64 [V], where the video tokens stand, ascending
    prompt_tokens: int  # S, at most n
    scores: torch.Tensor  # float32 [V], the target's attention to each


class PairSequence(NamedTuple):
    """The pairs of `Shown` as a head reads them, those of the video compressed."""

    pairs: torch.Tensor  # [1, m, hidden]
    positions: torch.Tensor  # int64 [P, m]
    video: Compressed
    video_at: torch.Tensor  # int64 [kept] on the CPU, where the compressed ones are


def _in_place(
    made: Compressed,
    pairs: torch.Tensor,
    positions: torch.Tensor,
    video_at: torch.Tensor,
    firsts: torch.Tensor,
) -> PairSequence:
    """Put compressed pairs in place of the video's, stretch by stretch, which begin at `firsts`; text stays."""
    is_text = torch.ones(pairs.shape[1], dtype=torch.bool)
    is_text[video_at] = False
    text_at = is_text.nonzero().squeeze(1)
    order = torch.cat((text_at, firsts.repeat_interleave(torch.tensor(made.stretches)))).argsort(stable=True)
    return PairSequence(
        torch.cat((pairs[:, text_at], made.inputs), dim=1)[:, order],
        torch.cat((positions[:, text_at], made.positions), dim=1)[:, order],
        made,
        (order >= len(text_at)).nonzero().squeeze(1),
    )


class HeadModel(nn.Module):
    """What is trained of a head.

    A pair, its input at position i, is the target's feature of token i and the embedding of token i + 1; its output
    there is a guess at the target's feature of token i + 1, which the target's LM head turns into logits.
    """

    def __init__(self, target: VideoLM, config: HeadConfig) -> None:
        """Fresh weights, from torch's global seed; see `fresh`."""
        super().__init__()
        hidden = config.hidden_size
        self.config = config
        eps = getattr(target.text.config, "rms_norm_eps", 1e-6)
        self.feature_norm = nn.RMSNorm(hidden, eps=eps)
        self.embed_norm = nn.RMSNorm(hidden, eps=eps)
        self.join = nn.Linear(2 * hidden, hidden)
        self.text = _one_layer(target)
        self.compressor = Compressor(config.compressor, hidden)

    @classmethod
    def fresh(cls, target: VideoLM, config: HeadConfig, seed: int) -> HeadModel:
        """An untrained head in float32, on the CPU; its layer begins as the target's last one.

        Raises:
            IncompatibleDraftError: The target's weights are quantised.
        """
        if getattr(target.model, "hf_quantizer", None) is not None:
            raise IncompatibleDraftError(
                f"{target.model.name_or_path}: a head cannot be trained for quantised weights; train it for the "
                "checkpoint that they were made from, and use it with that"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = cls(target, config)
        last = target.text.layers[-1].state_dict()
        head.text.layers[0].load_state_dict({name: value.float().cpu() for name, value in last.items()})
        return head.float()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> HeadModel:
        """Move or cast. The rotary frequencies stay float32, as in a checkpoint that was loaded in another format."""
        rotary = self.text.rotary_emb
        frequencies = dict(rotary.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, frequency in frequencies.items():
            setattr(rotary, name, frequency.to(self.device))
        return self

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.join.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.join.weight.dtype

    def pairs(self, features: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """Features [B, n, hidden] and the embeddings of the tokens that follow [B, n, hidden] -> pairs."""
        joined = torch.cat((self.feature_norm(features), self.embed_norm(embeds)), dim=-1)
        return self.join(joined)  # type: ignore[no-any-return]

    def sequence(self, shown: Shown, generator: torch.Generator) -> PairSequence:
        """Join pairs and compress those of the video; `generator`, on the CPU, is for what draws lots."""
        pairs = self.pairs(shown.features, shown.following)
        video_at = shown.video.cpu()
        question = shown.features[0, int(video_at[-1]) + 1 : shown.prompt_tokens].mean(dim=0)
        video = VideoPairs(
            pairs[:, video_at], shown.positions[:, video_at], shown.scores, question, stretches(video_at)
        )
        made: Compressed = self.compressor(video, generator)
        firsts = video_at[[0, *itertools.accumulate(video.stretches[:-1])]]
        return _in_place(made, pairs, shown.positions, video_at, firsts)

    def text_model(self, position_rows: int) -> TextModel:
        """Its layer over slabs."""
        return TextModel(self, self.text, position_rows, self.dtype)

    def save(self, folder: Path, config: HeadConfig | None = None) -> None:
        """Write the head into a folder: weights, then the config, each in one stroke and durably.

        `config`: with facts about its training; None: its own.
        """
        folder.mkdir(parents=True, exist_ok=True)
        told = json.dumps((config or self.config).as_json(), indent=1, sort_keys=True) + "\n"
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        write_whole(folder / WEIGHTS, save(weights, metadata={"format": "pt"}))
        write_whole(folder / CONFIG, told.encode())

    @classmethod
    def load(cls, folder: Path, target: VideoLM, dtype: torch.dtype | None = None) -> HeadModel:
        """Read a head's folder, for a target that was loaded.

        Args:
            folder: As `save` left it.
            target: The model it is to guess for.
            dtype: Of its weights; None: the target's.

        Returns:
            The head on the target's device, ready to guess.

        Raises:
            ModelLoadError: The folder is damaged.
            IncompatibleDraftError: The head was made for a target of other shapes.
        """
        config = read_config(folder)
        check_shapes(folder, config, target)
        try:
            with torch.random.fork_rng(devices=[]):
                head = cls(target, config)
            weights = load_file(folder / WEIGHTS)
            _check_weights(weights, head.state_dict())
            head.load_state_dict(weights)
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
            raise ModelLoadError(
                f"{folder}: cannot load the head's weights ({reason}); train it again"
            ) from error
        return head.to(target.device, target.dtype if dtype is None else dtype).eval().requires_grad_(False)


def _check_weights(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """What `load_state_dict` says in many lines, in one."""
    for name in sorted(found.keys() ^ expected.keys()):
        raise ValueError(f"{name} is missing" if name in expected else f"{name} is none of this head")
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise ValueError(f"{name} is of shape {tuple(found[name].shape)}, not {tuple(value.shape)}")


def read_config(folder: Path) -> HeadConfig:
    """The config in a head's folder.

    Raises:
        ModelLoadError: It is not there, or not what this version writes.
    """
    try:
        return HeadConfig.from_json(json.loads(read_text(folder / CONFIG)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelLoadError(
            f"{folder}: cannot read the head's config.json ({reason}); train it again"
        ) from error


def check_shapes(folder: Path, config: HeadConfig, target: VideoLM) -> None:
    """Refuse a target whose features are others than those the head was made for.

    Raises:
        IncompatibleDraftError: They are.
    """
    here: dict[str, Any] = {"family": target.family.name, "hidden size": target.hidden_size}
    there: dict[str, Any] = {"family": config.family, "hidden size": config.hidden_size}
    for name, value in here.items():
        if there[name] != value:
            raise IncompatibleDraftError(
                f"{folder}: this head was made for {config.target} ({name} {there[name]}), the target's is {value}; "
                "use it with its own target, or train another"
            )
