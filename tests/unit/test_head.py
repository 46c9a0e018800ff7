"""A head at work: what it reads while it drafts is what it learned from, and its folder says what it is."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

import specvlm
from specvlm.captioner import Captioner, PreparedVideo
from specvlm.choosing import Batch, FixedTree
from specvlm.config import ModelSettings, SpeculationSettings
from specvlm.drafts import head as head_file
from specvlm.drafts.compressor import CompressorConfig
from specvlm.drafts.head import HeadDraft, _HeadProposer
from specvlm.drafts.head_model import HeadConfig, HeadModel, read_config
from specvlm.drafts.kinds import is_head
from specvlm.errors import IncompatibleDraftError, ModelLoadError, SpecvlmError
from specvlm.loading import target_fingerprint, with_draft
from specvlm.model import Lengths
from specvlm.training import objective
from specvlm.training.example import read_example
from specvlm.tree import ROOT, TreeShape, make_shape
from tests.heads import (
    FAMILIES,
    FITTED_TOKENS,
    TARGET,
    config_of,
    head_captioner,
    target_captioner,
    videos_of,
    written,
)
from tests.tiny import FamilyName, Size, processor_for, random_frames, stock_ids, tiny_lm, tiny_model

CPU = torch.device("cpu")
CHAIN = make_shape(SpeculationSettings(tree="chain", depth=4), 320, CPU)
SURE: dict[FamilyName, tuple[str, ...]] = {
    "qwen": ("none", "prune-guided", "conv", "text-only", "weighted"),
    "llava": ("none", "pool", "resampler", "concat"),
    "qwen3": ("none", "prune", "pool", "concat"),  # DeepStack, and text between the video tokens
    "qwen3-moe": ("none",),
}


class Propose(NamedTuple):
    """What a head had before it when it was asked to guess."""

    index: int
    root: torch.Tensor  # [hidden], what the root's pair gave
    levels: list[torch.Tensor]  # [hidden] each, of a chain's nodes below the root, the last one left out
    tokens: list[int]  # of those nodes


class Scheduled(FixedTree):
    """Plain rounds and chains, as listed; chains from then on."""

    def __init__(self, plain: list[bool]) -> None:
        super().__init__(CHAIN)
        self._plain = list(plain)

    def choose(self, batch: Batch) -> TreeShape:
        return ROOT if self._plain and self._plain.pop(0) else CHAIN


@pytest.fixture
def proposed(monkeypatch: pytest.MonkeyPatch) -> list[Propose]:
    """What every head is asked from now on."""
    noted: list[Propose] = []
    propose, run_level = _HeadProposer.propose, _HeadProposer._run_level

    def noting(self: _HeadProposer, shape: Any, root: torch.Tensor, index: Lengths) -> Any:
        noted.append(Propose(int(index.slots[0]), self._root[0, 0].clone(), [], []))
        return propose(self, shape, root, index)

    def noting_level(self: _HeadProposer, frontier: Any, *args: Any) -> torch.Tensor:
        hidden = run_level(self, frontier, *args)
        noted[-1].levels.append(hidden[0, 0].clone())
        noted[-1].tokens.append(int(frontier.tokens[0, 0]))
        return hidden

    monkeypatch.setattr(_HeadProposer, "propose", noting)
    monkeypatch.setattr(_HeadProposer, "_run_level", noting_level)
    return noted


class Learned(NamedTuple):
    """What training's passes give of one caption's T - 1 pairs."""

    first: torch.Tensor  # [T - 1, hidden], with the target's features
    own: list[torch.Tensor]  # pass s: [T - 1 - s, hidden], of the pairs from index s on


@torch.no_grad()
def learned(captioner: Captioner, video: PreparedVideo, tokens: tuple[int, ...], passes: int) -> Learned:
    draft = captioner.draft
    assert isinstance(draft, HeadDraft)
    example = read_example(captioner.target, video.inputs, tokens)
    count, cache = len(tokens) - 1, DynamicCache()
    sequence = objective._sequence(draft.head, example, torch.Generator().manual_seed(0))
    hidden = objective._first_pass(draft.head, sequence, cache)[:, -count:]
    found = Learned(hidden[0], [])
    for step in range(1, passes + 1):
        hidden = objective._own_pass(draft.head, example, sequence, cache, hidden[:, :-1], step)
        found.own.append(hidden[0])
    return found


def check_equal(
    captioner: Captioner, video: PreparedVideo, noted: list[Propose], caption: tuple[int, ...]
) -> None:
    """Roots, and the levels below them, as training has them for a caption that ends with the tokens guessed."""
    assert noted
    for one in noted:
        assert len(one.levels) == CHAIN.depth - 1
        found = learned(captioner, video, (*caption[: one.index + 1], *one.tokens, 0), len(one.levels))
        assert torch.allclose(one.root, found.first[one.index], atol=1e-5), one.index
        for step, level in enumerate(one.levels, start=1):
            # The pass of a step begins with pair `step`, whose root is pair 0.
            assert torch.allclose(level, found.own[step - 1][one.index], atol=1e-5), (one.index, step)


# Every kind of operator, and every family, at least once; the rest is slow.
SAMPLE = (
    ("qwen", "none"),
    ("qwen", "conv"),
    ("qwen", "weighted"),
    ("llava", "resampler"),
    ("llava", "concat"),
    ("qwen3", "prune"),
)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=[] if (family, name) in SAMPLE else pytest.mark.slow)
        for family in SURE
        for name in SURE[family]
    ],
)
def test_drafting_reads_what_training_read(family: FamilyName, name: str, proposed: list[Propose]) -> None:
    """After the prefill, after rounds, and at each level below the root."""
    captioner = head_captioner(family, name)
    video = videos_of(captioner)[1]
    tokens = written(captioner, video)
    caption = captioner.caption(video, tree="chain", depth=4, max_new_tokens=FITTED_TOKENS)
    assert proposed[0].index == 0
    assert len(proposed) == caption.stats.num_drafts
    assert len(proposed) < len(tokens) - 1  # some guesses were accepted
    check_equal(captioner, video, proposed[::4], tokens)


@pytest.mark.parametrize(
    ("family", "catch_up", "plain"),
    [
        ("qwen", 1, [False, True, True, False, True, False] * 2),
        ("qwen", 3, [True] * 7),
        ("llava", 3, [False] + [True] * 9),
        ("llava", 64, [False, True, True, False, True, False] * 2),
    ],
    ids=str,
)
def test_a_head_that_fell_behind_reads_what_it_missed(
    family: FamilyName,
    catch_up: int,
    plain: list[bool],
    proposed: list[Propose],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_file, "CATCH_UP", catch_up)
    captioner = _shared(family)
    video = videos_of(captioner)[0]
    tokens = written(captioner, video)
    monkeypatch.setattr(captioner, "chooser", lambda *_: Scheduled(plain))
    assert captioner.caption(video, max_new_tokens=FITTED_TOKENS).token_ids == tokens
    check_equal(captioner, video, proposed, tokens)


_SHARED: dict[FamilyName, Captioner] = {}


def _shared(family: FamilyName) -> Captioner:
    if family not in _SHARED:
        _SHARED[family] = head_captioner(family, "pool")
    return _SHARED[family]


@pytest.mark.parametrize(
    ("family", "name"), [("qwen", "none"), ("qwen", "pool"), ("qwen", "resampler"), ("llava", "pool")]
)
def test_long_videos_keep_their_positions(family: FamilyName, name: str, proposed: list[Propose]) -> None:
    """The time row of M-RoPE runs ahead of the text; a new pair counts on from the text, in training too."""
    captioner = head_captioner(family, name)
    frames = random_frames(8, 40, 16, 16)
    video = captioner.prepare(frames._replace(times_s=frames.times_s * 6), "Hi there.")
    if family == "qwen":
        positions = captioner.target.positions(video.inputs)
        assert positions.max() > positions[0, -1]
    tokens = written(captioner, video, max_new_tokens=12)
    captioner.caption(video, tree="chain", depth=4, max_new_tokens=12)
    assert len(proposed) >= 3
    check_equal(captioner, video, proposed, tokens)


def test_a_position_that_is_one_off_shows(proposed: list[Propose], monkeypatch: pytest.MonkeyPatch) -> None:
    """So the tests above mean something."""
    captioner = _shared("qwen")
    video = videos_of(captioner)[0]
    tokens = written(captioner, video)
    real = _HeadProposer._read_written

    def shifted(self: _HeadProposer, *args: Any, **options: Any) -> torch.Tensor:
        self._position += 1
        try:
            return real(self, *args, **options)
        finally:
            self._position -= 1

    monkeypatch.setattr(_HeadProposer, "_read_written", shifted)
    captioner.caption(video, tree="chain", depth=4, max_new_tokens=FITTED_TOKENS)
    check_equal(captioner, video, proposed[:1], tokens)
    with pytest.raises(AssertionError):
        check_equal(captioner, video, proposed[1:2], tokens)


def test_frequencies_stay_float32() -> None:
    """Half a number format's digits cannot tell positions of a long video apart."""
    captioner = target_captioner("qwen")
    head = HeadModel.fresh(captioner.target, config_of(captioner.target), seed=0)
    exact = head.text.rotary_emb.inv_freq.clone()
    head.to(torch.bfloat16)
    assert head.join.weight.dtype == torch.bfloat16
    assert torch.equal(head.text.rotary_emb.inv_freq, exact)
    assert head.float().text.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(("family", "dtype"), [("qwen", "bfloat16"), ("llava", "float16")])
