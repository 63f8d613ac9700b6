"""Phase e: the demo, from betons to its linear probe: `train run`, then `train probe`, with their time and result."""

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from kit import SMALL_VIT, Kit, Result

CONFIG = Path(__file__).resolve().parents[2] / "examples" / "openclipart" / "demo.yaml"


def run(kit: Kit) -> None:
    folder = kit.work / "demo"
    kit.item("train run", partial(train, kit, folder), goal="the loss falls", seconds=20)
    kit.item("train probe", partial(probe, kit, folder), goal="better than an untrained trunk", seconds=20)


def command(kit: Kit, *words: object, keys: tuple[str, ...] = ()) -> float:
    """Run `train WORDS` to its end; its seconds. RuntimeError if it fails."""
    begun = time.monotonic()
    keys = (f"train.runtime.device={kit.device.type}", "train.log.tensorboard=false", *keys)
    keys += ("train.runtime.threads=1",) if kit.small else ()
    line = [sys.executable, "-m", "train", *map(str, words), "--config", str(CONFIG)]
    line += [word for key in keys for word in ("--set", key)]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=max(kit.seconds_left, 1))
    print(ended.stdout, ended.stderr, flush=True)
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(next((text for text in lines if text.startswith("error:")), lines[-1]))
    return time.monotonic() - begun


def train(kit: Kit, run_folder: Path) -> Result:
    out = kit.data / "clipart" / "out"
    if not out.is_dir():
        return Result("no data")
    keys = ("train.samples=1280", "train.optimizer.warmup_samples=128", f"train.model={SMALL_VIT}") if kit.small else ()
    seconds = command(kit, "run", "--beton", out, "--out", run_folder, keys=keys)
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    tenth = max(len(losses) // 10, 1)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    samples = lines[-1]["samples"]
    text = f"{samples:,} samples in {seconds:.1f} s with start and end, loss {first:.2f} -> {last:.2f}"
    return Result(text, last < first, {"samples": samples, "seconds": seconds, "losses": [first, last]})


def probe(kit: Kit, run_folder: Path) -> Result:
    clipart = kit.data / "clipart"
    if not (clipart / "test").is_dir():
        return Result("no data")
    result = kit.work / "probe.json"
    words = (
        "--train",
        clipart / "train",
        "--test",
        clipart / "test",
        "--cache",
        kit.work / "features",
        "--out",
        result,
    )
    encoders = ("--encoder", f"untrained:{run_folder}", "--encoder", f"run:{run_folder}")
    keys = ("probe.seeds=[0]", "probe.max_iterations=100")
    keys = ("probe.seeds=[0]", "probe.max_iterations=20", "probe.weight_decay=[1e-2]") if kit.small else keys
    seconds = command(kit, "probe", *words, *encoders, keys=keys)
    return read_probe(json.loads(result.read_text(encoding="utf8")), seconds)


def read_probe(result: dict[str, Any], seconds: float) -> Result:
    """Top-1 of the trained and the untrained trunk, from the JSON of `train probe`."""
    tops = {row["encoder"].partition(":")[0]: row["top1"] for row in result["results"]}
    text = f"top-1 {tops['run']:.1%}, untrained {tops['untrained']:.1%}, majority class {tops['majority class']:.1%}"
    return Result(f"{text}, {seconds:.1f} s", tops["run"] > tops["untrained"], tops | {"seconds": seconds})
