"""The command line as a contract: flags, their variables, their defaults, and how wrong ones are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer.main

from specvlm.config import FrameSettings, GenerationSettings, SpeculationSettings
from specvlm.preset import find_preset
from specvlm.records import Caption
from specvlm_cli import app
from specvlm_cli.caption.baseline import compare
from specvlm_cli.checkpoints import preset_views
from specvlm_cli.commands import caption
from specvlm_cli.run.parts import CAPTION_SCHEMA
from specvlm_cli.run.rows import Provenance, caption_row
from specvlm_cli.workers.messages import VideoCaptions
from tests.cli.conftest import Specvlm, rows
from tests.cli.fake import stats
from tests.cli.saying import claim

WITH_PRESET = caption._with_preset

FLAGS = """
--out -o --recursive --no-recursive --extensions --limit --prompt --system --preset --target --draft
--revision --draft-revision --dtype --device-map --local-files-only --trust-remote-code --pruner
--prune-ratio --top-p --tree --depth --nodes --positions --fps --num-frames --min-frames --max-frames
--max-pixels --total-pixels --video-backend --max-new-tokens --temperature --top-k --seed --exact --no-exact --overwrite
--retry-failed --on-config-change --fail-fast --max-failures --exit-zero --baseline-sample --dry-run -n
--json --batch-size --quiet -q --verbose -v --log-file --progress --help
--path-column --id-column --start-column --end-column --prompt-column --keep-columns --min-age --allow-empty --root
--shard --reshard --gpus --min-decoded --decode-timeout --decode-workers --if-locked --retries --timeout --on-oom
--max-runtime --grace --config --draft-vocab
""".split()


def options() -> list[Any]:
    """Return the options of `specvlm caption`."""
    group: Any = typer.main.get_command(app.app)
    command = group.commands["caption"]
    return [one for one in command.params if one.param_type_name == "option"]


def test_the_flags_are_these() -> None:
    found = [name for option in options() for name in (*option.opts, *option.secondary_opts)]
    assert sorted({*found, "--help"}) == sorted(FLAGS)


def test_every_flag_has_help_and_a_variable() -> None:
    for option in options():
        if option.name == "help":
            continue
        long = option.opts[0]
        assert option.help
        expected = None if long == "--prompt" else "SPECVLM_" + long[2:].upper().replace("-", "_")
        assert option.envvar == expected, long


def test_variables_set_flags_and_flags_win(
    specvlm: Specvlm, videos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {
        "OUT": str(out),
        "PROMPT": "What is it, in two words?",
        "PRUNE_RATIO": "0.5",
        "TREE": "chain",
        "FPS": "1.5",
        "EXTENSIONS": "mp4 webm",
        "QUIET": "1",
        "JSON": "true",
    }
    for name, value in variables.items():
        monkeypatch.setenv(f"SPECVLM_{name}", value)
    result = specvlm("caption", videos, "--tree", "dynamic")
    assert (result.code, result.err, result.json["done"]) == (0, "", 3)
    (settings,) = specvlm.loads
    assert settings.prompts == (variables["PROMPT"],)
    assert (settings.speculation.prune_ratio, settings.speculation.tree) == (0.5, "dynamic")
    assert settings.frames.fps == 1.5
    assert len(rows(out)) == 3


def test_a_variable_that_is_no_flag_is_told(
    specvlm: Specvlm, videos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECVLM_PRUNE", "0.5")
    monkeypatch.setenv("SPECVLM_JSON", "true")
    result = specvlm("caption", videos, "-o", out, "-n")
    assert [line for line in result.err.splitlines() if "SPECVLM_" in line] == [
        "SPECVLM_PRUNE is set, and no flag of caption has that name"
    ]


def test_defaults_are_those_of_the_library(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm("caption", videos, "-o", out, "--target", "some/target", "--draft", "some/draft")
    (settings,) = specvlm.loads
    assert settings.speculation == SpeculationSettings()
    assert settings.generation == GenerationSettings()
    assert settings.frames == FrameSettings()
    assert (settings.models.name, settings.models.target, settings.models.draft) == (
        *("some/target", "some/target"),
        "some/draft",
    )


def test_every_flag_of_a_setting_reaches_it(specvlm: Specvlm, videos: Path, out: Path) -> None:
    flags = ("--seed", 7, "--top-k", 5, "--pruner", "random", "--nodes", 9, "--video-backend", "pyav")
    specvlm("caption", videos, "-o", out, *flags, "--max-failures", "5%")
    (settings,) = specvlm.loads
    assert settings.generation == GenerationSettings(seed=7, top_k=5)
    assert settings.speculation == SpeculationSettings(seed=7, pruner="random", nodes=9)
    assert settings.frames.backend == "pyav"


@pytest.mark.parametrize("given", [(), ("--preset", "auto")])
def test_without_a_gpu_the_demo_pair_is_used_and_said_so_even_to_cron(
    specvlm: Specvlm, videos: Path, out: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...]
) -> None:
    monkeypatch.setattr(caption, "_with_preset", WITH_PRESET)
    monkeypatch.setattr(caption, "smallest_memory_bytes", lambda: None)
    result = specvlm("caption", videos, "-o", out, "-q", *given)
    demo = find_preset("demo")
    assert demo is not None
    (settings,) = specvlm.loads
    assert (settings.models.target, settings.frames, settings.prompts) == (
        "demo",
        demo.frames,
        (demo.prompt,),
    )
    (line,) = result.err.splitlines()
    assert (
        "there is no GPU, so these are captions of the demo models, which describe drawn shapes only" in line
    )
    assert settings.models.name == "specvlm-demo/qwen-target", "no path of this machine in settings and rows"


GB = 10**9
GPUS = (8, 16, 32, 48, 80, 141, 288, 900)  # GB


def test_the_largest_preset_that_fits_the_gpus_is_named_before_it_loads(
    specvlm: Specvlm, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caption, "_with_preset", WITH_PRESET)
    chosen = []
    for size in GPUS:
        monkeypatch.setattr(caption, "smallest_memory_bytes", lambda size=size: size * GB)
        result = specvlm("caption", videos, "-o", tmp_path / str(size), "--limit", 1)
        chosen.append(specvlm.loads[-1].models.target)
        first = result.err.splitlines()[0]
        if chosen[-1] == "demo":
            assert first.startswith(
                f"--preset auto: no preset fits {size}.0 GB of GPU memory, so these are captions of"
            )
        else:
            said = f"--preset auto: {chosen[-1]}, the largest whose pair fits {size}.0 GB of GPU memory"
            assert first == said
    known = {one.name: one.memory_bytes for one in preset_views()}
    sizes = [0 if name == "demo" else known[name] for name in chosen]
    assert sizes == sorted(sizes)
    assert chosen[0] == "demo"
    assert chosen[-1] == max(known, key=lambda name: known[name] or 0)
    assert all(1.2 * size <= fits * GB for size, fits in zip(sizes, GPUS, strict=True))


def test_flags_go_over_the_frames_of_a_preset(specvlm: Specvlm, videos: Path, out: Path) -> None:
    specvlm(
        "caption", videos, "-o", out, "--preset", "llava-onevision-7b", "--fps", "1", "--max-pixels", 9999
    )
    frames = specvlm.loads[0].frames
    assert (frames.fps, frames.num_frames, frames.max_pixels) == (1.0, None, 9999)


def test_prompt_from_a_file(specvlm: Specvlm, videos: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("What moves?\nAnd where to?\n")
    specvlm("caption", videos, "-o", out, "--prompt", f"@{tmp_path}/prompt.txt", "--system", "Be short.")
    assert (specvlm.loads[0].prompts, specvlm.loads[0].system) == (
        ("What moves?\nAnd where to?",),
        "Be short.",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.mp4"], "nowhere.mp4: no such file or folder"),
        ([".", "--preset", "nope"], "--preset nope is unknown; choose demo, demo-llava"),
        ([".", "--preset", "demo", "--target", "a/b"], "exclude each other"),
        ([".", "--prune-ratio", "1.5"], "--prune-ratio 1.5 is out of range"),
        ([".", "--fps", "2", "--num-frames", "8"], "exclude each other"),
        ([".", "--max-frames", "2"], "--max-frames 2 goes against --min-frames 4, which the preset demo"),
        (
            [".", "--min-frames", "100"],
            "--min-frames 100 goes against --max-frames 16, which the preset demo",
        ),
        ([".", "--limit", "99999999999999999999999"], "--limit 99999999999999999999999"),
        ([".", "--max-failures", "9" * 5000], "is not a count or a percentage"),
        ([".", "-o", ""], "--out is empty"),
        ([".", "--dtype", "int8"], "'int8' is not one of 'auto', 'float32', 'bfloat16', 'float16'"),
        ([".", "--device-map", "rubbish"], "--device-map 'rubbish' is unknown; give cuda, cuda:N"),
        ([".", "--draft", "none", "--draft-revision", "x"], "--draft-revision x has no draft to go with"),
        ([".", "--target", "a/b", "--draft-revision", "x"], "--draft-revision x has no draft to go with"),
        ([".", "--tree", "oak"], "--tree"),
        ([".", "--nodes", "many"], "--nodes"),
        ([".", "--limit", "0"], "--limit"),
        ([".", "--baseline-sample", "2"], "--baseline-sample"),
        ([".", "--baseline-sample", "1", "--draft", "none"], "there is none; give --draft"),
        ([".", "--baseline-sample", "1", "--target", "a/b"], "there is none; give --draft"),
        ([".", "--prompt", "one", "--prompt", "one"], "--prompt was given twice with the same text"),
        ([".", "--prompt", " "], "--prompt is empty"),
        ([".", "--prompt", "\x1b[31m"], "control character"),
        ([".", "--prompt", "@nowhere.txt"], "--prompt @nowhere.txt: No such file"),
        ([".", "--max-failures", "0"], "--max-failures 0 is not a count or a percentage"),
        ([".", "--max-failures", "101%"], "--max-failures 101% is not a count or a percentage"),
        ([".", "--max-failures", "3", "--fail-fast"], "exclude each other"),
        ([".", "--extensions", ","], "--extensions"),
        ([".", "--log-file", "/nowhere/log"], "--log-file /nowhere/log"),
        ([".", "--shard", "2/2"], "--shard 2/2: shards count from 0 to 1"),
        ([".", "--shard", "one"], "--shard one is no shard"),
        ([".", "--shard", "auto"], "--shard auto finds neither SLURM_ARRAY_TASK_ID"),
        ([".", "--gpus", "some"], "--gpus some is not a list of GPUs"),
        ([".", "--gpus", "2", "--device-map", "cpu"], "exclude each other"),
        ([".", "--timeout", "soon"], "--timeout soon is not a time"),
        ([".", "--decode-timeout", "0s"], "--decode-timeout 0s leaves no time"),
        ([".", "--root", "nowhere"], "--root nowhere: no such folder"),
        ([".", "--min-decoded", "2"], "--min-decoded 2.0 is out of range"),
        ([".", "--on-oom", "pray"], "--on-oom"),
        ([".", "--config", "nowhere.toml"], "--config nowhere.toml: No such file"),
        (["."], "--video-backend"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(
    specvlm: Specvlm, arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments == ["."]:
        monkeypatch.setenv("SPECVLM_VIDEO_BACKEND", "vlc")
    result = specvlm("caption", *arguments)
    assert (result.code, result.out) == (2, "")
    (line,) = result.err.splitlines()
    assert line.startswith("specvlm: error: ")
    assert words in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LIMIT", "x"),
        ("QUIET", "maybe"),
        ("PRUNE_RATIO", "7"),
        ("TREE", "oak"),
        ("MIN_FRAMES", "100"),
        ("DEVICE_MAP", "rubbish"),
        ("PRESET", "nope"),
        ("PROMPT", " "),
    ],
)
def test_a_wrong_variable_is_named_with_its_value(
    specvlm: Specvlm, videos: Path, out: Path, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"SPECVLM_{name}", value)
    result = specvlm("caption", videos, "-o", out)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert f"(SPECVLM_{name}={value})" in result.err
    assert not out.exists()


def test_json_names_are_these(specvlm: Specvlm, videos: Path, out: Path) -> None:
    found = specvlm("caption", videos, "-o", out, "--baseline-sample", 1, "--json").json
    assert sorted(found) == sorted(
        "schema exit_code out found done failed pending failed_now wall_s figures stopped failures_file "
        "videos_per_hour caption_tokens_per_s captioning_s workers waited_s waited_share".split()
    )
    assert sorted(found["figures"]) == sorted(
        "captions videos completion_tokens mean_accepted_tokens mean_acceptance_length compared identical decode "
        "end_to_end decode_estimated end_to_end_estimated estimate_over_measured mean_batch_size tokens_per_s "
        "stages_s failures_by_kind targets drafts devices".split()
    )
    speedup = found["figures"]["decode"]
    assert sorted(speedup) == sorted("captions median p10 p90 of_totals mean_batch_size".split())
    assert (speedup["captions"], speedup["mean_batch_size"]) == (4, pytest.approx(1.0))


def test_rows_name_their_batch_size_and_have_the_estimate_beside_the_measurement() -> None:
    took = replace(stats(plain=False), mean_batch_size=7.5, plain_token_s=0.04)
    ours = Caption("text", (1, 2), "stop", took)
    measured = compare(ours, Caption("text", (1, 2), "stop", stats(plain=True)))
    made = VideoCaptions(((ours, measured),), (0.0, 0.5), ())
    provenance = Provenance("target", None, "draft", "hash", "0.1.0", "run")
    row = caption_row(claim(), 0, "What is it?", ours, measured, made, provenance)
    assert set(row) == set(CAPTION_SCHEMA.names)
    assert (row["mean_batch_size"], row["estimated_token_s"]) == (7.5, 0.04)
    assert (row["baseline_token_s"], row["speedup_source"]) == (pytest.approx(0.05), "measured")


def test_unknown_command(specvlm: Specvlm) -> None:
    assert specvlm("caption-all").code == 2


def test_no_arguments_show_help(specvlm: Specvlm) -> None:
    assert "caption" in specvlm().out
    assert "caption" in specvlm("--help").out
    assert specvlm("caption", "--help").code == 0
