"""`train export`: an encoder in another library's form, checked by loading it back, with its card; whole or not there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labels import __version__
from labels.errors import UserError
from labels.storage import whole_folder, write_json
from train.encoders.encoder import EncoderSpec
from train.encoders.load import load_encoder
from train.export.card import card
from train.export.check import check
from train.export.format import Format
from train.export.hf import HF
from train.export.onnx import ONNX
from train.export.open_clip import OPEN_CLIP
from train.export.recipe import results_of, training_of
from train.export.replace import check_replaceable, share_like
from train.export.timm import TIMM

FORMATS: dict[str, Format] = {form.name: form for form in (TIMM, HF, OPEN_CLIP, ONNX)}
MARK = "export.json"
"""What a folder of ours holds: no other is ever replaced."""


def export_encoder(asked: EncoderSpec, format_name: str, out: Path, results: Sequence[Path] = ()) -> dict[str, Any]:
    """Write the encoder into the folder `out`, in place of an earlier export there.

    Args:
        asked: any encoder that the format can hold.
        format_name: a key of FORMATS.
        out: new, empty, or of an earlier export with nothing else beside it.
        results: result JSONs for the card, or folders of them; none: those in the run's folder.

    Returns:
        What export.json says: format, holds, difference, encoder, files, version.

    Raises:
        UserError: `out` is something else, the format cannot hold the encoder, or what was read back differs; nothing is written then.
    """
    check_replaceable(out, MARK, "train export")
    form = FORMATS[format_name]
    if asked.spec.startswith("pixels:"):
        raise UserError(f"the encoder {asked.spec!r} has no weights to export", allowed="any other kind of encoder")
    encoder = load_encoder(asked)
    rows, training = results_of(encoder, results), training_of(encoder)
    out = out.resolve()
    with whole_folder(out) as folder:
        written = form.write(encoder, folder)
        difference = check(encoder, written, folder)
        text = card(out.name, encoder, form, written, difference, training, rows)
        (folder / "README.md").write_text(text, encoding="utf8")
        said = {
            "format": form.name,
            "holds": written.holds,
            "difference": difference,
            "encoder": {**encoder.describe(), "checkpoint": Path(encoder.description["checkpoint"]).name},  # no places of this machine
            "files": sorted(path.name for path in folder.iterdir()),
            "version": __version__,
        }
        write_json(folder / MARK, said)
        share_like(folder / MARK)
    print(f"{out}: {written.holds}, loaded back: no feature differs by more than {difference:.1e}")
    print(written.pooling)
    return said
