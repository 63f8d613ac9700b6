"""`train bench`: its figures are there and agree, its verdicts follow from them, and it leaves nothing behind."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from beton_factory import build_out
from image_index_factory import with_image_index
from labels.storage import UserError
from train.bench.throughput import Clock, Rate, device_rates, judge
from train.cli import cli
from train.distributed import World

TINY = [
    "--set",
    "train={batch_size: 8, samples: 80, optimizer: {warmup_samples: 8}}",
    "--set",
    "train.runtime={device: cpu, precision: fp32, threads: 1}",
]
TINY += [
    "--set",
    "train.model={trunk: vit_tiny_patch16_224, trunk_args: {patch_size: 8, depth: 1, embed_dim: 24, num_heads: 2}}",
]
TINY += [
    "--set",
    "train.model.image_size=16",
    "--set",
    "train.data.threads=1",
    "--set",
    "train.data.prefetch=1MiB",
    "--seconds",
    "0.1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    with_image_index(build_out(folder, [20, 9]), folder / "shards", folder / "places")
    return folder


def bench(what: str, out: Path, *more: str) -> str:
    result = CliRunner().invoke(cli, ["bench", what, "--beton", str(out), *TINY, *more], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize("mode", ["host", "device"])
def test_the_loader_and_its_parts(folder: Path, mode: str) -> None:
    before = sorted(folder.rglob("*"))
    found = json.loads(
        bench(
            "loader", folder / "out", "--set", f"train.data.resample={mode}", "--json", "--rate", "1", "--rate", "1e9"
        )
    )
    assert (found["resample"], found["threads"]) == (mode, 1)
    assert found["images_per_s"] == pytest.approx(found["images"] / found["seconds"])
    assert found["images"] % 8 == 0
    assert set(found["shares"]) == set(found["stage_us"]) == {"labels", "read", "decode", "resize"}
    assert found["shares"]["decode"] > 0.02
    assert 0.9 < sum(found["shares"].values()) < 1.2  # the stages are timed one by one
    slow, fast = found["verdict"]
    assert (slow["limit"], slow["share"]) == ("none", 1)
    assert fast["limit"] == max(found["shares"], key=found["shares"].get)
    assert fast["share"] == pytest.approx(found["images_per_s"] / 1e9)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("out", ["out", "places"])
def test_the_disk_in_three_ways(folder: Path, out: str) -> None:
    found = json.loads(bench("disk", folder / out, "--json"))
    for name in ("single", "blocks", "cached"):
        assert found[name]["samples"] == 29
        assert found[name]["bytes_per_s"] == pytest.approx(
            found[name]["samples_per_s"] * found[name]["bytes_per_sample"]
        )
    assert 500 < found["single"]["bytes_per_sample"] == found["cached"]["bytes_per_sample"] < 10_000
    assert [verdict["device"].split()[2] for verdict in found["verdict"]] == ["A100", "H100", "B200"]


def test_the_loop_with_and_without_the_loader(folder: Path) -> None:
    found = json.loads(bench("step", folder / "out", "--json"))
    assert found["ratio"] == pytest.approx(found["loader_samples_per_s"] / found["synthetic_samples_per_s"])
    assert 0 <= found["data_wait"] < 1
    assert found["limit"] == ("loader" if found["data_wait"] > 0.03 else "model")
    lines = bench("step", folder / "out").splitlines()
    assert [line.split()[0] for line in lines] == ["synthetic", "loader", "verdict"]


@pytest.mark.parametrize(
    ("seconds", "slow_steps", "warm_up", "steps"),
    [
        (20.0, 0, 5, 5),  # half of the seconds each
        (20.0, 3, 3, 5),  # the first three took 2 seconds more each
        (1.0, 0, 2, 1),  # two steps at least
    ],
)
def test_the_first_half_warms_up(seconds: float, slow_steps: int, warm_up: int, steps: int) -> None:
    now = [100.0]

    def batches() -> Iterator[int]:
        for number in range(1000):
            now[0] += 0.5  # for which the loop waits
            yield number

    clock = Clock(World(0, 1, torch.device("cpu")), seconds, lambda: now[0])
    for number in clock.until(batches()):
        now[0] += 1.5 if number >= slow_steps else 3.5
    assert (clock.warm_up_steps, clock.steps) == (warm_up, steps)
    assert clock.end - clock.begun == pytest.approx(2.0 * steps)
    assert clock.waited == pytest.approx(0.5 * steps)


def test_no_betons_is_an_error() -> None:
    with pytest.raises(UserError, match=r"`train bench` was given no betons(.|\n)*add --beton OUT"):
        CliRunner().invoke(cli, ["bench", "disk"], catch_exceptions=False)


def test_verdicts_follow_from_the_rates() -> None:
    fed, starved = judge([Rate("slow", 100.0), Rate("fast", 4000.0)], 1000.0, "decode", "cores", 5e-4)
    assert fed.line == "verdict      slow, 100 samples/s: fed (it takes 0.1 cores)"
    assert starved.line == "verdict      fast, 4,000 samples/s: decode would limit it to 25% (it takes 2.0 cores)"


def test_device_rates_follow_from_the_models_operations() -> None:
    from labels.settings import Train

    a100, h100, _ = device_rates(Train(), 49_408, ())
    assert h100.samples_per_s / a100.samples_per_s == pytest.approx(989 / 312)
    assert a100.samples_per_s * 3 * 35.2e9 == pytest.approx(0.4 * 312e12, rel=0.1)  # ViT-B/16: 17.6 GMAC a forward pass
    assert [rate.samples_per_s for rate in device_rates(Train(), 49_408, (5.0, 7.0))] == [5.0, 7.0]
