"""Target + draft -> a ready captioner: families, dtype, devices, and the checks that a draft fits its target.

Only safetensors are read, and no remote code is run unless asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils.hub import cached_file, extract_commit_hash

from specvlm import checkpoint
from specvlm.attention import ATTENTION, register_attention
from specvlm.captioner import Captioner, ModelInfo
from specvlm.config import FrameSettings, ModelSettings, of_type, one_of
from specvlm.drafts.base import Draft
from specvlm.drafts.head import HeadDraft
from specvlm.drafts.head_model import HeadModel, read_config
from specvlm.drafts.kept_tokens import Choosing, DraftVocab, choose_ids
from specvlm.drafts.kinds import has_head_weights, is_head
from specvlm.drafts.small_model import SmallModelDraft
from specvlm.errors import ConfigError, IncompatibleDraftError, ModelLoadError, PromptError, SpecvlmError
from specvlm.families import family_of
from specvlm.model import VideoLM
from specvlm.packaged import local_name
from specvlm.preset import DEFAULT_PROMPT, find_preset, presets
from specvlm.sampling import id_list
from specvlm.stats import device_words

_ADVICE = (
    "give a folder with safetensors, a hub id that this machine can reach, or a preset (see specvlm presets)"
)
_COMMIT = re.compile("[0-9a-f]{40}")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Source(NamedTuple):
    """Where a checkpoint comes from, in the words of `from_pretrained`."""

    name: str
    revision: str | None
    local_files_only: bool
    trust_remote_code: bool

    def options(self) -> dict[str, Any]:
        """Keywords for `from_pretrained`."""
        return {
            "revision": self.revision,
            "local_files_only": self.local_files_only,
            "trust_remote_code": self.trust_remote_code,
        }


class _Loaded(NamedTuple):
    model: VideoLM
    processor: Any
    revision: str | None


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    more = f" {lines[1].strip()}" if lines[0].endswith(":") and len(lines) > 1 else ""
    return (lines[0] + more).rstrip(".")


def _guarded(source: _Source, what: str, loader: Any, **options: Any) -> Any:
    """Call a `from_pretrained`; whatever it raises becomes one line."""
    with _explained(source.name, what):
        return loader(source.name, **source.options(), **options)


@contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    """Name the checkpoint in whatever a block raises: values of wrong types in its files fail in many ways.

    Raises:
        ModelLoadError: The block raised an error that is not one of this library.
    """
    try:
        yield
    except SpecvlmError:
        raise
    except Exception as error:
        raise ModelLoadError(f"{name}: cannot load {what} ({_one_line(error)}); {_ADVICE}") from error


def _refuse_misspelt(name: str) -> None:
    """Hub ids have an owner and a slash; what has none, and is no folder, was meant to be a preset."""
    checkpoint.refuse_gguf(name)
    if Path(name).is_file():
        raise ModelLoadError(f"{name}: a file; give the folder of the checkpoint that it belongs to")
    if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
        raise ModelLoadError(f"{name}: no such folder; give the folder of a checkpoint, a hub id or a preset")
    if "/" not in name and not Path(name).is_dir():
        known = ", ".join(preset.name for preset in presets())
        raise ModelLoadError(f"{name}: no such preset or folder; give one of {known}, a folder, or a hub id")


def _file(source: _Source, name: str) -> Path | None:
    """A small file of a checkpoint, downloaded if it is on the hub; None: it has none, or the hub is out of reach."""
    if Path(source.name).is_dir():
        file = Path(source.name) / name
        return file if file.is_file() else None
    try:
        found = cached_file(
            source.name,
            name,
            revision=source.revision,
            local_files_only=source.local_files_only,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
            _commit_hash=source.revision if _COMMIT.fullmatch(source.revision or "") else None,
        )
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{source.name}: cannot load {name} ({_one_line(error)}); {_ADVICE}") from error
    return None if found is None else Path(found)


def _source(models: ModelSettings, name: str, revision: str | None) -> _Source:
    return _Source(name, revision, models.local_files_only, models.trust_remote_code)


def _pinned(source: _Source) -> _Source:
    """The same at the commit that its revision names now: all files are of one, and cached ones need no network."""
    config = None if Path(source.name).is_dir() else _file(source, "config.json")
    commit = None if config is None else extract_commit_hash(str(config), None)
    return source if commit is None else source._replace(revision=commit)


def _refuse_unsupported(source: _Source) -> None:
    """Refuse what is no model, or one whose format is not supported, before `transformers` looks at it."""
    if Path(source.name).is_dir():
        checkpoint.refuse_folder(Path(source.name))
        return
    if (config := _file(source, "config.json")) is not None:
        checkpoint.refuse_config(source.name, checkpoint.read_json(config))
    if (adapter := _file(source, "adapter_config.json")) is not None:
        checkpoint.refuse_adapter(source.name, adapter)


def _refuse_files(source: _Source) -> None:
    """Refuse files that `transformers` would load wrongly and without a word."""
    if Path(source.name).is_dir():
        checkpoint.refuse_files(Path(source.name))
    _refuse_elsewhere(source)


def _refuse_elsewhere(source: _Source) -> None:
    for name in checkpoint.PROCESSOR_CONFIGS:
        if (file := _file(source, name)) is not None:
            checkpoint.refuse_elsewhere(file)


def _revision(source: _Source) -> str | None:
    """The hash of a local folder's files; of a hub model the commit that it is pinned to."""
    if Path(source.name).is_dir():
        return checkpoint.fingerprint(Path(source.name))
    return source.revision if _COMMIT.fullmatch(source.revision or "") else None


