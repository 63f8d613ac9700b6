"""Phase c: a training step of ViT-B/16 and L/16 at 224 pixels, bf16, compiled and not.

random batches on the device -> the project's loop -> samples/s, MFU (train/costs/flops.py), memory
loss alone, optimiser alone -> their shares of a step      torch.profiler -> profile-<trunk>.txt, .json.gz
open_clip's CLIP step with its own ViT of that size, if open_clip is installed
"""

import gzip
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from kit import SMALL_VIT, Kit, Result
from torch.profiler import ProfilerActivity, profile

from labels.settings import Train
from train.bench.throughput import loop_rate, without_logs_and_checkpoints
from train.costs.flops import model_costs, peak_flops
from train.data.inputs import SyntheticBatch, synthetic_batches, synthetic_inputs
from train.loop import TrainState
from train.metrics import Speed
from train.optim import autocast_dtype

GOALS = {"vit_b16": 0.50, "vit_l16": 0.55}  # MFU, compiled
RUNS = (  # trunk, compiled, batch, seconds that it takes with compilation; in order of worth
    ("vit_b16", True, 512, 45),
    ("vit_b16", False, 512, 12),
    ("vit_l16", True, 256, 50),
    ("vit_b16", True, 1024, 25),
    ("vit_l16", False, 256, 15),
    ("vit_b16", True, 256, 25),
    ("vit_l16", True, 512, 30),
)
_OPEN_CLIP = {"vit_b16": "ViT-B-16", "vit_l16": "ViT-L-16"}
_PROFILED_STEPS, _PROFILED_LINES = 3, 40
_ENDLESS = 1 << 40


def run(kit: Kit) -> None:
    torch.set_float32_matmul_precision("high")  # as `train run`
    runs = (("small ViT", False, 32, 5),) if kit.small else RUNS
    for number, (trunk, compiled, batch, seconds) in enumerate(runs):
        how = "compiled" if compiled else "not compiled"
        goal = f"MFU >= {GOALS[trunk]:.0%}" if compiled and trunk in GOALS else ""
        name = f"{trunk} B={batch} {how}"
        kit.item(name, partial(measure, kit, trunk, compiled, batch, profiled=number == 0), goal=goal, seconds=seconds)
        if number in (1, 4) or kit.small:
            kit.item(f"open_clip CLIP, {trunk} B={batch}", partial(open_clip_step, kit, trunk, batch), seconds=20)


def settings_of(kit: Kit, trunk: str, compiled: bool, batch: int) -> Train:
    model = SMALL_VIT if kit.small else f"{{trunk: {trunk}, compile: {str(compiled).lower()}}}"
    keys = (f"model={model}", f"batch_size={batch}", "runtime.precision=bf16")
    return without_logs_and_checkpoints(kit.pipeline(*keys).train)


def measure(kit: Kit, trunk: str, compiled: bool, batch: int, *, profiled: bool) -> Result:
    settings, vocabulary = settings_of(kit, trunk, compiled, batch), 1000 if kit.small else 49_408
    train_state = kit.train_state(settings, vocabulary)
    batches = synthetic_batches(settings, vocabulary, 75, kit.world, _ENDLESS)
    seconds = 1.0 if kit.small else 6.0
    rate = loop_rate(batches, synthetic_inputs, train_state, settings, kit.world, seconds).samples_per_s
    speed = Speed(model_costs(settings.model, vocabulary).flops, peak_flops(settings, kit.device))
    mfu, step_ms = speed.utilisation(rate), 1e3 * batch / rate
    memory = torch.cuda.max_memory_allocated() / 2**30 if kit.on_gpu else None
    one = next(batches)
    loss_ms, optimizer_ms = kit.milliseconds(*parts(kit, settings, train_state, one))
    figures: dict[str, Any] = {"samples_per_s": rate, "mfu": mfu, "memory_gib": memory, "step_ms": step_ms}
    figures |= {"loss_ms": loss_ms, "optimizer_ms": optimizer_ms}
    text = f"{rate:,.0f} samples/s"
    text += f", MFU {mfu:.1%}" if mfu is not None else ""
    text += f", {memory:.1f} GiB" if memory is not None else ""
    text += f"; loss {loss_ms / step_ms:.1%}, optimiser {optimizer_ms / step_ms:.1%} of {step_ms:.1f} ms"
    if profiled:
        figures |= write_profile(kit, f"profile-{trunk.replace(' ', '-')}", settings, train_state)
        text += f"; {figures['kernels']} kernels a step, device busy {figures['busy']:.1%}" if kit.on_gpu else ""
    goal = GOALS.get(trunk) if compiled else None
    return Result(text, None if goal is None or mfu is None else mfu >= goal, figures)


