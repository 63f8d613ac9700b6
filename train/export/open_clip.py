"""open_clip's own form, both towers: open_clip_config.json and open_clip_model.safetensors, for open_clip.create_model("local-dir:...").

D width of the common space.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from labels.errors import UserError
from labels.storage import write_json
from train.contrastive.tokens import CLIP
from train.encoders.encoder import Encoder
from train.evals.encoders.open_clip_models import load_clip
from train.export.format import Features, Format, Written, timm_tower
from train.export.open_clip_towers import Towers, build_pair, text_config

_CAPTIONS = 3
_CODE = """\
import open_clip
import torch

model, preprocess = open_clip.create_model_from_pretrained("local-dir:" + folder)
with torch.inference_mode():
    features = model.eval().encode_image(preprocess(image).unsqueeze(0))
"""


def _write(encoder: Encoder, folder: Path) -> Written:
    if encoder.asked.layer is not None or encoder.asked.pool is not None:
        raise UserError("--format open_clip holds whole towers", allowed="--layer and --pool with --format onnx", mend="leave them out")
    kind, _, name = encoder.asked.spec.partition(":")
    if kind == "open_clip":
        import open_clip

        model = load_clip(name, encoder.asked.weights)
        return write_pair(model, open_clip.get_model_config(name) or {}, encoder, folder)
    if encoder.text is None:
        raise UserError(
            f"the encoder {encoder.name!r} has no text tower, as --format open_clip wants it",
            allowed="a run of train clip or train lit; open_clip:NAME with --weights FILE",
            mend=f"train lit --encoder {encoder.asked.spec} gives it one; --format timm, hf or onnx hold the image tower alone",
        )
    text, joint = encoder.text().modules
    towers = Towers(joint.projection.weight, text_config(text), text.state_dict(), joint.log_scale[0])  # type: ignore[union-attr, index, arg-type]
    model, config = build_pair(timm_tower(encoder, "open_clip"), towers, encoder.images.side)
    written = write_pair(model, config, encoder, folder)
    pooling = (
        "`encode_image` gives the encoder's feature after the projection into the texts' space, not normalised. "
        f"{_texts(encoder, int(model.vocab_size))}"  # type: ignore[arg-type]
    )
    projection: Any = joint.projection
    return written._replace(pooling=pooling, wanted=lambda images: projection(encoder(images)), projected=len(projection.weight))


def _texts(encoder: Encoder, vocabulary: int) -> str:
    """How texts become the tower's tokens: CLIP's are open_clip's own, all others are framed as train/contrastive/tokens.py says."""
    assert encoder.checkpoint is not None
    data = json.loads((encoder.checkpoint.parent.parent / "data.json").read_bytes())
    if data["tokenizer"] == CLIP:
        return 'Texts are tokenized by `open_clip.get_tokenizer("local-dir:" + folder)`.'
    return (
        f"Texts are not tokenized by open_clip's own tokenizer, but by the run's, `{data['tokenizer']}` (fingerprint "
        f"`{data['tokenizer_fingerprint']}`): {vocabulary - 2}, the ids in order, {vocabulary - 1}, zeros."
    )


def write_pair(model: Any, config: dict[str, Any], encoder: Encoder, folder: Path) -> Written:
    """Both towers into `folder`.

    Args:
        model: open_clip's CLIP or CustomTextCLIP, in evaluation mode.
        config: what it is built from, open_clip's `model_cfg`.
        encoder: its image tower, or what gives the same features.
    """
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    form = encoder.images
    preprocess = {"mean": list(form.mean), "std": list(form.std), "interpolation": "bicubic", "resize_mode": "shortest"}
    write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess})
    tokens = torch.randint(1, model.vocab_size, (_CAPTIONS, model.context_length), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = model.encode_text(tokens)

    def text(where: Path) -> float:
        read = _load(where)
        if not torch.equal(read.logit_scale, model.logit_scale):
            return float("inf")
        return float((read.encode_text(tokens) - wanted).abs().max())

    pooling = "The encoder's feature is the image embedding, after the projection: `encode_image`, not normalised."
    return Written("open_clip pair of towers", pooling, _CODE, _read, text)


def _load(folder: Path) -> Any:
    import open_clip

    return open_clip.create_model(f"local-dir:{folder}").eval()


def _read(folder: Path) -> Features:
    return _load(folder).encode_image


OPEN_CLIP = Format("open_clip", "open_clip", _write)
