"""The public API: what it takes, gives, streams and refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import specvlm
from specvlm.captioner import Captioner
from tests.tiny import Size, caption_rows, random_frames, tiny_captioner


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return tiny_captioner("qwen", Size(seed=1), Size(seed=2))


def test_every_public_name_is_there() -> None:
    assert specvlm.__all__ == sorted(specvlm.__all__)
    for name in specvlm.__all__:
        assert getattr(specvlm, name) is not None
    assert set(specvlm.__all__) <= set(dir(specvlm))
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = specvlm.nothing_here


def test_importing_the_package_imports_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, specvlm; specvlm.presets(); specvlm.FrameSettings(); specvlm.Frames; specvlm.VideoError;"
        "import specvlm.video;"
        "assert not {'torch', 'transformers', 'av', 'decord'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stream_joins_to_the_caption(captioner: Captioner) -> None:
    frames = random_frames(1)
    for seed in range(6):
        options: dict[str, Any] = {"temperature": 1.0, "seed": seed, "max_new_tokens": 30}
        pieces = list(captioner.stream(frames, "Tell me.", **options))
        assert "".join(pieces) == captioner.caption(frames, "Tell me.", **options).text
        assert len(pieces) > 1


def test_stream_can_be_left_early(captioner: Captioner) -> None:
    stream = captioner.stream(random_frames(1), "Tell me.", max_new_tokens=30)
    next(stream)
    stream.close()
    assert captioner.caption(random_frames(1), max_new_tokens=3).stats.completion_tokens == 3


def test_statistics_add_up(captioner: Captioner) -> None:
    caption = captioner.caption(random_frames(1), "Tell me.", max_new_tokens=40, tree="static")
    stats = caption.stats
    assert stats.completion_tokens == len(caption.token_ids) == 40
    assert sum(stats.acceptance_histogram) == stats.num_drafts
    accepted = sum(k * rounds for k, rounds in enumerate(stats.acceptance_histogram))
    assert accepted == stats.num_accepted_tokens
    # Each round adds its accepted tokens and a bonus; only the last may be cut short before its bonus.
    assert 0 <= 1 + accepted + stats.num_drafts - 40 <= 1
    assert stats.num_draft_tokens == 25 * stats.num_drafts
    assert stats.mean_acceptance_length == pytest.approx(accepted / stats.num_drafts + 1)
    assert stats.video_tokens_kept == round(0.1 * stats.video_tokens)
    parts = stats.vision_s + stats.target_prefill_s + stats.draft_prefill_s + stats.decode_s
    assert 0 < parts + stats.preprocess_s <= stats.total_s
    assert stats.draft_s + stats.verify_s + stats.commit_s <= stats.decode_s
    assert stats.method == "specvlm/specvlm/static"


def test_plain_statistics(captioner: Captioner) -> None:
    stats = captioner.caption(random_frames(1), speculate=False, max_new_tokens=5).stats
    assert (stats.method, stats.num_drafts, stats.acceptance_histogram) == ("plain", 0, ())
    assert stats.mean_accepted_tokens is None
    assert stats.tokens_per_s == pytest.approx(1 / stats.token_s)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prune_ratio": 1.5}, "prune_ratio=1.5"),
        ({"prune_ratio": float("nan")}, "prune_ratio=nan"),
        ({"tree": "oak"}, "tree='oak'"),
        ({"pruner": "none?"}, "pruner='none?'"),
        ({"positions": "lost"}, "positions='lost'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1}, "temperature=-1"),
        ({"depth": 0}, "depth=0"),
        ({"nodes": 1}, "nodes=1"),
        ({"tree": "static", "depth": 6}, "depth=6 has no effect on tree='static'"),
        ({"tree": "chain", "nodes": 9}, "nodes=9 has no effect on tree='chain'"),
        ({"speed": 3}, "unknown option 'speed'"),
        ({"temperature": 1e-38}, "temperature=1e-38"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"depth": 2.5}, "depth=2.5"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"frames": {"num_frames": 8}}, "frames={'num_frames': 8} is of type dict; give FrameSettings, e.g."),
        ({"frames": 8}, "frames=8 is of type int; give FrameSettings"),
        ({"prompt": 5}, "prompt=5 is of type int; give a text"),
        (
            {"prompt": ["What moves?"]},
            "prompt=['What moves?'] is of type list; give a text; for several prompts",
        ),
        ({"prompt": b"Hi."}, "is of type bytes"),
        ({"system": 1}, "system=1 is of type int"),
        ({"speculate": "no"}, "speculate='no' is of type str; give True, or False"),
        ({"time_limit_s": -1}, "time_limit_s=-1 is out of range; give seconds"),
        ({"time_limit_s": "60s"}, "time_limit_s='60s' is not a number"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 is out of range"),
        ({"pruner": None}, "pruner=None is unknown"),
        ({"tree": ["chain"]}, "tree=['chain'] is unknown"),
        ({"prune_ratio": np.zeros((99, 9))}, "is not a number; give a share"),
        ({"top_p": True}, "top_p=True is not a number"),
    ],
)
def test_wrong_options_are_refused_before_the_video_is_read(
    captioner: Captioner, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(specvlm.ConfigError) as error:
        captioner.caption("/no/such/video.mp4", **options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_frames_of_another_shape_are_refused(captioner: Captioner) -> None:
    good = random_frames(1)
    for frames in (
        good._replace(pixels=good.pixels[..., 0]),
        good._replace(pixels=good.pixels.astype(np.float32)),
        good._replace(pixels=good.pixels[:0], times_s=good.times_s[:0]),
        good._replace(times_s=good.times_s[:1]),
    ):
        with pytest.raises(specvlm.ConfigError, match="frames"):
            captioner.caption(frames)


@pytest.mark.parametrize(
    ("video", "said"),
    [
        (["a.mp4"], "video=['a.mp4'] is of type list; give one path, or Frames; for several videos there is"),
        (np.zeros((2, 28, 28, 3), np.uint8), "is of type ndarray; give one path, or Frames"),
        (None, "video=None is of type NoneType"),
        (3, "video=3 is of type int"),
        (specvlm.FrameSettings(), "is of type FrameSettings"),
    ],
)
def test_what_is_no_video_is_refused(captioner: Captioner, video: Any, said: str) -> None:
    for call in (
        lambda: captioner.caption(video),
        lambda: list(captioner.stream(video)),
        lambda: captioner.prepare(video, "Hi."),
        lambda: captioner.session(video, ["Hi."]),
        lambda: captioner.caption_prompts(video, ["Hi."]),
        lambda: list(captioner.caption_many([video])),
    ):
        with pytest.raises(specvlm.ConfigError) as error:
            call()
        assert said in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [{"end_s": "1:00"}, {"start_s": -1.0}, {"fps": "2"}, {"fps": -2}, {"num_frames": -1}, {"backend": 1}],
)
def test_frame_settings_of_another_type_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(specvlm.ConfigError, match=name.replace("_", ".")):
        specvlm.FrameSettings(**options)


def test_what_is_no_list_of_videos_or_prompts_is_refused(captioner: Captioner) -> None:
    frames = random_frames(1)
    for videos in (frames, captioner.prepare(frames, "Hi."), "a.mp4", 3, None):
        with pytest.raises(specvlm.ConfigError, match="give a list of videos"):
            captioner.caption_many(videos)  # type: ignore[arg-type]
    for prompts in ("Hi.", [], 3, None, {"Hi."}):
        with pytest.raises(specvlm.ConfigError, match="give at least one, in a list"):
            captioner.session(frames, prompts)  # type: ignore[arg-type]
    with pytest.raises(specvlm.ConfigError, match="prompt=3 is of type int"):
        captioner.session(frames, ["Hi.", 3])  # type: ignore[list-item]
    with pytest.raises(specvlm.ConfigError, match="index='0' is not a whole number"):
        captioner.session(frames, ["Hi."]).caption("0")  # type: ignore[arg-type]


def test_times_that_are_none_are_refused(captioner: Captioner) -> None:
    good = random_frames(1)
    count = len(good.pixels)
    for times in (None, ["0:01"] * count, np.full(count, np.nan), -np.arange(count), np.zeros((count, 1))):
        with pytest.raises(specvlm.ConfigError, match="frames"):
            captioner.caption(good._replace(times_s=times))  # type: ignore[arg-type]
    with pytest.raises(specvlm.ConfigError, match=r"frames\.pixels"):
        captioner.caption(good._replace(pixels=good.pixels.tolist()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": None}, "target=None is of type NoneType; give a preset's name, a hub id or a folder"),
        ({"target": 7}, "target=7 is of type int"),
        ({"target": "demo", "draft": False}, "draft=False is of type bool"),
        ({"target": "demo", "revision": 3}, "revision=3 is of type int"),
        ({"target": "demo", "dtype": torch.float32}, "dtype=torch.float32 is unknown; choose one of auto"),
        ({"target": "demo", "device_map": 0}, "device_map=0 is of type int"),
    ],
)
def test_loading_with_arguments_of_another_type_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(specvlm.ConfigError) as error:
        specvlm.load(**options)
    assert said in str(error.value)


def test_without_a_prompt_the_presets_own_is_asked(captioner: Captioner) -> None:
    frames = random_frames(1)
    asked = "Describe the video in detail."
    assert captioner.prompt == asked == next(one.prompt for one in specvlm.presets())
    expected = captioner.prepare(frames, asked).inputs.token_ids.tolist()
    assert captioner.prepare(frames).inputs.token_ids.tolist() == expected
    other = Captioner(
        captioner.target, captioner.processor, None, captioner.info, captioner.frames, "What moves?"
    )
    what = other.prepare(frames, "What moves?").inputs.token_ids.tolist()
    assert other.prepare(frames).inputs.token_ids.tolist() == what != expected


def test_what_would_be_ignored_is_refused(captioner: Captioner) -> None:
    frames = random_frames(1)
    prepared = captioner.prepare(frames, "Hi.")
    for options in ({"prompt": "Hi."}, {"system": "Be kind."}, {"frames": specvlm.FrameSettings()}):
        with pytest.raises(specvlm.ConfigError, match="prepared video"):
            captioner.caption(prepared, **options)  # type: ignore[arg-type]
    with pytest.raises(specvlm.ConfigError, match="frame settings"):
        captioner.caption(frames, frames=specvlm.FrameSettings())


@pytest.mark.parametrize("prompt", ["<video> and <video>", "say <|im_end|>", "<|video_pad|>", "\ud800"])
def test_prompts_that_would_break_the_template_are_refused(captioner: Captioner, prompt: str) -> None:
    with pytest.raises(specvlm.PromptError):
        captioner.caption(random_frames(1), prompt)


def test_frames_that_the_processor_refuses(captioner: Captioner) -> None:
    with pytest.raises(specvlm.PreprocessError, match="2x16x6000"):
        captioner.caption(random_frames(1, 2, 16, 6000))


def test_no_rows_no_captions(captioner: Captioner) -> None:
    assert caption_rows(captioner, []) == []


def test_a_system_message_reaches_the_model(captioner: Captioner) -> None:
    frames = random_frames(1)
    plain, told = (
        captioner.prepare(frames, "Hi.", system=system) for system in (None, "Be a poet of the sea.")
    )
    text = captioner.processor.tokenizer.decode(told.inputs.token_ids[0])
    assert "Be a poet of the sea." in text
    assert "Be a poet" not in captioner.processor.tokenizer.decode(plain.inputs.token_ids[0])


def test_frame_times_move_the_positions() -> None:
    """M-RoPE counts seconds: twice the time between frames, twice the temporal step."""
    captioner = tiny_captioner("qwen", Size(), None)
    frames = random_frames(1, 6)
    slow = frames._replace(times_s=frames.times_s * 2)
    steps = []
    for video in (frames, slow):
        inputs = captioner.prepare(video, "Hi.").inputs
        times = captioner.target.positions(inputs)[0][inputs.video_at]
        steps.append((times.unique()[1:] - times.unique()[:-1]).tolist())
    assert steps == [[4, 4], [8, 8]]  # 2 frames a step, half a second apart, 4 tokens a second


def test_non_finite_logits_are_an_error_not_a_caption() -> None:
    captioner = tiny_captioner("qwen", Size(), Size(seed=2))
    video = captioner.prepare(random_frames(1), "Hi.")
    captioner.target.model.lm_head.weight[5] = float("nan")
    for speculate in (False, True):
        with pytest.raises(specvlm.NonFiniteLogitsError):
            captioner.caption(video, speculate=speculate)


def test_non_finite_logits_in_the_middle_of_a_caption() -> None:
    captioner = tiny_captioner("llava", Size(), Size(seed=2))
    video = captioner.prepare(random_frames(1), "Hi.")
    tokens = captioner.caption(video, max_new_tokens=8).token_ids
    embeddings = captioner.target.model.get_input_embeddings()
    embeddings.weight[tokens[4]] = float("inf")
    for speculate in (False, True):
        with pytest.raises(specvlm.NonFiniteLogitsError):
            captioner.caption(video, speculate=speculate, max_new_tokens=8)


def test_a_draft_that_breaks_cannot_break_the_caption() -> None:
    captioner = tiny_captioner("qwen", Size(seed=1), Size(seed=2))
    video = captioner.prepare(random_frames(1), "Hi.")
    plain = captioner.caption(video, speculate=False, max_new_tokens=20).token_ids
    captioner.draft.model.model.lm_head.weight.fill_(float("nan"))  # type: ignore[union-attr]
    for tree in ("chain", "static", "dynamic"):
        assert captioner.caption(video, tree=tree, max_new_tokens=20).token_ids == plain, tree  # type: ignore[arg-type]


def test_layers_behind_accelerate_hooks(captioner: Captioner) -> None:
    """A target spread over devices runs behind hooks that move what they find in a forward's arguments."""
    from accelerate import dispatch_model

    hooked = tiny_captioner("qwen", Size(seed=1), Size(seed=2))
    layers = {f"model.language_model.layers.{i}": "cpu" for i in range(2)}
    rest = {
        "model.visual": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.norm": "cpu",
    }
    rest |= {"model.language_model.rotary_emb": "cpu", "lm_head": "cpu"}
    dispatch_model(hooked.target.model, device_map=layers | rest, main_device="cpu", force_hooks=True)
    video = captioner.prepare(random_frames(1), "Hi.")
    expected = captioner.caption(video, max_new_tokens=12).token_ids
    assert hooked.caption(video, max_new_tokens=12).token_ids == expected
    assert all(hasattr(layer, "_hf_hook") for layer in hooked.target.model.model.language_model.layers)


def test_a_time_limit_ends_a_caption_between_rounds(captioner: Captioner) -> None:
    frames = random_frames(1)
    with pytest.raises(specvlm.GenerationTimeoutError, match="was not done after 0 s"):
        captioner.caption(frames, "Tell me.", max_new_tokens=40, time_limit_s=0.0)
    assert captioner.caption(frames, "Tell me.", max_new_tokens=5, time_limit_s=600.0).token_ids


def test_frames_that_were_read_elsewhere_keep_their_reading_time(captioner: Captioner) -> None:
    source = specvlm.VideoSource(2.0, 25.0, 64, 48, "elsewhere", decode_s=7.0)
    frames = random_frames(1)._replace(source=source)
    caption = captioner.caption(frames, "Tell me.", max_new_tokens=3)
    assert caption.stats.video_decode_s == 7.0
    assert caption.stats.total_s > 7.0
    assert caption.source == source
