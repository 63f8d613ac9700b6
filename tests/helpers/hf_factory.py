"""What several tests share: hf factory."""

import json
from pathlib import Path
from typing import Any

VIT: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}


def write_hf(folder: Path, model: Any, side: int = 32, **processor) -> Path:
    model.save_pretrained(folder)
    words = {"size": {"height": side, "width": side}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, **processor}
    (folder / "preprocessor_config.json").write_text(json.dumps(words))
    return folder