def _load_one(source: _Source, dtype: torch.dtype | str, device_map: Any) -> _Loaded:
    """Load one checkpoint with this library's attention in its text model and stock sdpa in its vision tower."""
    source = _pinned(source)
    _refuse_unsupported(source)
    config = _guarded(source, "its config", AutoConfig.from_pretrained)
    family = family_of(config, source.name)
    _refuse_files(source)
    processor = _guarded(source, "its processor", AutoProcessor.from_pretrained)
    model, report = _guarded(
        source,
        "its weights",
        AutoModelForImageTextToText.from_pretrained,
        dtype=dtype,
        device_map=device_map,
        use_safetensors=True,
        attn_implementation={"": "sdpa", "text_config": ATTENTION, "vision_config": "sdpa"},
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the report, by name
    )
    _refuse_gaps(source.name, report)
    model.eval().requires_grad_(False)
    with _explained(source.name, "its model"):
        loaded = _Loaded(VideoLM(model, family), processor, _revision(source))
        _refuse_tokens(source.name, loaded)
    return loaded


def _refuse_gaps(name: str, report: Mapping[str, Any]) -> None:
    """Refuse weights that `transformers` would fill with random numbers; tied ones and those of buffers are not."""
    for tensor, found, expected in sorted(report["mismatched_keys"]):
        raise ModelLoadError(
            f"{name}: its weight {tensor} has shape {tuple(found)}, its config.json needs {tuple(expected)}; "
            "download the checkpoint again, or save it with the config that it was trained with"
        )
    if missing := sorted(report["missing_keys"]):
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelLoadError(
            f"{name}: has no weight {missing[0]}{others}, which its architecture needs; download the checkpoint "
            "again, or save it whole"
        )


def _refuse_tokens(name: str, loaded: _Loaded) -> None:
    """Refuse a tokenizer that reads nothing, or a video token that is not the model's."""
    model, tokenizer = loaded.model, getattr(loaded.processor, "tokenizer", None)
    if tokenizer is None or not tokenizer("video")["input_ids"]:
        raise ModelLoadError(
            f"{name}: has no tokenizer; copy tokenizer.json and tokenizer_config.json from the original checkpoint"
        )
    token = model.family.video_token(loaded.processor)
    here = tokenizer.get_vocab().get(token)
    there = getattr(model.model.config, "video_token_id", None)
    rows = model.embedded_tokens
    if here is None or here >= rows or here != there:
        raise ModelLoadError(
            f"{name}: its tokenizer has the video token {token} as id {here}, its config.json as {there}, and the "
            f"model has ids 0 to {rows - 1}; use the tokenizer and config of the original checkpoint"
        )


def _refuse_template(name: str, target: _Loaded) -> None:
    """Refuse a target whose chat template asks about no video, or with tokens that the model does not have."""
    try:
        with _explained(name, "its chat template"):
            ids = target.model.family.template_ids(target.processor)
    except PromptError as error:
        raise ModelLoadError(f"{name}: {error}") from error
    if max(ids) >= target.model.embedded_tokens:
        raise ModelLoadError(
            f"{name}: its chat template uses token id {max(ids)}, and the model has ids 0 to "
            f"{target.model.embedded_tokens - 1}; use the tokenizer of the original checkpoint"
        )


def _check_tokenizers(target: _Loaded, draft: _Loaded, target_name: str, draft_name: str) -> None:
    ours, theirs = (one.processor.tokenizer.get_vocab() for one in (target, draft))
    if ours == theirs:
        return
    token = min((ours.items() ^ theirs.items()), key=lambda item: item[1])[0]
    raise IncompatibleDraftError(
        f"{draft_name}: its tokenizer differs from that of {target_name} "
        f"(token {token!r} is {theirs.get(token)} there, {ours.get(token)} here); "
        "use a draft of the same family and tokenizer"
    )