def test_other_number_formats_caption_too(family: FamilyName, dtype: str, folders: dict[str, Path]) -> None:
    captioner = specvlm.load(str(folders[family]), draft=str(folders[f"{family}-head"]), dtype=dtype)
    assert isinstance(captioner.draft, HeadDraft)
    assert captioner.draft.head.dtype == getattr(torch, dtype)
    video = captioner.prepare(random_frames(1), "Hi there.")
    for tree in ("static", "dynamic"):
        caption = captioner.caption(video, tree=tree, max_new_tokens=12)  # type: ignore[arg-type]
        assert caption.stats.completion_tokens == 12
        assert caption.stats.num_drafts > 0


def test_a_session_goes_on_when_a_head_asks_for_features() -> None:
    """Slabs that were made before have no room for them, and nobody reads them there."""
    captioner = target_captioner("qwen")
    session = captioner.session(random_frames(3), ["Hi there.", "What?"])
    before = [session.caption(i, max_new_tokens=12).token_ids for i in (0, 1)]
    target = captioner.target
    assert not target.keeps_features
    captioner.draft = HeadDraft(HeadModel.fresh(target, config_of(target), 0).eval(), target)
    assert target.keeps_features
    assert [session.caption(i, speculate=False, max_new_tokens=12).token_ids for i in (0, 1)] == before
    again = captioner.session(random_frames(3), ["Hi there."])
    assert again.caption(0, tree="static", max_new_tokens=12).token_ids == before[0]


