"""`train plan`: its arithmetic, by hand."""

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from beton_factory import build_out
from labels.config import load_pipeline
from labels.storage import UserError
from train.bench.estimate import Pace, startup_seconds
from train.bench.throughput import LoopRate
from train.cli import cli
from train.costs.flops import Costs, messages, splits_vocabulary

TINY = "trunk: vit_b16, trunk_args: {depth: 2, embed_dim: 64, num_heads: 1}, image_size: 32"


def plan(tmp_path: Path, text: str, *arguments: str) -> dict[str, str]:
    """The lines of a plan by their first word; of several with the same word the last."""
    file = tmp_path / "p.yaml"
    file.write_text(text)
    result = CliRunner().invoke(cli, ["plan", "--config", str(file), *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in result.output.splitlines()}


def test_the_plan_of_a_small_run_by_hand(tmp_path: Path) -> None:
    out = build_out(tmp_path, [30, 20])
    text = (
        f"train: {{samples: 1000, batch_size: 96, model: {{{TINY}}}, "
        "optimizer: {warmup_samples: 96}, runtime: {precision: fp32}}"
    )
    found = plan(tmp_path, text, "--beton", str(out), "--devices", "2", "--rate", "50")
    assert found["steps"] == "10 of 96 samples = 960, 96 of them warm-up"
    assert found["epochs"] == "19.20 of 50"
    trunk = 2 * (12 * 64**2 + 13 * 64) + 3 * 256 * 64 + 5 * 64 + 64 + 4 * 64
    head = 49_408 * 65 + 128
    assert found["parameters"] == f"trunk {trunk / 1e6:.1f}M + head {head / 1e6:.1f}M (49,408 classes)"
    gib = 12 * (trunk + head) / 2**30
    assert found["disk"] == f"{gib:.1f} GiB: 1 of 1 checkpoints of {gib:.2f} GiB are kept"
    gradients = 4 * (trunk + head) / 2**20
    assert found["messages"].startswith(
        f"{gradients:,.0f} MiB of gradients, {4 * head / 2**20:,.0f} MiB (96%) of them the head's; ddp on 2"
    )
    assert found["time"] == "19.2 s at 50 samples/s: 0.01 device-hours"


def test_a_measured_plan_counts_start_and_end(tmp_path: Path) -> None:
    out = build_out(tmp_path, [30, 20])
    text = (
        f"train: {{samples: 1000, batch_size: 8, model: {{{TINY}}}, "
        "optimizer: {warmup_samples: 8}, checkpoint: {every_samples: 400}, "
        "runtime: {device: cpu, precision: fp32, threads: 1}, data: {threads: 1, prefetch: 1MiB}}"
    )
    before = sorted(tmp_path.rglob("*"))
    found = plan(
        tmp_path, text, "--beton", str(out), "--devices", "2", "--measure", "0.2", "--price-per-device-hour", "3600"
    )
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "p.yaml"])
    assert "in batches of 4;" in found["measured"] and "2 devices like this one" in " ".join(found.values())
    number, unit = found["time"].split()[:2]
    seconds = float(number) * {"s": 1, "min": 60, "h": 3600}[unit]
    assert float(found["time"].split()[-1].replace(",", "")) == pytest.approx(2 * seconds, rel=0.05), (
        "a second of two devices costs 2"
    )
    pace = Pace(samples_per_s=100.0, start_s=5.0, pause_s=0.5, memory_gib=1.0)
    assert pace.seconds(1000, checkpoints=3, devices=2) == pytest.approx(5 + 5 + 1.5)


def test_what_the_first_steps_took_longer_counts_once() -> None:
    # 30 samples at 10 a second, of which the first ten took 4 seconds: 3 more, next to 5 of start and end.
    found = LoopRate(samples_per_s=10.0, wait=0.0, samples=30)
    startup = startup_seconds(5.0 + 4.0 + 2.0, found)
    assert startup == pytest.approx(5.0 + 3.0)
    assert Pace(10.0, startup, pause_s=0.0, memory_gib=0.0).seconds(30, checkpoints=0, devices=1) == pytest.approx(11.0)


def test_measuring_needs_betons_and_the_plain_method() -> None:
    for arguments in (["--measure"], ["--measure", "--beton", "out", "--method", "clip"]):
        with pytest.raises(UserError, match=r"--measure trains as `train run` does(.|\n)*add --beton"):
            CliRunner().invoke(cli, ["plan", *arguments], catch_exceptions=False)


