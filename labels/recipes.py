"""The built-in `recipes` of pipeline.yaml, where their commands and published results stand as comments.

A recipe is what differs from the section `train`: defaults < pipeline.yaml < `--recipe NAME` < `--set`.
"""

from typing import Any

_SHORT: dict[str, Any] = {  # of both schedules with a global batch of 16,384
    "batch_size": 16_384,
    "model": {"trunk": "vit_b16"},
    "data": {"crop_scale": [0.9, 1.0]},
    "optimizer": {"lr": 5e-4, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.2, "warmup_samples": "8.192M"},
    "checkpoint": {"every_samples": "50M"},
}

RECIPES: dict[str, dict[str, Any]] = {
    "superclass-512m": {"samples": "512M"} | _SHORT,
    "superclass-1.28b": {"samples": "1.28B"} | _SHORT,
    "superclass-12.8b": {
        "samples": "12.8B",
        "batch_size": 90_112,
        "model": {"trunk": "vit_l16", "grad_checkpointing": True},
        "data": {"crop_scale": [0.4, 1.0], "color_jitter_probability": 0.8, "grey_probability": 0.2},
        "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.2, "warmup_samples": "901.12M"},
        "checkpoint": {"every_samples": "275M"},
    },
}
