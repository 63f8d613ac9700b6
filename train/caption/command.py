"""`train caption`: parse, call, report."""

import sys
from pathlib import Path

import click

from labels.config import load_pipeline
from train import options


@click.command("caption")
@click.option("--data", required=True, metavar="KIND:DIR", help="coco:, karpathy:, flickr30k: or pairs:DIR, as downloaded.")
@click.option("--part", type=click.Choice(["val", "test"]), help="Which part is captioned (default: test where there is one, else val).")
@click.option(
    "--encoder", "encoders", multiple=True, required=True, metavar="SPEC",
    help="run:RUN, untrained:RUN, timm:NAME, open_clip:NAME, hf:DIR or pixels:SIDE. Repeatable.",
)  # fmt: skip
@click.option("--weights", multiple=True, metavar="FILE", help="Weight file of each timm: and open_clip: encoder in turn.")
@click.option("--layer", type=int, help="Features of this block: 1 is the first, -1 the last (default: the model's own output).")
@click.option("--pool", metavar="avg|cls|cls+avg", help="Pool of the patches, the class token, or both (default: the model's own).")
@click.option("--decoder", metavar="built-in|DIR", help="A folder of a causal language model (default: caption.decoder).")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Result JSON; beside it <name>.work/, where it goes on.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder that keeps features between calls (default: in <name>.work/).")
@options.config
@options.overrides
def caption(
    data: str, part: str | None, encoders: tuple[str, ...], weights: tuple[str, ...], layer: int | None, pool: str | None,
    decoder: str | None, out: Path, cache: Path | None, config: Path | None, overrides: tuple[str, ...],
) -> None:  # fmt: skip
    """Caption images: ClipCap's mapper from frozen features to a language model, CIDEr-D of its captions."""
    from train.caption.protocol import run_captioning  # torch takes a second: not for --help
    from train.evals.encoders.load import pair_weights
    from train.evals.measure import on_device
    from train.signals import STOPPED_EXIT_CODE

    pipeline = load_pipeline(config, [*overrides, *([f"caption.decoder={decoder}"] if decoder else [])])
    extract = on_device(pipeline.features, cache or out.with_suffix(".work") / "features")
    if not run_captioning(pair_weights(encoders, weights, layer, pool), data, part, pipeline, extract, out):
        print(f"stopped and saved; the same command goes on with {out.with_suffix('.work')}")
        sys.exit(STOPPED_EXIT_CODE)