def test_epochs_are_not_guessed_and_mfu_is_printed_where_the_peak_is_known(tmp_path: Path) -> None:
    text = f"train: {{model: {{{TINY}}}, runtime: {{peak_tflops: 0.001}}}}"
    found = plan(tmp_path, text, "--rate", "100")
    assert found["epochs"] == "not known: give --beton OUT"
    assert "% of a device's 0 TFLOP/s" in found["time"] and "a given rate holds" in found["assumed"]
    assert "messages" not in found


def test_the_recipes_plan(tmp_path: Path) -> None:
    found = plan(
        tmp_path,
        "",
        "--recipe",
        "superclass-512m",
        "--devices",
        "256",
        "--rate",
        "10000",
        "--price-per-device-hour",
        "2",
        "--set",
        "train.model.trunk=vit_s16",
    )
    assert found["steps"].startswith("31,250 of 16,384 samples = 512,000,000, 8,192,000 of them warm-up")
    assert found["parameters"] == "trunk 21.7M + head 19.0M (49,408 classes)"
    assert found["time"] == "14.2 h at 10,000 samples/s: 3,640.89 device-hours, cost 7,281.78"


@pytest.mark.parametrize(("parallel", "sent"), [("ddp", 2 * 3 / 4 * 400), ("fsdp", 3 * 3 / 4 * 400)])
def test_what_a_step_sends(parallel: str, sent: float) -> None:
    costs = Costs(trunk=75 * 2**20, head=25 * 2**20, flops=1, width=256)
    settings = load_pipeline(overrides=[f"train.runtime.parallel={parallel}"]).train
    text = messages(costs, settings, 4, torch.device("cpu"))
    assert text.startswith("400 MiB of gradients, 100 MiB (25%) of them the head's")
    assert f"each sends {sent:,.0f} MiB a step" in text


@pytest.mark.parametrize(
    ("asked", "batch", "split"),
    [("false", 1024, False), ("true", 90_112, True), ("auto", 1024, True), ("auto", 90_112, False)],
)
def test_the_heads_messages_whole_and_split(asked: str, batch: int, split: bool) -> None:
    costs = Costs(trunk=75 * 2**20, head=49_408 * 769 + 2 * 768, flops=1, width=768)
    keys = [f"loss.split_vocabulary={asked}", f"batch_size={batch}", "runtime.precision=bf16"]
    settings = load_pipeline(overrides=[f"train.{key}" for key in keys]).train
    text = messages(costs, settings, 4, torch.device("cpu"))
    # A ring of four: 3/4 of all, twice where what is reduced is spread again. Features go in bf16, their gradients in
    # float32.
    whole, apart = 2 * 3 / 4 * 4 * costs.head / 2**20, 3 / 4 * batch * 768 * (2 + 4) / 2**20
    assert (
        f"for the head {whole:,.0f} MiB whole, {apart:,.0f} MiB split by class: {'split' if split else 'whole'}" in text
    )
    assert f"each sends {2 * 3 / 4 * 300 + (apart if split else whole):,.0f} MiB a step" in text


def test_more_ranks_than_the_classes_are_good_for() -> None:
    settings = load_pipeline(overrides=["train.loss.split_vocabulary=true"]).train
    assert splits_vocabulary(49_408, 768, settings, 256, torch.device("cpu"))
    with pytest.raises(UserError, match=r"49,408 classes in parts of 97 leave some of the 512 ranks without"):
        splits_vocabulary(49_408, 768, settings, 512, torch.device("cpu"))
    by_itself = load_pipeline(overrides=["train.loss.split_vocabulary=auto"]).train
    assert not splits_vocabulary(49_408, 768, by_itself, 512, torch.device("cpu"))


def test_whether_a_step_fits(tmp_path: Path) -> None:
    text = f"train: {{batch_size: 65536, model: {{{TINY}}}, runtime: {{precision: bf16}}}}"
    found = plan(tmp_path, text, "--rate", "100")
    assert "fits" not in found or torch.cuda.is_available()
    assert "for the activations of 65536 samples at a time (bfloat16)" in found["memory"]
    total = float(found["memory"].split()[0])
    assert sum(map(float, re.findall(r"([0-9.]+) for", found["memory"]))) == pytest.approx(total, abs=0.2)

    found = plan(tmp_path, text, "--rate", "100", "--device-memory", "2GiB")
    assert found["fits"].startswith(f"no: {total:.1f} of 2.0 GiB, 1.8 of which are for the step; ")
    option, _, change = found["fits"].rpartition(": ")[2].partition(" ")
    assert option == "--set" and change.startswith("train.runtime.accumulation=")
    found = plan(tmp_path, text, "--rate", "100", "--device-memory", "2GiB", option, change)
    assert found["fits"].startswith("yes: ") and "at most about" in found["fits"]
    found = plan(tmp_path, text, "--rate", "100", "--device-memory", "80GiB")
    assert found["fits"].startswith(f"yes: {total:.1f} of 80.0 GiB, 72.0 of which are for the step; ")


