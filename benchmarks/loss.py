"""Loss and head: time and memory, compared with the dense formulas and with three bare matrix products.

Run: python benchmarks/loss.py [--batch 4096 1024 256] [--loss softmax bce asl soft_margin two_way]
                               [--precision fp32 bf16] [--repeats 3]

One step computes logits, loss and the gradients of features, weight and bias, on the CPU. `dense` is the reference
formula of each loss, on a B x V target; `products` are the three matrix products that every linear layer with a
gradient needs (bf16: with bf16 operands). The sides take turns in one process; medians. Memory is the high-water mark
of a separate process, without features, head, labels and what a step of two samples allocates. Labels are drawn from
Zipf's law (about 13 per caption, as in English captions). bf16 means autocast: float32 parameters.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# A script's folder is searched first, where labels.py would hide the package `labels`.
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import numpy as np
import torch
from torch.nn import functional

from labels.settings import Loss
from train.losses.head import HeadLoss, fast_on_cpu

V, W, K = 49_408, 768, 75
LOSSES = ["softmax", "bce", "asl", "soft_margin", "two_way"]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Step = Callable[[], None]


def inputs(batch: int, width: int = W, classes: int = V, device: torch.device | str = "cpu") -> Inputs:
    """Features, weight, bias (all with gradients), label ids and IDF."""
    generator, draw = torch.Generator().manual_seed(0), np.random.default_rng(0)
    features = torch.randn(batch, width, generator=generator).to(device).requires_grad_()
    weight = (torch.randn(classes, width, generator=generator) * width**-0.5).to(device).requires_grad_()
    bias = torch.zeros(classes, device=device, requires_grad=True)
    frequency = 1 / np.arange(1, classes + 1)
    frequency /= frequency.sum()
    label_ids = torch.full((batch, K), -1, dtype=torch.int32)
    for row, count in zip(label_ids, draw.poisson(13, batch).clip(0, K), strict=True):
        ids = np.unique(draw.choice(classes, count, p=frequency))
        row[: len(ids)] = torch.from_numpy(ids)
    return features, weight, bias, label_ids.to(device), torch.from_numpy(-np.log(frequency)).float().to(device)


def dense_targets(label_ids: torch.Tensor, idf: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y and w y, [B, V] each."""
    classes = len(idf)
    y = torch.zeros(len(label_ids), classes + 1, device=idf.device)
    y = y.scatter_(1, label_ids.long() % (classes + 1), 1.0)[:, :classes]
    return y, y * idf


def dense_softmax(logits: torch.Tensor, label_ids: torch.Tensor, idf: torch.Tensor) -> torch.Tensor:
    """x-cls/superclass, ClsLoss."""
    targets = functional.normalize(dense_targets(label_ids, idf)[1], p=1, dim=1)
    return -(functional.log_softmax(logits.float(), dim=1) * targets).sum(dim=1).mean()


def dense_bce(logits: torch.Tensor, label_ids: torch.Tensor, idf: torch.Tensor) -> torch.Tensor:
    """CatLIP's reduction; without IDF, as the paper ran it."""
    y, _ = dense_targets(label_ids, idf)
    return functional.binary_cross_entropy_with_logits(logits.float(), y, reduction="sum") / len(logits)


def dense_soft_margin(logits: torch.Tensor, label_ids: torch.Tensor, idf: torch.Tensor) -> torch.Tensor:
    y, _ = dense_targets(label_ids, idf)
    return functional.multilabel_soft_margin_loss(logits.float(), y)


def dense_asl(logits: torch.Tensor, label_ids: torch.Tensor, idf: torch.Tensor) -> torch.Tensor:
    """Ridnik et al., AsymmetricLoss with the gradient of the powers."""
    y, _ = dense_targets(label_ids, idf)
    p = torch.sigmoid(logits.float())
    q = (1 - p + 0.05).clamp(max=1)
    loss = y * torch.log(p.clamp(min=1e-8)) + (1 - y) * torch.log(q.clamp(min=1e-8))
    weight = torch.pow(1 - (p * y + q * (1 - y)), y + 4 * (1 - y))
    return -(loss * weight).sum() / len(logits)


def dense_two_way(logits: torch.Tensor, label_ids: torch.Tensor, idf: torch.Tensor) -> torch.Tensor:
    """Kobayashi, TwoWayLoss."""
    x, (y, _) = logits.float(), dense_targets(label_ids, idf)
    loss = torch.zeros((), device=x.device)
    for dim in (1, 0):
        has = (y > 0).any(dim=dim)
        p = 4 * torch.logsumexp(-x / 4 + torch.zeros_like(y).masked_fill(y == 0, -torch.inf), dim=dim)[has]
        n = torch.logsumexp(x + torch.zeros_like(y).masked_fill(y != 0, -torch.inf), dim=dim)[has]
        loss = loss + functional.softplus(n + p).mean()
    return loss


