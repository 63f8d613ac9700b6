"""Phase a: the trainer computes on the device what it computes elsewhere.

The losses against float64 on the CPU, in three precisions, by kernels and without; one step repeated; a killed run
resumed; DDP and FSDP2 with one rank; resampling against PIL; colour jitter, autocast and CLIP's loss against the CPU.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from kit import SMALL_VIT, Kit, Result
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from labels.manifest import PAD_ID
from labels.settings import Data, Loss, Train
from train.checkpoint import checkpoint_folders
from train.data.inputs import draw, jitter, resample_canvas, synthetic_batches, synthetic_inputs
from train.data.resize import vertical_first
from train.distributed import repeated_blocks, whole
from train.loop import TrainState
from train.losses.contrastive import contrastive_loss
from train.losses.head import HeadLoss
from train.losses.kinds import softmax
from train.trainer import as_train_state

LOSSES = ("softmax", "bce", "asl", "soft_margin", "two_way")
LIMITS = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 2e-2}  # of the relative error of the loss and of each gradient
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_RESUMED = "samples=30720,batch_size=256,optimizer.warmup_samples=2560,checkpoint.every_samples=10240"
_RESUMED_SMALL = "samples=480,batch_size=16,optimizer.warmup_samples=64,checkpoint.every_samples=160"


def run(kit: Kit) -> None:
    for name in LOSSES:
        for kernels in (
            (True, False) if name == "softmax" and softmax.serves(torch.zeros(1, device=kit.device)) else (False,)
        ):
            how = "Triton kernels" if kernels else "torch"
            goal = "error " + ", ".join(f"{precision} <= {limit:g}" for precision, limit in LIMITS.items())
            kit.item(f"loss {name}, {how}", partial(loss_errors, kit, name, kernels), goal=goal, seconds=3)
    kit.item("step repeated, small ViT", partial(repeated, kit, SMALL_VIT), goal="the same bits", seconds=5)
    if not kit.small:
        kit.item("step repeated, vit_b16", partial(repeated, kit, "{trunk: vit_b16}"), goal="the same bits", seconds=8)
        kit.item(
            "step repeated, vit_b16, deterministic algorithms",
            partial(repeated, kit, "{trunk: vit_b16}", deterministic=True),
            goal="the same bits",
            seconds=8,
        )
    for wrapper in (ddp, fsdp):
        name = f"{wrapper.__name__.upper()}, one rank, {'NCCL' if kit.on_gpu else 'gloo'}"
        kit.item(name, partial(one_rank, kit, wrapper), goal="error <= 1e-3", seconds=5)
    kit.item("resampling", partial(resampling, kit), goal="at most 1 level from PIL", seconds=3)
    kit.item("colour jitter", partial(colour_jitter, kit), goal="at most 1e-4 from the CPU", seconds=3)
    kit.item("autocast", partial(autocast, kit), goal="loss within 2% of fp32", seconds=5)
    kit.item("loss of CLIP", partial(clip_loss, kit), goal="error <= 1e-4", seconds=2)
    kit.item("resume after SIGKILL", partial(resumed, kit), goal="the same losses and weights", seconds=20)


# -- losses


def loss_errors(kit: Kit, name: str, kernels: bool) -> Result:
    """The largest relative error, in the norm, of the loss and its three gradients, in each precision."""
    batch, width, classes = (16, 32, 500) if kit.small else (128, 768, 49_408)
    generator = torch.Generator().manual_seed(1)
    features, weight = torch.randn(batch, width, generator=generator), torch.randn(classes, width, generator=generator)
    operands = features, weight * width**-0.5, 0.1 * torch.randn(classes, generator=generator)
    label_ids = torch.randint(classes, (batch, 20), generator=generator, dtype=torch.int32)
    label_ids[1, 5:], label_ids[2] = PAD_ID, PAD_ID
    idf = 9 * torch.rand(classes, generator=generator)
    exact = loss_and_gradients(name, [operand.double() for operand in operands], label_ids, idf.double(), None)
    serves, found = softmax.serves, {}
    softmax.serves = serves if kernels else lambda logits: False
    try:
        for precision, dtype in _DTYPES.items():
            on_device = [operand.to(kit.device) for operand in operands]
            values = loss_and_gradients(name, on_device, label_ids.to(kit.device), idf.to(kit.device), dtype)
            found[precision] = max(relative_error(*pair) for pair in zip(values, exact, strict=True))
    finally:
        softmax.serves = serves
    text = ", ".join(f"{precision} {error:.1e}" for precision, error in found.items())
    return Result(text, all(error <= LIMITS[precision] for precision, error in found.items()), found)


def loss_and_gradients(
    name: str, operands: list[torch.Tensor], label_ids: torch.Tensor, idf: torch.Tensor, dtype: torch.dtype | None
) -> list[torch.Tensor]:
    leaves = [operand.detach().clone().requires_grad_() for operand in operands]
    device, lower = leaves[0].device.type, dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(device, dtype, enabled=lower):
        loss = HeadLoss(Loss(name=name, memory=1 << 22), idf).to(leaves[0].device)(*leaves, label_ids)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """|value - exact| / |exact|; infinite for NaN."""
    error = float((value.double().cpu() - exact.double().cpu()).norm() / exact.double().cpu().norm())
    return error if error == error else float("inf")


def clip_loss(kit: Kit) -> Result:
    generator = torch.Generator().manual_seed(2)
    images, texts = (functional.normalize(torch.randn(64, 128, generator=generator), dim=1) for _ in range(2))
    logits = 50 * images.double() @ texts.double().T
    own = torch.arange(64)
    exact = (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2
    valid, scale = torch.ones(64, dtype=torch.bool, device=kit.device), torch.tensor(50.0, device=kit.device)
    error = relative_error(contrastive_loss(images.to(kit.device), texts.to(kit.device), valid, scale, None), exact)
    return Result(f"{error:.1e}", error <= 1e-4, {"error": error})


# -- steps


def steps(kit: Kit, settings: Train, train_state: TrainState, count: int) -> list[float]:
    batches = synthetic_batches(settings, 1000, 20, kit.world, count)
    return kit.run_steps(train_state, settings, batches, synthetic_inputs, count)


def repeated(kit: Kit, model: str, deterministic: bool = False) -> Result:
    """Two models from the same seed, three steps each: all losses and weights are compared."""
    settings = kit.pipeline(f"model={model}", "batch_size=32").train
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        ends = []
        for _ in range(2):
            train_state = kit.train_state(settings, 1000)
            ends.append((steps(kit, settings, train_state, 3), train_state.model.state_dict()))
    finally:
        torch.use_deterministic_algorithms(False)
    (losses, weights), (again, others) = ends
    different = [name for name, tensor in weights.items() if not torch.equal(tensor, others[name])]
    if not different and losses == again:
        return Result("the same bits", True)
    return Result(f"{len(different)} of {len(weights)} tensors differ, e.g. {different[:2]}", False)


def ddp(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def fsdp(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    mesh = init_device_mesh(device.type, (1,))
    for block in repeated_blocks(model.trunk).values():  # type: ignore[arg-type]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def one_rank(kit: Kit, wrapper: Callable[[torch.nn.Module, torch.device], torch.nn.Module]) -> Result:
    """Three steps of the wrapped model against three of the bare one: the largest relative error of a weight."""
    settings = kit.pipeline(f"model={SMALL_VIT}", "batch_size=32", "runtime.precision=fp32").train
    bare = kit.train_state(settings, 1000)
    steps(kit, settings, bare, 3)
    store = f"file://{kit.work}/store-{wrapper.__name__}-{os.getpid()}"
    device = kit.device if kit.on_gpu else None
    dist.init_process_group("nccl" if kit.on_gpu else "gloo", store, world_size=1, rank=0, device_id=device)
    try:
        model = kit.train_state(settings, 1000).model
        train_state = as_train_state(model, wrapper(model, kit.device), settings, kit.world)
        steps(kit, settings, train_state, 3)
        weights = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    finally:
        dist.destroy_process_group()
    error = max(relative_error(tensor, bare.model.state_dict()[name]) for name, tensor in weights.items())
    return Result(f"{error:.1e}", error <= 1e-3, {"error": error})


def autocast(kit: Kit) -> Result:
    found = {}
    for precision in ("fp32", "bf16", "fp16"):
        settings = kit.pipeline(f"model={SMALL_VIT}", "batch_size=32", f"runtime.precision={precision}").train
        found[precision] = steps(kit, settings, kit.train_state(settings, 1000), 1)[0]
    text = ", ".join(f"{precision} {loss:.4f}" for precision, loss in found.items())
    return Result(text, all(abs(loss / found["fp32"] - 1) <= 0.02 for loss in found.values()), found)


# -- a killed run


def resumed(kit: Kit) -> Result:
    """`train run` undisturbed, and killed after its first checkpoint and started again; losses and files compared."""
    if not (kit.data / "clipart" / "out" / "manifest.json").is_file():
        return Result("no data")
    whole_run, killed_run = (kit.work / f"resume-{name}-{os.getpid()}" for name in ("whole", "killed"))
    last, kill_at = (30, 15) if kit.small else (120, 60)  # steps; there are three checkpoints
    to_the_end(kit, whole_run)
    killed = start(kit, killed_run)
    while killed.poll() is None and losses_written(killed_run) < kill_at and kit.seconds_left > 0:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    reached, kept = losses_written(killed_run), [folder.name for folder in checkpoint_folders(killed_run)]
    to_the_end(kit, killed_run)
    same_losses = read_losses(whole_run) == read_losses(killed_run)
    ends = [sorted(checkpoint_folders(run)[-1].glob("*.safetensors")) for run in (whole_run, killed_run)]
    different = [one.name for one, other in zip(*ends, strict=True) if one.read_bytes() != other.read_bytes()]
    text = f"killed at step {reached} of {last} with {kept}: losses {'equal' if same_losses else 'differ'}"
    text += f", files differ: {different}" if different else ", weights and moments equal"
    return Result(text, bool(kept) and reached < last and same_losses and not different)


def start(kit: Kit, run: Path) -> subprocess.Popen[bytes]:
    keys = (_RESUMED_SMALL if kit.small else _RESUMED).split(",")
    keys += [
        f"model={SMALL_VIT}",
        "log.tensorboard=false",
        "log.every_seconds=0.01",
        f"runtime.device={kit.device.type}",
        "runtime.threads=1",
    ]
    command = [sys.executable, "-m", "train", "run", "--beton", kit.data / "clipart" / "out", "--out", run]
    command += [word for key in keys for word in ("--set", f"train.{key}")]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)


def to_the_end(kit: Kit, run: Path) -> None:
    """`train run`, or RuntimeError if it fails or takes longer than the phase."""
    process = start(kit, run)
    try:
        code = process.wait(timeout=max(kit.seconds_left, 1))
    except subprocess.TimeoutExpired:
        process.kill()
        raise RuntimeError("`train run` did not end in the phase's time") from None
    if code:
        raise RuntimeError(f"`train run` ended with {code}")


def read_losses(run: Path) -> list[str]:
    """The lines of all steps, with loss, rate and gradient norm."""
    return [line for line in (run / "metrics.jsonl").read_text(encoding="utf8").splitlines() if '"loss"' in line]


def losses_written(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.is_file() else 0


# -- images


def resampling(kit: Kit) -> Result:
    """Crops of noise, upright and flat, to the model's size; PIL resizes in the same two passes."""
    size, rng, largest = (32 if kit.small else 224), np.random.default_rng(0), 0
    torch.set_float32_matmul_precision("high")  # as `train run`
    for width, height in ((500, 375), (375, 500), (256, 256), (60, 700), (900, 200), (130, 150)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        first = vertical_first(width, height, size)
        between = (width, size) if first else (size, height)
        by_pil = Image.fromarray(pixels).resize(between, Image.Resampling.BICUBIC)
        expected = np.asarray(by_pil.resize((size, size), Image.Resampling.BICUBIC), int)
        boxes = torch.tensor([[0, 0, width, height, 0, 0, width, height, 0]], dtype=torch.float32, device=kit.device)
        canvas = torch.from_numpy(pixels[None].copy()).to(kit.device)
        resampled = resample_canvas(canvas, boxes, np.array([first]), size)[0].permute(1, 2, 0).cpu().numpy()
        largest = max(largest, int(np.abs(resampled.astype(int) - expected).max()))
    torch.set_float32_matmul_precision("highest")
    return Result(f"at most {largest} levels", largest <= 1, {"levels": largest})


def colour_jitter(kit: Kit) -> Result:
    rows, rng = 32, np.random.default_rng(0)
    images = torch.from_numpy(rng.random((rows, 3, 48, 48), np.float32))
    drawn = draw(np.array(Data().color_jitter), 0.8, 0.2, 0, np.zeros(rows, np.int64), np.arange(rows))
    on_device = images.to(kit.device, copy=True)
    jitter(images, *drawn)
    jitter(on_device, *drawn)
    largest = float((images - on_device.cpu()).abs().max())
    return Result(f"at most {largest:.1e} of 1", largest <= 1e-4, {"difference": largest})