def _check_draft(target: _Loaded, draft: _Loaded, target_name: str, draft_name: str) -> None:
    """Refuse a draft that would guess other tokens or see other video tokens than the target."""
    ours, theirs = target.model.family, draft.model.family
    if ours.prompts_like != theirs.prompts_like:
        raise IncompatibleDraftError(
            f"{draft_name}: its family is {theirs.name}, that of {target_name} is {ours.name}; "
            "use a draft of the same family"
        )
    _check_tokenizers(target, draft, target_name, draft_name)
    here = ours.geometry(target.model.model, target.processor)
    there = theirs.geometry(draft.model.model, draft.processor)
    for key, value in here.items():
        if there[key] != value:
            raise IncompatibleDraftError(
                f"{draft_name}: its {key} is {there[key]}, that of {target_name} is {value}; "
                "use a draft that sees the same video tokens"
            )


def _default_device() -> str:
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def _dtype(name: str, device: str) -> torch.dtype | str:
    """`auto` is the checkpoint's own on GPUs and float32 on the CPU."""
    if name == "auto":
        return torch.float32 if device == "cpu" else "auto"
    one_of("dtype", name, ("auto", *DTYPES))
    return DTYPES[name]


def load(
    target: str | os.PathLike[str],
    *,
    draft: str | os.PathLike[str] | None = None,
    draft_vocab: DraftVocab | None = None,
    revision: str | None = None,
    draft_revision: str | None = None,
    dtype: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
) -> Captioner:
    """Load a target and its draft.

    Args:
        target: A preset's name (see `presets`), a hub id, or a folder.
        draft: A hub id or a folder; "none" for no draft; None takes the preset's own, or none.
        draft_vocab: What the draft may guess: so many tokens, the first ones of the tokenizer; those that given texts
            use most (`MostUsed`); these token ids; or the path of a file that `specvlm vocab` wrote. Ends of sequence
            are always among them. None: every token. It changes the speed of a caption, never its text.
        revision: Branch, tag or commit of a hub target.
        draft_revision: The same for the draft.
        dtype: "auto" (the checkpoint's own on GPUs, float32 on the CPU), "float32", "bfloat16" or "float16".
        device_map: As accelerate takes it, for the target; the draft goes where the target's logits come out.
            None puts both on the first GPU, or on the CPU.
        local_files_only: Never ask the hub.
        trust_remote_code: Run code from the checkpoint; off.

    Raises:
        ConfigError: A setting is unknown, the draft's vocabulary is not one of this tokenizer, or a checkpoint
            names files outside its folder.
        ModelLoadError: A checkpoint is not there, incomplete, of a format that is not supported, or without a
            tokenizer or chat template.
        UnknownFamilyError: The architecture is not supported.
        IncompatibleDraftError: The draft does not fit the target.
    """
    of_type("target", target, (str, os.PathLike), "give a preset's name, a hub id or a folder")
    of_type("draft", draft, (str, os.PathLike, type(None)), 'give a hub id, a folder, "none" or None')
    for name, given in (("revision", revision), ("draft_revision", draft_revision)):
        of_type(name, given, (str, type(None)), "give a branch, tag or commit")
    of_type("device_map", device_map, (str, dict, type(None)), 'give a device, e.g. "cuda:1", or "auto"')
    models = ModelSettings(
        os.fspath(target),
        None if draft is None else os.fspath(draft),
        draft_vocab,
        revision,
        draft_revision,
        dtype,
        device_map,
        local_files_only,
        trust_remote_code,
    )
    return load_models(models)


def load_models(models: ModelSettings) -> Captioner:
    """Load a target and its draft; settings and errors are those of `load`."""
    register_attention()
    target, draft = models.target, models.draft
    preset = find_preset(target)
    if preset is not None:
        target, draft = preset.target, draft or preset.draft
    target = local_name(target)
    draft_name = None if draft is None or draft == "none" else local_name(draft)
    for name in filter(None, (target, draft_name)):
        _refuse_misspelt(name)
    if is_head(target):
        raise ModelLoadError(
            f"{target}: a trained head is no target; give it as the draft of the model that it was made for"
        )
    if models.draft_vocab is not None and draft_name is None:
        raise ConfigError("draft_vocab has no effect without a draft; give one, or leave it out")
    device = _default_device()
    kind = _dtype(models.dtype, device)
    source = _source(models, target, models.revision)
    loaded = _load_one(source, kind, {"": device} if models.device_map is None else models.device_map)
    _refuse_template(target, loaded)
    guess, guess_revision = None, None
    if draft_name is not None:
        source = _source(models, draft_name, models.draft_revision)
        guess, guess_revision = _load_draft(loaded, target, source, models.draft_vocab)
    family = loaded.model.family
    info = ModelInfo(
        target=target,
        target_revision=loaded.revision,
        draft=draft_name,
        draft_revision=guess_revision,
        family=family.name,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        device=device_words(loaded.model.device),
        transformers_version=transformers.__version__,
        processor_options=family.processor_options(loaded.processor),
        warnings=_warnings(target, loaded.model.model),
    )
    if preset is None:
        return _ready(loaded, guess, info, FrameSettings(), DEFAULT_PROMPT)
    return _ready(loaded, guess, info, preset.frames, preset.prompt)


