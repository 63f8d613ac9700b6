"""The command `train export`: parse and call."""

from pathlib import Path

import click

FORMATS = ("timm", "hf", "open_clip", "onnx")
_PATH = click.Path(path_type=Path)


@click.command("export")
@click.argument("encoder", metavar="ENCODER")
@click.option("--format", "format_name", type=click.Choice(FORMATS), required=True, help="Library that is to load it.")
@click.option("--out", type=_PATH, required=True, help="Folder, new or of an earlier export, which is replaced.")
@click.option("--weights", metavar="FILE", help="Weight file of a timm: or open_clip: encoder.")
@click.option("--layer", type=int, help="onnx: features of this block (default: the model's own output).")
@click.option("--pool", metavar="avg|cls|cls+avg", help="onnx: pool of the patches, the class token, or both.")
@click.option("--results", multiple=True, type=_PATH, help="Result JSONs for the card, or folders (default: those in the run). Repeatable.")
def export(
    encoder: str, format_name: str, out: Path, weights: str | None, layer: int | None, pool: str | None, results: tuple[Path, ...]
) -> None:
    """Write ENCODER (run:RUN, timm:NAME, open_clip:NAME, hf:DIR) for another library, check it by loading it back, and write its card."""
    from train.encoders.encoder import EncoderSpec  # torch takes a second: not for --help
    from train.export.export import export_encoder

    export_encoder(EncoderSpec(encoder, weights, layer, pool), format_name, out, results)
