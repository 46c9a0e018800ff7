"""What was looked at and what was kept: places of tokens, numbers, the picture."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from specvlm.captioner import Captioner
from specvlm.config import PRUNERS, SpeculationSettings
from specvlm.drafts import small_model
from specvlm.drafts.compressor import OPERATORS, CompressorConfig, OperatorName
from specvlm.drafts.compressor import _Prune as Pruning
from specvlm.drafts.head import HeadDraft
from specvlm.drafts.head_model import HeadConfig, HeadModel
from specvlm.errors import ConfigError, NonFiniteLogitsError, PromptError
from specvlm.families.base import VideoGrid
from specvlm.inspection import Compression, Inspection, look, look_through_head
from specvlm.inspection.drawing import DARK, FIRST_COLOUR, LIGHT, SECOND_COLOUR, cut, font, one_line
from specvlm.inspection.sheet import Heat, SheetText, draw_sheet, evenly_chosen, step_picture
from specvlm.pruning import budget_for
from specvlm.records import Frames
from tests.tiny import FamilyName, Size, random_frames, tiny_captioner

FAMILIES: tuple[FamilyName, ...] = ("qwen", "llava")
SIZES = {"qwen": (64, 128), "llava": (96, 96)}  # the processors leave frames of these sizes as they are
MIXING = re.compile(r"(visual|vision_tower).*(attn\.proj|out_proj|down_proj|fc2)\.(weight|bias)$")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> FamilyName:
    name: FamilyName = request.param
    return name


@pytest.fixture(scope="module")
def captioner(family: FamilyName) -> Captioner:
    return tiny_captioner(family, Size(seed=3), Size(layers=1, seed=4))


def frames_of(family: FamilyName, count: int, seed: int = 0) -> Frames:
    height, width = SIZES[family]
    return random_frames(seed, count, height, width)


@pytest.mark.parametrize("count", [2, 5])
def test_a_token_is_the_cell_that_the_grid_says(family: FamilyName, count: int) -> None:
    """In a tower whose patches do not look at each other, a change in one cell changes one token: that one."""
    captioner = tiny_captioner(family, Size(seed=1), None)
    model = captioner.target.model
    for name, parameter in model.named_parameters():
        if MIXING.search(name):
            parameter.data.zero_()
    frames = frames_of(family, count)
    inputs = captioner.prepare(frames, "What?").inputs
    grid = captioner.target.family.video_grid(captioner.processor, inputs)
    assert grid.cells == inputs.video_tokens - (family == "llava")
    assert grid.steps == -(-count // grid.frames_per_step)
    before = captioner.target.family.see(model, [inputs])[0].embeds
    height, width = frames.pixels.shape[1] // grid.rows, frames.pixels.shape[2] // grid.columns
    for step, row, column in ((0, 0, 0), (grid.steps - 1, grid.rows - 1, 1), (0, 1, grid.columns - 1)):
        pixels = frames.pixels.copy()
        place = np.s_[row * height : (row + 1) * height, column * width : (column + 1) * width]
        pixels[step * grid.frames_per_step][place] ^= 255
        changed = captioner.prepare(Frames(pixels, frames.times_s), "What?").inputs
        after = captioner.target.family.see(model, [changed])[0].embeds
        different = (before != after).any(dim=1).nonzero().flatten().tolist()
        assert different == [(step * grid.rows + row) * grid.columns + column]


@pytest.mark.parametrize("pruner", PRUNERS)
def test_it_is_what_the_draft_of_a_caption_gets(
    captioner: Captioner, family: FamilyName, pruner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SpeculationSettings(pruner=pruner, prune_ratio=0.7, top_p=0.1)
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    real = small_model.prune

    def heard(scores: torch.Tensor, settings: SpeculationSettings) -> torch.Tensor:
        keep = real(scores, settings)
        given.append((scores, keep))
        return keep

    monkeypatch.setattr(small_model, "prune", heard)
    frames = frames_of(family, 5)
    stats = captioner.caption(
        frames, "What is it?", pruner=pruner, prune_ratio=0.7, top_p=0.1, tree="static", max_new_tokens=2
    ).stats
    found = look(captioner, frames, "What is it?", settings)
    ((scores, keep),) = given
    assert found.scores.tolist() == scores.tolist()
    assert (found.stage > 0).tolist() == keep.tolist()
    assert found.kept() == stats.video_tokens_kept
    assert (found.video_tokens, found.prompt_tokens) == (stats.video_tokens, stats.prompt_tokens)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_numbers_add_up(captioner: Captioner, family: FamilyName, pruner: Any) -> None:
    frames = frames_of(family, 5)
    found = look(captioner, frames, "What?", SpeculationSettings(pruner=pruner, prune_ratio=0.5, top_p=0.2))
    said = found.figures()
    beyond, steps = said["no_cells"], said["steps"]
    assert said["video_tokens_kept"] == said["kept_first"] + said["kept_second"]
    expected = found.video_tokens if pruner == "none" else budget_for(found.video_tokens, 0.5)
    assert said["video_tokens_kept"] == expected
    for name in ("kept_first", "kept_second"):
        assert sum(step[name] for step in steps) + beyond[name] == said[name]
    assert sum(step["attention"] for step in steps) + beyond["attention"] == pytest.approx(1.0)
    assert said["attention_kept"] == pytest.approx(float(found.shares[found.stage > 0].sum()))
    assert 0 < said["attention_to_video"] < 1
    assert beyond["video_tokens"] == (family == "llava")
    assert [one.kept for one in found.stages] == [
        said[name] for name in ("kept_first", "kept_second") if pruner == "specvlm" or said[name]
    ]
    assert said["top_p"] == (0.2 if pruner == "specvlm" else None)


def test_steps_have_the_frames_and_times_that_they_cover(captioner: Captioner, family: FamilyName) -> None:
    steps = look(captioner, frames_of(family, 5), "What?", SpeculationSettings()).steps
    if family == "qwen":
        assert [step.frames for step in steps] == [(0, 1), (2, 3), (4, 4)]
        assert [step.times_s for step in steps] == [(0.0, 0.5), (1.0, 1.5), (2.0, 2.0)]
    else:
        assert [step.frames for step in steps] == [(number, number) for number in range(5)]


def test_attention_is_that_of_the_given_prompt(captioner: Captioner, family: FamilyName) -> None:
    frames = frames_of(family, 4)
    one, same, other = (
        look(captioner, frames, prompt, SpeculationSettings()).scores for prompt in ("A?", "A?", "B and C?")
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_wrong_prompts_and_broken_models_are_said(captioner: Captioner, family: FamilyName) -> None:
    frames = frames_of(family, 2)
    with pytest.raises(PromptError, match="special token"):
        look(captioner, frames, "a <|im_end|> b", SpeculationSettings())
    broken = tiny_captioner(family, Size(seed=5), None)
    broken.target.model.get_input_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteLogitsError, match="another dtype"):
        look(broken, frames, "What?", SpeculationSettings())


# --- a trained head ---


def headed(family: FamilyName, compressor: CompressorConfig) -> Captioner:
    """A tiny target with an untrained head."""
    captioner = tiny_captioner(family, Size(seed=3), None)
    target = captioner.target
    config = HeadConfig("tiny", None, family, target.hidden_size, compressor=compressor)
    head = HeadModel.fresh(target, config, 0).eval().requires_grad_(False)
    return Captioner(target, captioner.processor, HeadDraft(head, target), captioner.info, captioner.frames)


def single(name: OperatorName, ratio: float = 3.0) -> CompressorConfig:
    return CompressorConfig("single", (name,), ratio=ratio)


COMPRESSORS = [
    *(single(name) for name in OPERATORS),
    CompressorConfig("none", ()),
    CompressorConfig("select", ("pool", "prune"), ratio=3.0),
    CompressorConfig("concat", ("prune", "resampler"), ratio=3.0),
    CompressorConfig("weighted", ("pool", "conv"), ratio=3.0),
]


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda one: f"{one.mode}-{'+'.join(one.operators)}")
def test_a_head_is_given_what_a_caption_s_is(
    family: FamilyName, compressor: CompressorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner, frames = headed(family, compressor), frames_of(family, 5)
    pruned: list[torch.Tensor] = []
    real = Pruning.kept

    def heard(self: Pruning, *given: Any) -> torch.Tensor:
        pruned.append(real(self, *given))
        return pruned[-1]

    monkeypatch.setattr(Pruning, "kept", heard)
    stats = captioner.caption(frames, "What is it?", tree="chain", max_new_tokens=3).stats
    in_caption = list(pruned)
    found = look_through_head(captioner, frames, "What is it?")
    made = found.compression
    assert made is not None
    assert (made.operator, made.name) == (stats.compressor, compressor.name)
    assert (found.seen, found.video_tokens) == (stats.video_tokens_kept, stats.video_tokens)
    assert found.has_cells == (made.operator in ("none", "prune", "prune-guided"))
    if made.operator in ("prune", "prune-guided"):
        assert np.flatnonzero(found.stage).tolist() == in_caption[0].tolist()
    else:
        assert found.kept() == (found.video_tokens if made.operator == "none" else 0)
    said = found.figures()
    assert (said["pruner"], said["compressor"]) == (None, made.operator)
    ratio = said["compression_ratio"]
    assert ratio == stats.compression_ratio
    assert ratio is None or ratio == pytest.approx(stats.video_tokens / stats.video_tokens_kept)
    for name in ("kept_first", "kept_second", "attention_kept"):
        assert (said[name] is None) == (not found.has_cells), name
    assert (said["steps"][0]["kept"] is None) == (not found.has_cells)
    assert said["steps"][0]["attention"] > 0
    sheet = np.asarray(draw_sheet(found, TEXT))
    assert has(sheet, SECOND_COLOUR) == found.has_cells
    assert not has(sheet, FIRST_COLOUR)
    assert (sheet[:, -24:] == DARK.paper).all()


def test_words_tell_what_chose_the_operator() -> None:
    assert [
        Compression(*made).words for made in (("pool", "pool", 3, False), ("select", "pool", 3, False))
    ] == [
        "pool",
        "pool, chosen by select",
    ]
    found = made(
        stage=np.zeros(60, np.int8), compression=Compression("text-only", "text-only", 0, prunes=False)
    )
    assert found.pruner_words == "text-only, nothing of the video"
    assert made(compression=Compression("pool", "pool", 12, prunes=False)).pruner_words == (
        "pool, 5.0 video tokens to one"
    )


def test_a_small_model_is_not_looked_through(captioner: Captioner, family: FamilyName) -> None:
    with pytest.raises(ConfigError, match="no trained head"):
        look_through_head(captioner, frames_of(family, 2), "What?")


# --- the picture ---


def made(
    steps: int = 4, rows: int = 3, columns: int = 5, size: tuple[int, int] = (90, 150), **more: Any
) -> Inspection:
    """An inspection of grey frames, every seventh token kept, by the two stages in turn."""
    count = steps * rows * columns
    stage = np.zeros(count, np.int8)
    stage[::7] = np.arange(len(stage[::7])) % 2 + 1
    scores = np.random.default_rng(0).random(count).astype(np.float32) ** 8 / count
    frames = Frames(np.full((steps, *size, 3), 120, np.uint8), np.arange(steps) / 2)
    whole = {"frames": frames, "grid": VideoGrid(steps, rows, columns, 1), "scores": scores, "stage": stage}
    return Inspection(**(whole | {"prompt_tokens": count + 9, "settings": SpeculationSettings()} | more))


def has(picture: NDArray[np.uint8], colour: tuple[int, int, int]) -> bool:
    return bool((picture == colour).all(axis=-1).any())


def test_kept_cells_are_outlined_in_the_colour_of_their_stage_and_no_others() -> None:
    found = made()
    heat = Heat.of(found.scores)
    for number in range(4):
        picture = np.asarray(step_picture(found, number, (300, 180), heat))
        assert picture.shape == (180, 300, 3)
        for row in range(3):
            for column in range(5):
                cell = picture[row * 60 : (row + 1) * 60, column * 60 : (column + 1) * 60]
                stage = found.cells(found.stage)[number, row, column]
                assert (has(cell, FIRST_COLOUR), has(cell, SECOND_COLOUR)) == (stage == 1, stage == 2)


def test_heat_is_redder_where_there_is_more_attention() -> None:
    scores = np.linspace(0.001, 0.1, 60, dtype=np.float32)
    found = made(scores=scores, stage=np.zeros(60, np.int8))
    picture = np.asarray(step_picture(found, 1, (300, 180), Heat.of(scores))).astype(int)
    centres = [picture[row * 60 + 30, column * 60 + 30] for row in range(3) for column in range(5)]
    red = [int(colour[0] - colour[2]) for colour in centres]
    assert red == sorted(red)
    assert red[-1] > red[0] + 20


def test_the_heat_scale_is_one_for_all_frames_and_bounded() -> None:
    scores = np.array([0.0] * 50 + [1.0] + [1000.0] * 3 + [2000.0], np.float32)
    opacity = Heat.of(scores).opacity(np.array([-1.0, 0.0, 1000.0, 1e9]))
    assert opacity[0] == opacity[1] == 0.0
    assert opacity[1] < opacity[2] <= opacity[3] < 1.0
    assert np.isfinite(Heat.of(np.full(9, 0.5, np.float32)).opacity(np.array([0.5, 0.6]))).all()
    assert np.isfinite(Heat.of(np.zeros(9, np.float32)).opacity(np.array([0.0]))).all()


def test_pictures_are_chosen_evenly_with_both_ends() -> None:
    assert evenly_chosen(5, 12) == [0, 1, 2, 3, 4]
    chosen = evenly_chosen(100, 12)
    assert (len(chosen), chosen[0], chosen[-1]) == (12, 0, 99)
    assert set(np.diff(chosen)) == {9}
    assert evenly_chosen(100, 1) == [50]


TEXT = SheetText("clip.mp4", "some/model", "Describe the video.")


@pytest.mark.parametrize(
    ("steps", "rows", "columns", "size"),
    [(1, 1, 1, (8, 8)), (2, 40, 2, (800, 40)), (30, 3, 60, (30, 600)), (200, 4, 4, (40, 40)), (3, 9, 16, (90, 160))],
)  # fmt: skip
def test_any_shape_fits_on_the_sheet(steps: int, rows: int, columns: int, size: tuple[int, int]) -> None:
    found = made(steps, rows, columns, size)
    sheet = np.asarray(draw_sheet(found, TEXT))
    assert 1000 <= sheet.shape[1] <= 1440
    assert (sheet[:, -24:] == DARK.paper).all()  # nothing runs over the margin
    assert (sheet[-20:] == DARK.paper).all()
    assert has(sheet, FIRST_COLOUR)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_the_legend_names_the_stages_that_the_pruner_has(pruner: Any) -> None:
    """A sheet without kept cells has a stage's colour in the legend alone."""
    found = made(stage=np.zeros(60, np.int8), settings=SpeculationSettings(pruner=pruner))
    sheet = np.asarray(draw_sheet(found, TEXT))
    assert has(sheet, FIRST_COLOUR) == (pruner in ("specvlm", "attention"))
    assert has(sheet, SECOND_COLOUR) == (pruner != "attention")