def step(side: str, name: str, precision: str, given: Inputs) -> Step:
    """One side's work: dense, fused or products."""
    features, weight, bias, label_ids, idf = given
    if side == "products":
        return products(features, weight, precision)
    dense = {
        "softmax": dense_softmax,
        "bce": dense_bce,
        "asl": dense_asl,
        "soft_margin": dense_soft_margin,
        "two_way": dense_two_way,
    }[name]
    module = HeadLoss(Loss(name=name, idf=name == "softmax"), idf)

    def run() -> None:
        for parameter in (features, weight, bias):
            parameter.grad = None
        with torch.autocast(features.device.type, torch.bfloat16, enabled=precision == "bf16"):
            if side == "fused":
                loss = module(features, weight, bias, label_ids)
            else:
                loss = dense(functional.linear(features, weight, bias), label_ids, idf)
        loss.backward()

    return run


def products(features: torch.Tensor, weight: torch.Tensor, precision: str) -> Step:
    """Logits, and from them the two gradients."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, w = features.detach().to(dtype), weight.detach().to(dtype)
    logits, into_x, into_w = x.new_empty(len(x), len(w)), torch.empty_like(x), torch.empty_like(w)

    def run() -> None:
        torch.mm(x, w.T, out=logits)
        torch.mm(logits, w, out=into_x)
        torch.mm(logits.T, x, out=into_w)

    return run


def peak_mib(side: str, name: str, precision: str, batch: int) -> float:
    """High-water mark of one step in a process of its own, MiB."""
    options = ["--peak-of", side, "--loss", name, "--precision", precision, "--batch", str(batch)]
    command = [sys.executable, __file__, *options]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def print_peak(side: str, name: str, precision: str, batch: int) -> None:
    features, weight, bias, label_ids, idf = inputs(batch)
    few = features[:2].detach().requires_grad_()
    # Not counted: what is loaded once (threads, code, torch._dynamo).
    step(side, name, precision, (few, weight, bias, label_ids[:2], idf))()
    weight.grad = bias.grad = None
    status = Path("/proc/self/status")
    before = int(status.read_text().split("VmRSS:")[1].split()[0])
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    step(side, name, precision, (features, weight, bias, label_ids, idf))()
    print((int(status.read_text().split("VmHWM:")[1].split()[0]) - before) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[4096, 1024, 256])
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=LOSSES)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", choices=["yes", "no", "only"], default="yes")
    parser.add_argument("--peak-of", choices=["dense", "fused"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        print_peak(arguments.peak_of, arguments.loss[0], arguments.precision[0], arguments.batch[0])
        return
    if "bf16" in arguments.precision and not fast_on_cpu(torch.bfloat16):
        print("this CPU has no bf16 instructions: dense and products use torch's fallback, the fused loss uses fp32")
    for batch in arguments.batch:
        for precision in arguments.precision:
            for name in arguments.loss:
                report(name, precision, batch, arguments.repeats, arguments.memory)


def report(name: str, precision: str, batch: int, repeats: int, memory: str) -> None:
    """One line each for time and memory."""
    head = f"B={batch} {precision} {name}:"
    if memory != "only":
        steps = {side: step(side, name, precision, inputs(batch)) for side in ("dense", "fused", "products")}
        seconds: dict[str, list[float]] = {side: [] for side in steps}
        for side, run in steps.items():
            if batch < 4096:
                run()  # one for the caches; long steps do not need it
            seconds[side].clear()
        for _ in range(repeats):
            for side, run in steps.items():
                start = time.perf_counter()
                run()
                seconds[side].append(time.perf_counter() - start)
        dense, fused, three = (statistics.median(seconds[side]) for side in steps)
        ratios = f"{fused / dense:.2f} of dense, {fused / three:.2f} of the products"
        print(f"{head} dense {dense:.2f} s, fused {fused:.2f} s, three products {three:.2f} s: {ratios}", flush=True)
    if memory != "no":
        dense, fused = peak_mib("dense", name, precision, batch), peak_mib("fused", name, precision, batch)
        print(f"{head} dense {dense:,.0f} MiB, fused {fused:,.0f} MiB: {fused / dense:.3f} of dense", flush=True)


if __name__ == "__main__":
    main()
