"""Frozen encoders by name.

run:RUN | RUN        trunk of RUN's newest checkpoint, or of one folder RUN/checkpoints/samples-...
untrained:RUN        the trunk that RUN/config.yaml describes, freshly initialised from a seed; untrained:timm:NAME likewise
timm:NAME            a timm model without its classifier, weights from a local file or the hub
open_clip:NAME       the image tower of an open_clip model, weights from a local file
hf:DIR               a vision model in Hugging Face's form
pixels:SIDE          no net: the image resized to SIDE x SIDE, flattened
"""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from labels.errors import UserError
from train.encoders.encoder import KINDS, Encoder, EncoderSpec, ImageForm, finish, told_apart
from train.encoders.libraries import load_timm, untrained_timm
from train.evals.encoders.hf_models import load_hf
from train.evals.encoders.open_clip_models import load_open_clip
from train.evals.encoders.runs import load_run, untrained_run

_WITH_WEIGHTS = ("timm", "open_clip")
_DEFAULT_SIDE = 32


def load_encoder(asked: EncoderSpec | str, *, seed: int = 0) -> Encoder:
    """Build the encoder that `asked` names, in evaluation mode, on the CPU.

    Args:
        asked: see the head of this file.
        seed: for untrained: only, what its weights are drawn from.

    Raises:
        UserError: an unknown spec, a run without finished checkpoint, weights that are damaged or do not fit, a layer that is not there.
    """
    asked = EncoderSpec(asked) if isinstance(asked, str) else asked
    kind, colon, value = asked.spec.partition(":")
    if asked.weights is not None and kind not in _WITH_WEIGHTS:
        raise UserError(
            f"--weights {asked.weights} was given with the encoder {asked.spec!r}",
            allowed="--weights with timm:NAME and open_clip:NAME only",
        )
    if kind == "timm" and value:
        return load_timm(asked, value)
    if kind == "open_clip" and value:
        return load_open_clip(asked, value)
    if kind == "hf" and value:
        return load_hf(asked, Path(value))
    if kind == "pixels" and colon:
        return _pixels(asked, value)
    if kind == "untrained" and value:
        name = value.removeprefix("timm:")
        return untrained_run(asked, Path(value), seed) if name == value else untrained_timm(asked, name, seed)
    path = Path(value if kind == "run" and value else asked.spec)
    if not path.is_dir():
        raise UserError(f"the encoder {asked.spec!r} is no known kind, nor is a folder at {path}", allowed=KINDS, mend="mend --encoder")
    return load_run(asked, path)


def pair_weights(specs: Sequence[str], weights: Sequence[str], layer: int | None = None, pool: str | None = None) -> list[EncoderSpec]:
    """Encoders as a command line gives them: weights in the order of the encoders that take some, one layer and pool for all.

    Raises:
        UserError: another number of weights than of such encoders, or an encoder comes twice.
    """
    taking = [spec for spec in specs if spec.partition(":")[0] in _WITH_WEIGHTS]
    if not specs:
        raise UserError("no encoder is named", mend="give --encoder, e.g. run:RUN")
    if len(weights) not in (0, len(taking)):
        raise UserError(
            f"--weights was given {len(weights)} times for {len(taking)} timm and open_clip encoders ({', '.join(taking) or 'none'})",
            allowed="one --weights for each timm:NAME and open_clip:NAME, in their order",
        )
    files = iter(weights)
    return told_apart([EncoderSpec(spec, next(files, None) if spec in taking else None, layer, pool) for spec in specs])


def _pixels(asked: EncoderSpec, side: str) -> Encoder:
    if side and (not side.isdecimal() or int(side) == 0):
        raise UserError(f"the encoder {asked.spec!r} has no whole number of pixels as its side", allowed="e.g. pixels:32")
    if asked.layer is not None or asked.pool is not None:
        raise UserError(f"the encoder {asked.spec!r} has no layers to choose from", mend="leave --layer and --pool out")
    form = ImageForm(int(side or _DEFAULT_SIDE), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    words = {"architecture": "raw pixels", "architecture_args": {}, "checkpoint": "none", "pool": "none", "layer": "none"}
    return finish(asked, nn.Flatten(), form, words)