def test_fewer_pictures_make_a_smaller_sheet() -> None:
    found = made(steps=40)
    assert draw_sheet(found, TEXT, most=4).size[1] < draw_sheet(found, TEXT, most=40).size[1]


def test_text_from_outside_is_one_line_and_cut_to_the_width() -> None:
    hostile = "a\nb\t c\x1b[31m \u202eevil \ud800" + "x" * 10_000
    line = one_line(hostile)
    assert line.startswith("a b c\ufffd[31m \ufffdevil \ufffd")
    assert len(line) < 500
    face = font(14)
    assert face.getlength(cut(line, face, 200)) <= 200
    assert cut("short", face, 200) == "short"
    sheet = draw_sheet(made(), SheetText(hostile, hostile, hostile))
    assert (np.asarray(sheet)[:, -24:] == DARK.paper).all()


def test_a_sheet_is_a_plain_rgb_picture() -> None:
    sheet = draw_sheet(made(), TEXT)
    assert isinstance(sheet, Image.Image)
    assert sheet.mode == "RGB"


def test_a_light_sheet_differs_in_paper_and_ink_alone() -> None:
    dark, light = (np.asarray(draw_sheet(made(), TEXT, theme=theme)) for theme in (DARK, LIGHT))
    assert dark.shape == light.shape
    assert (light[:, -24:] == LIGHT.paper).all()
    assert has(light, LIGHT.ink)
    assert not has(light, DARK.paper)
