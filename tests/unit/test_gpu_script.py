"""benchmarks/gpu.py in small, on the CPU: every part runs, and its figures can be true."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from specvlm.settling import Settling

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WAYS = ("plain", "static", "chain", "dynamic", "auto")


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    """The script as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("gpu")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def folder(gpu: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of all parts."""
    out = tmp_path_factory.mktemp("gpu")
    assert gpu.main(["--out", str(out), "--cpu-smoke"]) == 0
    return out


@pytest.fixture(scope="module")
def found(folder: Path) -> Any:
    return json.loads((folder / "gpu.json").read_text(), parse_constant=_no_constant)


def _no_constant(name: str) -> float:
    raise AssertionError(f"{name} in the JSON")


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, int | float):
        yield float(value)


def test_every_part_ran(found: Any) -> None:
    assert found["skipped"] == []
    assert found["schema"] == 1
    assert found["conditions"]["device"] == "cpu"
    assert {"torch", "transformers", "command", "dtype", "started_at"} <= set(found["conditions"])
    assert all(math.isfinite(number) and number >= 0 for number in numbers(found))
    assert 1e8 < found["bandwidth"]["bytes_per_s"] < 1e13


def test_float32_captions_are_stocks(found: Any) -> None:
    parity = found["parity"]
    assert parity["exact_share"] == 1.0
    assert parity["differences"] == []
    assert parity["beyond_tolerance"] == 0
    assert {one["way"] for one in parity["captions"]} == set(WAYS)
    assert (
        len({one["model"] for one in parity["captions"]}) == 4
    )  # demo pairs and random pairs, of both families
    assert parity["comparisons"] == sum(one["captions"] for one in parity["captions"]) == 4 * len(WAYS)


def test_bfloat16_captions_are_stocks_with_exact(found: Any) -> None:
    rows = found["exactness"]
    assert len(rows) == 8 * 2  # ways, with and without exact
    sizes = {"plain": {1, 4}, "chain": {1, 4}, "static": {1, 8}, "dynamic": {1}, "head": {1}}
    for one in rows:
        assert (one["dtype"], one["attention"]) == ("bfloat16", "split")
        assert one["batch_size"] in sizes[one["way"]]
        assert one["captions"] == one["batch_size"]
        assert one["tokens"] == 32 * one["captions"]
        assert sum(one["first_differences"].values()) == one["captions"] - one["equal"]
        if one["exact"]:
            assert one["equal"] == one["captions"]
            assert (one["bound"] is None) == (one["way"] == "plain" and one["batch_size"] == 1)
            assert one["settled_share"] == one["settled"] / one["tokens"]
        else:
            assert one["settled"] == 0
    assert any(one["smallest_margin"] is not None for one in rows)


def test_a_first_difference_names_the_rows_of_its_pass(gpu: Any) -> None:
    """Every token of a caption has its pass: the prompt's, a round over several rows, or a plain step."""
    from gpu_exactness import _made_by, recorded_rows

    plan = gpu.replace(gpu.smoke_plan(60.0), dtype=torch.bfloat16)
    captioner, videos, _ = gpu._random(plan, gpu.TINY[0][0], 0)()
    captioner.settling = Settling()
    with recorded_rows() as recorded:
        caption = captioner.caption(videos[0], tree="chain", depth=5, max_new_tokens=40)
    ((tokens, rows),) = recorded
    assert tuple(tokens) == caption.token_ids
    assert len(rows) == len(tokens)
    assert rows[0] == 0
    assert set(rows[1:]) <= {1, 6}
    assert _made_by(recorded, caption.token_ids, 0) == "prefill"
    assert _made_by(recorded, caption.token_ids, 1) == str(rows[1])
    assert _made_by(recorded, caption.token_ids, len(tokens)) == "end"


def test_shapes_have_plain_and_every_tree_at_each_number_of_frames(found: Any) -> None:
    assert [(one["target"], one["frames"]) for one in found["shapes"]] == [
        (f"tiny-{family}", frames) for family in ("qwen2_5_vl", "llava_onevision") for frames in (4, 2)
    ]
    for one in found["shapes"]:
        assert one["modelled"] is True
        assert "modelled" in one["label"]
        assert [row["tree"] for row in one["rows"]] == [None, *WAYS[1:]]
        for row in one["rows"]:
            assert row["error"] is None
            assert row["token_s"] > 0
            if row["tree"] not in (None, "auto"):
                assert row["accepted"] == pytest.approx(3.9, abs=0.9)  # four rounds, and the last is cut
                assert (
                    0.01 < row["decode_speedup"] < 100
                )  # of one caption each, on a machine that may be busy


def test_shares_of_the_roofline_can_be_true(found: Any) -> None:
    for one in found["shapes"]:
        for row in one["rows"]:
            shares = [row[name] for name in ("roofline", "verify_roofline", "draft_roofline")]
            if row["tree"] == "auto":
                assert shares == [None] * 3
            else:
                assert 0 < shares[0] < 1.5
                assert all(0 < share < 1.5 for share in shares if share is not None)
                assert row["round_bytes"] > 0
        static = next(row for row in one["rows"] if row["tree"] == "static")
        plain = next(row for row in one["rows"] if row["tree"] is None)
        assert static["round_bytes"] > plain["round_bytes"]


def test_choices_stand_beside_how_it_is_done_now(gpu: Any, found: Any) -> None:
    for tree in ("static", "plain"):
        for frames in (4, 2):
            rows = [one for one in found["choices"] if (one["tree"], one["frames"]) == (tree, frames)]
            assert len(rows) == 2 * len(gpu.CHOICES)
            for row in rows:
                assert (row["round_s"] is None) == (row["error"] is not None)
                if row["error"] is None:
                    assert row["draft_s"] + row["verify_s"] + row["commit_s"] < 3 * row["round_s"]
    for name in ("as they are", "without CUDA graphs", "masked", "split"):
        chosen = [one for one in found["choices"] if one["choice"] == name]
        assert chosen
        assert all(one["error"] is None for one in chosen), name


def test_a_choice_is_put_back(gpu: Any) -> None:
    """Also where rounds fail."""
    shape = gpu.TINY[0][0]
    captioner = gpu.build_pair(gpu.make_pair(*gpu.TINY[0], 3.9), torch.device("cpu"), torch.float32)
    models = (captioner.target, captioner.draft.model)
    before = [(model.round_attention, model.captures) for model in models]
    for choice in gpu.CHOICES:
        with pytest.raises(RuntimeError, match="in the middle"), choice.switch(captioner):
            raise RuntimeError("in the middle")
        assert [(model.round_attention, model.captures) for model in models] == before, choice
    with next(one for one in gpu.CHOICES if one.name == "split").switch(captioner):
        assert [model.round_attention for model in models] == ["split", "split"]
    assert shape.text.layers == len(captioner.target.model.model.language_model.layers)


def test_batches_of_the_demo_pair_are_stock(gpu: Any, found: Any) -> None:
    rows = found["batches"]["parity"]
    ways = ["stock", "plain", "chain", "static", "auto"]
    assert [(one["batch_size"], one["way"]) for one in rows] == [(n, way) for n in (1, 2) for way in ways]
    assert all(one["exact"] == one["captions"] == 2 for one in rows)


def test_batches_are_timed_by_each_way_at_each_size(found: Any) -> None:
    rows = found["batches"]["speed"]
    assert len(rows) == 2 * 5
    for one in rows:
        assert one["modelled"] is True
        assert one["error"] is None
        assert one["videos_per_hour"] == pytest.approx(3600 * one["batch_size"] / one["wall_s"])
        assert 0 < one["decode_s"] <= one["wall_s"]
        assert 1.0 <= one["mean_batch_size"] <= one["batch_size"]
        assert one["over_stock"] > 0
        assert (one["over_plain"] is None) == (one["way"] == "stock")
        assert (one["accepted"] > 0) == (one["way"] in ("chain", "static")) or one["way"] == "auto"
        if one["way"] in ("stock", "plain"):
            assert one[f"over_{one['way']}"] == 1.0


def test_ways_to_attend_are_timed_on_one_batch(found: Any) -> None:
    rows = found["batches"]["attention"]
    ways = [(tree, how) for tree in ("static", "plain") for how in ("masked", "split", "varlen")]
    assert [(one["tree"], one["attention"]) for one in rows] == ways
    for one in rows:
        assert (one["rows"], one["error"], one["modelled"]) == (3, None, True)
        assert 0 < one["verify_s"] < one["round_s"]


def test_profiles_name_what_takes_the_time(found: Any) -> None:
    assert len(found["profiles"]) == len(found["rounds"]) == 2 * 2 * 2  # pairs, frames, trees
    for one in found["profiles"]:
        shares = [top["share"] for top in one["top"]]
        assert shares == sorted(shares, reverse=True)
        assert 0.2 < sum(shares) <= 1.0001
        assert any("mm" in top["name"] for top in one["top"])
    for one in found["rounds"]:
        assert 0 < one["device_s"] < 10 * one["round_s"]
        assert one["host_over_device"] == pytest.approx(one["host_s"] / one["device_s"])


def test_heads_are_timed_with_and_without_what_makes_them_cheaper(found: Any) -> None:
    heads = found["heads"]
    assert len(heads) == 2 * 2 * 2 * 2 * 2  # pairs, frames, compressors, vocabularies, trees
    for one in heads:
        assert one["modelled"]
        assert one["vocabulary"] in (100, 320)
        assert (one["nodes"], one["depth"]) == {"dynamic": (60, 7), "chain": (6, 5)}[one["tree"]]
        assert one["step_s"] == pytest.approx((one["draft_s"] + one["commit_s"]) / one["depth"])
        assert one["depth"] - 0.5 < one["accepted"] < one["depth"]  # the demo head's own
        modelled = (one["accepted"] + 1) * one["plain_s"] / one["round_s"]
        assert one["decode_speedup"] == pytest.approx(modelled)


def test_the_tables_hold_the_figures_and_say_modelled(folder: Path, found: Any) -> None:
    text = (folder / "gpu.md").read_text()
    assert "20 of 20 captions" in text
    for line in text.splitlines():
        if line.startswith("tiny-"):
            assert "modelled" in line
    for head in (
        "## Parity",
        "## Exactness",
        "## Batches",
        "## Pairs",
        "## Choices",
        "## Host and device",
        "## Trained",
        "## Profile",
    ):
        assert head in text
    heads = [line for line in text.splitlines() if line.startswith("| modelled |")]
    assert len(heads) == len(found["shapes"]) + 5
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_a_failing_part_is_named_and_the_others_go_on(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: Any) -> None:
        raise RuntimeError("no\nsuch thing")

    monkeypatch.setattr(gpu, "bandwidth", broken)
    monkeypatch.setattr(gpu, "of_a_pair", lambda run, target, draft: run.found["shapes"])
    assert gpu.main(["--out", str(tmp_path), "--cpu-smoke", "--parts", "shapes"]) == 0
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["skipped"] == [{"what": "bandwidth", "why": "RuntimeError: no such thing"}]
    assert "left out: bandwidth" in (tmp_path / "gpu.md").read_text()


def test_what_does_not_fit_into_the_time_is_left_out(gpu: Any, tmp_path: Path) -> None:
    run = gpu.Run(gpu.smoke_plan(0.0), tmp_path)
    assert not run.fits("something", 10.0)
    assert run.found["skipped"] == [{"what": "something", "why": "needs about 10 s, 0 s are left"}]
    assert gpu.Run(gpu.smoke_plan(60.0), tmp_path).fits("something", 10.0)


def test_a_difference_tells_where_and_how_near_it_was(gpu: Any) -> None:
    """Where captions part, stock's own two best scores stand beside the tolerance."""
    plan = gpu.smoke_plan(60.0)
    shape = gpu.TINY[0][0]
    models = [gpu.build(shape, plan.device, plan.dtype, 3) for _ in range(2)]
    captioner = gpu.RandomCaptioner(gpu.Pair(shape, shape, 0.0), *models, (56, 84))
    video = captioner.video(2, 3)
    stock = gpu.Measurer(captioner, 8).measure(gpu.Configuration("stock"), video, "", 1).token_ids
    with torch.inference_mode():
        logits = captioner.target.model(**video.inputs.tensors).logits[0, -1]
    first, margin, best, within = gpu._difference(captioner, video, stock, (stock[0] + 1, *stock[1:]))
    assert first == 0
    seen = video.inputs.token_ids[0].unique()  # the repetition penalty comes before the choice
    penalised = logits.scatter(0, seen, torch.where(logits < 0, logits * 1.05, logits / 1.05)[seen])
    top = penalised.topk(2).values
    assert best == pytest.approx(float(top[0]), rel=1e-4)
    assert margin == pytest.approx(float(top[0] - top[1]), abs=1e-3)
    assert within == (margin <= gpu.TOLERANCE * max(1.0, abs(best)))
    assert gpu._difference(captioner, video, stock, stock[:5])[0] == 5


def test_what_is_not_finite_does_not_cost_the_rest(gpu: Any, tmp_path: Path) -> None:
    run = gpu.Run(gpu.smoke_plan(60.0), tmp_path)
    run.found["bandwidth"] = {"copy_bytes": 1, "bytes_per_s": 1e12, "flops_per_s": float("inf")}
    run.write()
    written = json.loads((tmp_path / "gpu.json").read_text(), parse_constant=_no_constant)
    assert written["bandwidth"] == {"copy_bytes": 1, "bytes_per_s": 1e12, "flops_per_s": None}


def test_without_cuda_it_says_what_to_do(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "--cpu-smoke" in capsys.readouterr().err


def test_the_plan_for_a_gpu_is_what_is_asked_for(gpu: Any) -> None:
    plan = gpu.full_plan(570.0)
    assert [(target.name, draft.name) for target, draft in plan.pairs] == [
        ("qwen2.5-vl-32b", "qwen2.5-vl-7b"),
        ("qwen2.5-vl-7b", "qwen2.5-vl-3b"),
    ]
    assert sorted(plan.frames) == [16, 64, 128]
    assert set(plan.trees) == {"static", "chain", "dynamic", "auto"}
    assert plan.dtype == torch.bfloat16
    assert plan.budget_s <= 600