def parts(
    kit: Kit, settings: Train, train_state: TrainState, batch: SyntheticBatch
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The loss with its head alone, forward and backward on given features; the optimizer's step alone."""
    model: Any = train_state.model
    dtype = autocast_dtype(settings.runtime.precision, kit.device)
    features = torch.randn(len(batch.images), model.trunk.num_features, device=kit.device, requires_grad=True)
    norm, linear = model.head

    def loss() -> None:
        with torch.autocast(kit.device.type, dtype, enabled=dtype is not None):
            model.loss(norm(features), linear.weight, linear.bias, batch.label_ids).backward()

    def optimizer() -> None:
        train_state.optimizer.step()

    return loss, optimizer


def write_profile(kit: Kit, name: str, settings: Train, train_state: TrainState) -> dict[str, Any]:
    """Profile a few steps of the loop: a table of the costliest operations, and a trace for chrome://tracing.

    Returns the device's kernels of a step, and the share of the time between the first and the last in which one runs.
    """
    batches = synthetic_batches(settings, len(train_state.model.loss.idf), 75, kit.world, _PROFILED_STEPS)  # type: ignore
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if kit.on_gpu else [])
    with profile(activities=activities) as profiler:
        kit.run_steps(train_state, settings, batches, synthetic_inputs, _PROFILED_STEPS)
    order = "self_cuda_time_total" if kit.on_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=_PROFILED_LINES, max_name_column_width=90)
    (kit.out / f"{name}.txt").write_text(table, encoding="utf8")
    trace = kit.work / f"{name}.json"
    profiler.export_chrome_trace(str(trace))
    with open(trace, "rb") as source, gzip.open(kit.out / f"{name}.json.gz", "wb") as target:
        shutil.copyfileobj(source, target)
    trace.unlink()
    kernels = [event for event in profiler.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA]
    if not kernels:
        return {}
    spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    busy, reached = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return {"kernels": len(kernels) // _PROFILED_STEPS, "busy": busy / (reached - spans[0][0])}


def open_clip_step(kit: Kit, trunk: str, batch: int) -> Result:
    """open_clip's model, loss and autocast, with torch's fused AdamW, not compiled; texts are random tokens."""
    try:
        import open_clip
    except ImportError as error:
        return Result(f"open_clip is not installed: {error}")
    if kit.small:
        vision = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32}
        text = {"layers": 1, "width": 64, "heads": 2}
        model = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)
    else:
        model = open_clip.create_model(_OPEN_CLIP[trunk])
    model = model.to(kit.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.2, fused=True)
    loss, side = open_clip.ClipLoss(), 32 if kit.small else 224
    images = torch.randn(batch, 3, side, side, device=kit.device)
    texts = torch.randint(1, 49_405, (batch, 77), device=kit.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(kit.device.type, torch.bfloat16):
            loss(*model(images, texts)[:3]).backward()
        optimizer.step()

    (spent,) = kit.milliseconds(step)
    rate = 1e3 * batch / spent
    memory = torch.cuda.max_memory_allocated() / 2**30 if kit.on_gpu else None
    text = f"{rate:,.0f} samples/s" + (f", {memory:.1f} GiB" if memory is not None else "")
    return Result(text, figures={"samples_per_s": rate, "step_ms": spent, "memory_gib": memory})