def test_a_dynamic_tree_is_the_papers_where_nothing_is_said() -> None:
    draft = head_captioner("llava").draft
    assert draft is not None
    said = draft.settings(SpeculationSettings(tree="dynamic", depth=3))
    assert (said.depth, said.nodes, said.width) == (3, 60, 10)
    free = draft.settings(SpeculationSettings(tree="dynamic"))
    assert (free.depth, free.nodes, free.width) == (7, 60, 10)
    static = SpeculationSettings(tree="static")
    assert draft.settings(static) is static
    assert draft.method(free) == "specvlm-head/none/dynamic"


# Folders


FREE = {"target_revision": None, "target_fingerprint": None}  # of a head that takes any target


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Targets, and heads made for them."""
    root = tmp_path_factory.mktemp("models")
    found = {}
    for family in FAMILIES:
        found[family] = root / family
        tiny_model(family, TARGET).save_pretrained(found[family])
        processor_for(family).save_pretrained(found[family])
        captioner = specvlm.load(str(found[family]))
        config = HeadConfig(
            str(found[family]),
            captioner.info.target_revision,
            captioner.target.family.name,
            captioner.target.hidden_size,
            compressor=CompressorConfig(ratio=3.0),
            training={"steps": 3},
            target_fingerprint=target_fingerprint(str(found[family]), captioner.info.target_revision),
        )
        found[f"{family}-head"] = root / f"{family}-head"
        HeadModel.fresh(captioner.target, config, seed=3).save(found[f"{family}-head"])
    found["wide"] = root / "wide"
    tiny_model("qwen", Size(layers=3, seed=1, vocabulary=320, width=48)).save_pretrained(found["wide"])
    processor_for("qwen").save_pretrained(found["wide"])
    found["shallow"] = root / "shallow"
    tiny_model("qwen", Size(layers=2, seed=1, vocabulary=320)).save_pretrained(found["shallow"])
    processor_for("qwen").save_pretrained(found["shallow"])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_head_is_the_same_to_the_bit(family: FamilyName, folders: dict[str, Path]) -> None:
    folder = folders[f"{family}-head"]
    assert is_head(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    target = tiny_lm(family, TARGET)
    loaded = HeadModel.load(folder, target)
    fresh = HeadModel.fresh(target, loaded.config, seed=3)
    assert loaded.config == read_config(folder) == fresh.config
    assert loaded.config.training == {"steps": 3}
    assert loaded.state_dict().keys() == fresh.state_dict().keys()
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())


def test_saving_over_a_head_leaves_the_new_one(folders: dict[str, Path], tmp_path: Path) -> None:
    target = tiny_lm("qwen", TARGET)
    for seed in (1, 2):
        HeadModel.fresh(target, config_of(target), seed).save(tmp_path / "deep" / "down")
    kept = HeadModel.load(tmp_path / "deep" / "down", target).state_dict()["join.weight"]
    assert torch.equal(kept, HeadModel.fresh(target, config_of(target), 2).state_dict()["join.weight"])


def test_loading_and_making_heads_leaves_torchs_seed_alone(folders: dict[str, Path]) -> None:
    target = tiny_lm("qwen", TARGET)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    HeadModel.fresh(target, config_of(target), 2)
    HeadModel.load(folders["qwen-head"], target)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_head_is_stock(family: FamilyName, folders: dict[str, Path]) -> None:
    captioner = specvlm.load(str(folders[family]), draft=str(folders[f"{family}-head"]))
    video = captioner.prepare(random_frames(1), "Hi there.")
    stock = stock_ids(tiny_model(family, TARGET), video.inputs.tensors, 16)
    caption = captioner.caption(video, tree="dynamic", max_new_tokens=16)
    assert caption.token_ids == stock
    assert caption.stats.method == "specvlm-head/select/dynamic"
    assert captioner.info.draft_revision != captioner.info.target_revision
    assert re.fullmatch("sha256:[0-9a-f]{16}", captioner.info.draft_revision or "")
    plain = specvlm.load(str(folders[family]))
    head = ModelSettings(str(folders[family]), str(folders[f"{family}-head"]), draft_vocab=100)
    other = with_draft(plain, head)
    assert other.caption(video, tree="static", max_new_tokens=16).token_ids == stock


def refusal(error: type[SpecvlmError], target: Path | str, draft: Path | str) -> str:
    with pytest.raises(error) as caught:
        specvlm.load(str(target), draft=str(draft), local_files_only=True)
    assert type(caught.value) is error
    message = str(caught.value)
    assert "\n" not in message
    return message


def changed(folder: Path, new: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a head with another config."""
    shutil.copytree(folder, new)
    config = json.loads((new / "config.json").read_text())
    change(config)
    (new / "config.json").write_text(json.dumps(config))
    return new