def test_a_gpu_that_is_not_here_computes_in_bf16(tmp_path: Path) -> None:
    text = f"train: {{model: {{{TINY}}}}}"
    assert "(bfloat16)" in plan(tmp_path, text, "--rate", "100", "--device-memory", "2GiB")["memory"]


@pytest.mark.parametrize("size", ["80", "-1GiB", "80GB", "0GiB", "nanGiB", "infGiB", "much"])
def test_a_device_memory_that_is_no_size(size: str) -> None:
    result = CliRunner().invoke(cli, ["plan", "--device-memory", size])
    assert result.exit_code == 2 and "e.g. 80GiB" in result.output


def test_two_towers_and_a_frozen_one() -> None:
    arguments = ["plan", "--devices", "2", "--rate", "1000", "--set", "train.model.trunk=vit_s16"]
    lines = {}
    for method in ("run", "clip", "lit"):
        said = CliRunner().invoke(cli, [*arguments, "--method", method], catch_exceptions=False)
        assert said.exit_code == 0, said.output
        lines[method] = dict(line.split(maxsplit=1) for line in said.output.splitlines())
    assert "+ head" in lines["run"]["parameters"] and "classes" in lines["run"]["parameters"]
    # open_clip's ViT-B-32 has a text tower of 63.4M; the projection is 384 x 512, and one number is the scale.
    assert lines["clip"]["parameters"] == "trunk 21.7M + text tower 63.6M (49,408 tokens)"
    assert lines["lit"]["parameters"] == "trunk 21.7M frozen + text tower 63.6M (49,408 tokens)"
    flops = {method: float(line["operations"].split()[0]) for method, line in lines.items()}
    assert flops["lit"] < flops["clip"]
    # The tower of open_clip's ViT-B-32 takes about 3 GMAC a caption: 12 blocks of 512 on 77 tokens.
    assert flops["clip"] - flops["lit"] == pytest.approx(2 * 9.2, rel=0.05), (
        "the backward pass of a ViT-S/16 of 4.6 GMAC"
    )
    text = str(
        CliRunner().invoke(cli, [*arguments, "--method", "clip", "--set", "train.runtime.accumulation=2"]).exception
    )
    assert "`train clip` compares every image" in text


@pytest.mark.parametrize(
    ("overrides", "devices", "problem"),
    [
        (["batch_size=64"], 3, "train.batch_size is 64, the number of ranks 3, train.runtime.accumulation 1"),
        (["batch_size=64", "runtime.accumulation=8"], 16, "train.batch_size is 64, the number of ranks 16"),
        (["loss.name=two_way", "runtime.accumulation=2"], 1, "train.loss.name is two_way"),
        (["loss.split_vocabulary=true"], 512, "leave some of the 512 ranks without classes"),
        (["model.trunk=vit_l14", "model.image_size=64"], 1, "train.model.image_size is 64"),
        (["model.trunk=swin_tiny_patch4_window7_224", "model.image_size=64"], 1, "train.model.image_size 64"),
        (["model.trunk=resnet18", "model.image_size=32", "batch_size=2"], 2, "resnet18 cannot be trained on one image"),
        (["model.trunk_args={num_classes: 3}"], 1, "train.model.trunk_args.num_classes is 3"),
        (["model.trunk=dla46x_c", "model.grad_checkpointing=true"], 1, "timm has no gradient checkpointing"),
    ],
)
def test_a_plan_is_refused_as_its_run_would_be(overrides: list[str], devices: int, problem: str) -> None:
    sets = [word for key in overrides for word in ("--set", f"train.{key}")]
    with pytest.raises(UserError) as caught:
        CliRunner().invoke(cli, ["plan", "--devices", str(devices), "--rate", "9", *sets], catch_exceptions=False)
    assert problem in str(caught.value)