def with_draft(captioner: Captioner, models: ModelSettings) -> Captioner:
    """Another captioner with the same loaded target and the draft of `models`; only the draft is loaded.

    Errors are those of `load`.
    """
    assert models.draft is not None
    draft = local_name(models.draft)
    _refuse_misspelt(draft)
    info = captioner.info
    target = _Loaded(captioner.target, captioner.processor, info.target_revision)
    source = _source(models, draft, models.draft_revision)
    guess, revision = _load_draft(target, info.target, source, models.draft_vocab)
    info = replace(info, draft=draft, draft_revision=revision)
    return _ready(target, guess, info, captioner.frames, captioner.prompt)


def _warnings(name: str, model: Any) -> tuple[str, ...]:
    """Why captions may not be those of stock `generate()`."""
    quantiser: Any = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    threshold = getattr(quantiser, "llm_int8_threshold", 0.0)
    if not getattr(quantiser, "load_in_8bit", False) or not threshold:
        return ()
    warning = (
        f"{name}: bitsandbytes 8 bit chooses outliers among all tokens of a pass (llm_int8_threshold {threshold:g}), "
        "so some captions differ from stock generate(); where they must not, use 4 bit, threshold 0 or torchao"
    )
    return (warning,)


def _ready(
    target: _Loaded, draft: Draft | None, info: ModelInfo, frames: FrameSettings, prompt: str
) -> Captioner:
    return Captioner(target.model, target.processor, draft, info, frames, prompt)


def load_tokenizer(models: ModelSettings) -> Any:
    """Load the tokenizer of a target as captioning has it; errors are those of `load`."""
    preset = find_preset(models.target)
    target = local_name(models.target if preset is None else preset.target)
    _refuse_misspelt(target)
    source = _source(models, target, models.revision)
    _refuse_elsewhere(source)
    return _guarded(source, "its processor", AutoProcessor.from_pretrained).tokenizer


def _load_draft(
    target: _Loaded, target_name: str, source: _Source, draft_vocab: DraftVocab | None
) -> tuple[Draft, str | None]:
    """A draft for a target, and its revision."""
    if is_head(source.name) or has_head_weights(source.name):
        return _load_head(target, target_name, Path(source.name), draft_vocab)
    small = _load_one(source, target.model.dtype, {"": target.model.device})
    _check_draft(target, small, target_name, source.name)
    # Padded vocabularies differ between sizes of one family; only what both have is guessed.
    width = min(target.model.vocabulary, small.model.vocabulary)
    return SmallModelDraft(small.model, width, _guessable(target, width, draft_vocab)), small.revision


def _guessable(target: _Loaded, width: int, draft_vocab: DraftVocab | None) -> Sequence[int] | None:
    """The tokens that a draft may guess; None: all that it shares with the target."""
    if draft_vocab is None:
        return None
    ends = id_list(target.model.model.generation_config.eos_token_id)
    return choose_ids(draft_vocab, Choosing(target.processor.tokenizer, width, ends))


def _load_head(
    target: _Loaded, target_name: str, folder: Path, draft_vocab: DraftVocab | None
) -> tuple[Draft, str | None]:
    """A trained head, of this very target."""
    config = read_config(folder)
    revisions = config.target_revision, target.revision
    if config.target_fingerprint is not None:
        revisions = config.target_fingerprint, target_fingerprint(target_name, target.revision)
    if checkpoint.can_compare(*revisions) and revisions[0] != revisions[1]:
        raise IncompatibleDraftError(
            f"{folder}: this head was made for {config.target} (content {revisions[0]}), and {target_name} has content "
            f"{revisions[1]}; use it with its own target, or train another"
        )
    head = HeadModel.load(folder, target.model)
    ids = _guessable(target, target.model.vocabulary, draft_vocab)
    return HeadDraft(head, target.model, ids), checkpoint.fingerprint(folder)


def target_fingerprint(target: str, revision: str | None) -> str | None:
    """What a trained head is made for: a hash of the weights and config.json of a target that is loaded.

    Args:
        target: Its hub id or folder.
        revision: Its commit, where it is of the hub.

    Returns:
        See `checkpoint.model_fingerprint`; it is the same for a hub model and a local copy of it. None: its files are
        not to be found.
    """
    folder = Path(local_name(target))
    if not folder.is_dir():
        config = cached_file(
            target,
            "config.json",
            revision=revision,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if config is None:
            return None
        folder = Path(config).parent
    return checkpoint.model_fingerprint(folder)
