"""Phase b: time and device memory of a step of head and loss, bf16.

Fused (the project's), dense (the formula on a B x V target), torch's F.linear_cross_entropy with dense probabilities
where torch has it, and the three bare matrix products that every linear layer with a gradient needs. Memory is beyond
features, weights and their gradients. B batch, D width, V = 49,408 classes.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from kit import Kit, Result
from torch.nn import functional

SIZES = ((8192, 768), (2048, 768), (512, 768), (8192, 1024), (2048, 1024), (512, 1024))
OTHERS = ("bce", "asl", "soft_margin", "two_way")
PRODUCTS_GOAL, MEMORY_GOAL = 1.15, 0.1


def run(kit: Kit) -> None:
    classes = 2000 if kit.small else 49_408
    for batch, width in ((64, 32),) if kit.small else SIZES:
        goal = f"time <= {PRODUCTS_GOAL} of the products, memory <= {MEMORY_GOAL} of dense"
        kit.item(
            f"softmax B={batch} D={width}",
            partial(compare, kit, "softmax", batch, width, classes),
            goal=goal,
            seconds=8,
        )
    batch, width = (64, 32) if kit.small else (2048, 768)
    for name in OTHERS:
        kit.item(f"{name} B={batch} D={width}", partial(compare, kit, name, batch, width, classes), seconds=5)


def compare(kit: Kit, name: str, batch: int, width: int, classes: int) -> Result:
    """All sides in turns, then the memory of each."""
    module = formulas()
    given = module.inputs(batch, width, classes, kit.device)
    sides: dict[str, Callable[[], Any]] = {
        "fused": module.step("fused", name, "bf16", given),
        "dense": module.step("dense", name, "bf16", given),
        "products": module.step("products", name, "bf16", given),
    }
    if name == "softmax" and hasattr(functional, "linear_cross_entropy"):  # torch 2.13 has it, 2.11 has not
        sides["torch"] = torch_step(module, given)
    times = dict(zip(sides, kit.milliseconds(*sides.values()), strict=True))
    memory = {side: kit.peak_mib(step) for side, step in sides.items() if side != "products"}
    figures: dict[str, Any] = {"ms": times, "mib": memory}
    text = ", ".join(f"{side} {spent:.2f} ms" for side, spent in times.items())
    of_products = times["fused"] / times["products"]
    text += f"; fused {of_products:.2f} of the products, {times['fused'] / times['dense']:.2f} of dense"
    if memory["fused"] is None or memory["dense"] is None:
        return Result(text, figures=figures)
    share = memory["fused"] / memory["dense"]
    text += "; " + ", ".join(f"{side} {value:,.0f} MiB" for side, value in memory.items()) + f", {share:.3f} of dense"
    ok = of_products <= PRODUCTS_GOAL and share <= MEMORY_GOAL
    return Result(text, ok if name == "softmax" else None, figures)


def torch_step(module: ModuleType, given: tuple[torch.Tensor, ...]) -> Callable[[], None]:
    """Chunked, with targets made in each step, as the dense side does."""
    features, weight, bias, label_ids, idf = given
    options = getattr(torch.nn, "LinearCrossEntropyOptions", lambda: None)()

    def step() -> None:
        leaves = [operand.detach().bfloat16().requires_grad_() for operand in (features, weight, bias)]
        targets = functional.normalize(module.dense_targets(label_ids, idf)[1], p=1, dim=1).bfloat16()
        functional.linear_cross_entropy(  # type: ignore[attr-defined]
            leaves[0], leaves[1], targets, linear_bias=leaves[2], options=options
        ).backward()

    return step


def formulas() -> ModuleType:
    """benchmarks/loss.py, which has the dense formulas."""
    path = Path(__file__).resolve().parents[1] / "loss.py"
    spec = importlib.util.spec_from_file_location("dense_formulas", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
