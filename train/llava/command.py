"""`train llava`: parse, call, report."""

import sys
from pathlib import Path

import click

from labels.config import load_pipeline
from train import options

_PATH = click.Path(path_type=Path)


@click.command("llava")
@click.option(
    "--data", required=True, metavar="FILE|KIND:DIR", help="LLaVA's json, or captions: coco:, karpathy:, flickr30k: or pairs:DIR."
)
@click.option("--images", type=_PATH, help="Folder that the json's images lie below (default: the json's own).")
@click.option("--encoder", required=True, metavar="SPEC", help="The tower: run:RUN, timm:NAME, or hf:DIR of `train export --format hf`.")
@click.option("--weights", metavar="FILE", help="Weight file of a timm: encoder.")
@click.option(
    "--language-model", required=True, type=_PATH, metavar="DIR", help="Folder of any causal language model in Hugging Face's form."
)
@click.option("--out", required=True, type=_PATH, help="Folder of the whole model; beside it <name>.work/, where it goes on.")
@options.config
@options.overrides
def llava(
    data: str, images: Path | None, encoder: str, weights: str | None, language_model: Path, out: Path, config: Path | None,
    overrides: tuple[str, ...],
) -> None:  # fmt: skip
    """Train LLaVA-1.5's projector on a frozen tower and language model; prints lmms-eval's command for the paper's benchmarks."""
    from train.encoders.encoder import EncoderSpec  # torch takes a second: not for --help
    from train.llava.train import train_llava
    from train.loop import STOPPED_EXIT_CODE

    if not train_llava(EncoderSpec(encoder, weights), language_model, data, images, load_pipeline(config, overrides), out):
        print(f"stopped and saved; the same command resumes {out.name}.work")
        sys.exit(STOPPED_EXIT_CODE)
