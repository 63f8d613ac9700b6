"""`train run --init SPEC`: the weights that a run begins with.

    run:RUN | ema:RUN | timm:NAME | open_clip:NAME -> tensors -> timm's filter of the trunk's family -> trunk

The filter converts names, and resamples position embeddings and patch convolution where image size or patch differ. The
head is taken on request, from a run of the same tokenizer. A resumed run does not read these weights again: they may
have been removed, or the run that they came from may have a newer checkpoint.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from labels.storage import UserError, local_path
from train.checkpoint import checkpoint_folders, copy_exactly, read_weights, tensors_fingerprint, weight_file
from train.data.dataset import BetonSet
from train.encoders.encoder import EncoderSpec
from train.encoders.libraries import load_clip, load_timm
from train.encoders.load import newest_checkpoint
from train.model import Classifier
from train.trainer import Method, classification

_ALLOWED = "run:RUN (or the path of a run), ema:RUN; with --init-weights timm:NAME, open_clip:NAME"


def initialised(requested: EncoderSpec, run: Path, *, head: bool) -> Method:
    """`train run` in the folder `run`, begun with the trunk of `requested`, and with its `head` if that is true.

    UserError: the spec is unknown, its weights are damaged, or do not fit (raised when the model is built).
    """
    given = {"spec": _absolute(requested.spec), "weights": requested.weights and _absolute(requested.weights)}
    before = recorded_init(run)
    if before and {name: before.get(name) for name in given} == given:
        facts, source = {**before, "head": head}, None
    else:
        source = _read(requested, head)
        facts = {**given, "checkpoint": source.checkpoint and source.checkpoint.name, "head": head}
        facts["fingerprint"] = tensors_fingerprint(
            source.trunk | {f"head.{key}": source.head[key] for key in source.head}
        )

    def initialise(betons: BetonSet, model: Classifier) -> None:
        if source is None or checkpoint_folders(run):
            return
        copy_exactly(model.trunk.state_dict(), _fitted(source.trunk, model.trunk), Path(requested.spec), "the trunk")
        if head:
            _check_vocabulary(source, betons)
            copy_exactly(model.head.state_dict(), source.head, Path(requested.spec), "the head")

    return classification(facts, initialise)


def recorded_init(run: Path) -> dict[str, Any]:
    """What data.json says about the first weights of a run with checkpoints; empty without any."""
    file = run / "data.json"
    return json.loads(file.read_bytes()).get("init", {}) if checkpoint_folders(run) and file.is_file() else {}


class _Source(NamedTuple):
    trunk: dict[str, Tensor]
    head: dict[str, Tensor]
    checkpoint: Path | None  # of a run


def _read(requested: EncoderSpec, head: bool) -> _Source:
    kind, _, value = requested.spec.partition(":")
    if kind in ("timm", "open_clip") and value:
        if head:
            raise UserError(
                f"--init {requested.spec} has no head for the tokens of captions",
                allowed="--init-head with run:RUN and ema:RUN",
                fix="omit --init-head",
            )
        if kind == "timm":
            return _Source(load_timm(requested, value).net.state_dict(), {}, None)
        tensors = load_clip(value, requested.weights).state_dict()
        return _Source({name: tensor for name, tensor in tensors.items() if name.startswith("visual.")}, {}, None)
    path = local_path(value if kind in ("run", "ema") and value else requested.spec)
    if requested.weights is not None or not path.is_dir():
        why = f"--init-weights {requested.weights} was given" if requested.weights else f"there is no folder {path}"
        raise UserError(
            f"--init {requested.spec!r}: {why}",
            allowed=_ALLOWED,
            fix="omit --init-weights" if requested.weights else "name a run",
        )
    path = path.resolve()
    checkpoint = path if path in checkpoint_folders(path.parent.parent) else newest_checkpoint(path)
    trunk, head_file = (weight_file(checkpoint, part, averaged=requested.averaged) for part in ("trunk", "head"))
    if requested.averaged and not trunk.is_file():
        raise UserError(
            f"{checkpoint} has no moving average: train.optimizer.ema_decay was not set", fix=f"--init run:{checkpoint}"
        )
    return _Source(read_weights(trunk), read_weights(head_file) if head else {}, checkpoint)


def _absolute(named: str) -> str:
    """The same spec or file, from any working directory."""
    kind, colon, value = named.partition(":")
    kind, value = (f"{kind}:", value) if colon and kind in ("run", "ema") else ("", named)
    path = local_path(value) if value else Path(named)
    return f"{kind}{path.resolve()}" if path.exists() else named


def _fitted(tensors: dict[str, Tensor], trunk: nn.Module) -> dict[str, Tensor]:
    """The tensors by the trunk's own names and in its shapes, as far as timm can convert them."""
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    converted = convert(tensors, trunk) if convert else tensors
    names = trunk.state_dict().keys()
    classifier = getattr(trunk, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = tuple(f"{part}." for part in ((classifier,) if isinstance(classifier, str) else classifier))
    return {name: tensor for name, tensor in converted.items() if name in names or not name.startswith(prefixes)}


def _check_vocabulary(source: _Source, betons: BetonSet) -> None:
    """UserError if the classes of the head are not those of the labels."""
    assert source.checkpoint is not None
    run = source.checkpoint.parent.parent
    facts, labels = json.loads((run / "data.json").read_bytes()), betons.labels
    pairs = labels.options.get("labels", {}).get("ngrams", 1) > 1  # which pairs are classes depends on the captions
    before = [facts["tokenizer_fingerprint"], facts["vocabulary"], facts["fingerprints"]["labels"] if pairs else None]
    now = [labels.tokenizer.fingerprint, betons.vocabulary, betons.identity["labels"] if pairs else None]
    if before != now:
        raise UserError(
            f"--init-head: the head of {run} has {facts['vocabulary']:,} classes of {facts['tokenizer']}, "
            f"{betons.labels_out} {betons.vocabulary:,} of {labels.tokenizer.name}"
            + (", some of them word pairs of its captions" if pairs else ""),
            allowed="a run with the same classes",
            fix="omit --init-head",
        )