def test_another_target_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    head = folders["qwen-head"]
    content = read_config(head).target_fingerprint
    said = refusal(IncompatibleDraftError, folders["shallow"], head)
    assert f"made for {folders['qwen']} (content {content}), and {folders['shallow']} has content" in said
    free = changed(head, tmp_path / "free", lambda config: config.update(FREE))
    assert specvlm.load(str(folders["qwen"]), draft=str(free)).draft is not None
    assert "hidden size 32), the target's is 48" in refusal(IncompatibleDraftError, folders["wide"], free)
    assert "family qwen2_5_vl), the target's is llava_onevision" in refusal(
        IncompatibleDraftError, folders["llava"], free
    )


def test_a_target_is_known_by_its_content(folders: dict[str, Path], tmp_path: Path) -> None:
    """Another name, tokenizer or chat template make no other target; other weights or another config do."""
    head, copy = folders["qwen-head"], tmp_path / "copy"
    shutil.copytree(folders["qwen"], copy)
    with (copy / "chat_template.jinja").open("a") as file:
        file.write("\n")
    assert specvlm.load(str(copy), draft=str(head)).draft is not None
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 123.0
    (copy / "config.json").write_text(json.dumps(config))
    assert "another" in refusal(IncompatibleDraftError, copy, head)


def test_a_head_of_an_early_version_is_known_by_the_revision(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    def age(config: dict[str, Any]) -> None:
        del config["target_fingerprint"]

    old = changed(folders["qwen-head"], tmp_path / "old", age)
    assert specvlm.load(str(folders["qwen"]), draft=str(old)).draft is not None
    assert "made for" in refusal(IncompatibleDraftError, folders["shallow"], old)


def test_a_head_that_reads_another_layer_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    assert json.loads((folders["qwen-head"] / "config.json").read_text())["layer"] == -1
    low = changed(folders["qwen-head"], tmp_path / "low", lambda config: config.update(layer=1))
    said = refusal(ModelLoadError, folders["qwen"], low)
    assert "(it reads layer 1 of its target, this version reads the last one, -1, only)" in said


BAD_CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a later format": lambda config: config.update(format=2),
    "no format": lambda config: config.pop("format"),
    "no family": lambda config: config.pop("family"),
    "no layer": lambda config: config.pop("layer"),
    "a layer in words": lambda config: config.update(layer="last"),
    "several layers": lambda config: config.update(layer=[0, 1, 2]),
    "no compressor": lambda config: config.update(compressor=None),
    "an unknown operator": lambda config: config["compressor"].update(operators=["zip", "pool"]),
    "an unknown mode": lambda config: config["compressor"].update(mode="best"),
    "an operator that is none": lambda config: config["compressor"].update(operators=[["pool"], "conv"]),
    "a mode that is none": lambda config: config["compressor"].update(mode=["select"]),
    "a ratio beyond reason": lambda config: config["compressor"].update(ratio=1e9),
    "a ratio in words": lambda config: config["compressor"].update(ratio="five"),
    "an unknown word": lambda config: config["compressor"].update(speed=1),
    "a width in words": lambda config: config.update(hidden_size="wide"),
}


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_a_config_that_says_something_else_is_refused(
    what: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    bad = changed(folders["qwen-head"], tmp_path / "bad", BAD_CONFIGS[what])
    said = refusal(ModelLoadError, folders["qwen"], bad)
    assert said.startswith(f"{bad}: cannot read the head's config.json (")


def test_damaged_folders_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(folders["qwen-head"], tmp_path / name))

    cut = copy("cut")
    with (cut / "model.safetensors").open("r+b") as stream:
        stream.truncate((cut / "model.safetensors").stat().st_size // 2)
    gone, empty, text = copy("gone"), copy("empty"), copy("text")
    (gone / "model.safetensors").unlink()
    (empty / "model.safetensors").write_bytes(b"")
    (text / "model.safetensors").write_text("no weights " * 100)
    for folder in (cut, gone, empty, text):
        said = refusal(ModelLoadError, folders["qwen"], folder)
        assert said.startswith(f"{folder}: cannot load the head's weights ("), said
    less, other = copy("less"), copy("other")
    weights = load_file(less / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "join" not in name}, less / "model.safetensors"
    )
    save_file(weights | {"join.weight": weights["join.weight"].T.contiguous()}, other / "model.safetensors")
    for folder, named in (
        (less, "(join.bias is missing)"),
        (other, "join.weight is of shape (64, 32), not (32, 64)"),
    ):
        assert named in refusal(ModelLoadError, folders["qwen"], folder)
    for missing in (copy("bare"), copy("torn")):
        (missing / "config.json").unlink()
        if missing.name == "torn":
            (missing / "config.json").write_text('{"model_type": "specvlm_he')
        assert not is_head(missing)
        assert "cannot read the head's config.json (" in refusal(ModelLoadError, folders["qwen"], missing)


def test_a_head_is_no_target_and_what_is_not_there_is_said(folders: dict[str, Path]) -> None:
    head = folders["qwen-head"]
    for draft in (head, "none"):
        assert "a trained head is no target; give it as the draft" in refusal(ModelLoadError, head, draft)
    assert "no such preset or folder" in refusal(ModelLoadError, folders["qwen"], "demo-haed")
    assert "owner/no-such-head" in refusal(ModelLoadError, folders["qwen"], "owner/no-such-head")


def test_weights_that_a_head_does_not_have_are_none_of_the_targets(folders: dict[str, Path]) -> None:
    """Neither embeddings nor LM head: the folder is a layer, a join and a compressor."""
    names = load_file(folders["qwen-head"] / "model.safetensors")
    assert {name.split(".")[0] for name in names} == {
        "join",
        "text",
        "compressor",
        "feature_norm",
        "embed_norm",
    }
    assert all(320 not in value.shape for value in names.values())
    assert not any("embed_tokens" in name or "rotary" in name for name in names)
