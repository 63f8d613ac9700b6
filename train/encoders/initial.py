"""`train run --init SPEC`: the weights that a run begins with; `--branch RUN@SAMPLES`: a cooldown of another run.

    run:RUN | ema:RUN | timm:NAME | open_clip:NAME -> tensors -> timm's filter of the trunk's family -> trunk

The filter converts names, and resamples position embeddings and patch convolution where image size or patch differ. The
head is taken on request, from a run of the same tokenizer. A resumed run does not read these weights again: they may
have been removed, or the run that they came from may have a newer checkpoint. A branch goes on from a checkpoint of
schedule wsd with its weights, moments and data position: only the end of the schedule differs.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from labels.config import load_pipeline
from labels.settings import parse_count
from labels.storage import UserError, local_path
from train.checkpoint import (
    checkpoint_folders,
    copy_exactly,
    read_state,
    read_weights,
    recorded,
    samples_of,
    tensors_fingerprint,
    weight_file,
)
from train.data.dataset import BetonSet
from train.encoders.encoder import EncoderSpec
from train.encoders.libraries import load_clip, load_timm
from train.encoders.load import newest_checkpoint
from train.model import Classifier
from train.trainer import Method, classification

_ALLOWED = "run:RUN (or the path of a run), ema:RUN; with --init-weights timm:NAME, open_clip:NAME"
_LONG = 1000  # a budget for which no cooldown is too long


def initialised(requested: EncoderSpec, run: Path, *, head: bool) -> Method:
    """`train run` in the folder `run`, begun with the trunk of `requested`, and with its `head` if that is true.

    UserError: the spec is unknown, its weights are damaged, or do not fit (raised when the model is built).
    """
    given = {"spec": _absolute(requested.spec), "weights": requested.weights and _absolute(requested.weights)}
    before = recorded(run, "init").get("init")
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


# -- branches


class Branch(NamedTuple):
    """What `train run --branch` trains with."""

    config: Path
    overrides: tuple[str, ...]
    method: Method
    checkpoint: Path | None  # None: the branch has checkpoints of its own


def branched(spec: str, run: Path, config: Path | None, overrides: Sequence[str], recipe: str | None) -> Branch:
    """A cooldown in the folder `run` from the checkpoint that `spec`, RUN@SAMPLES, names.

    The configuration is that of RUN, unless `config` is given; `train.samples` is SAMPLES and the cooldown, which is
    optimizer.cooldown_samples, or a fifth of the whole. UserError: there is no such checkpoint, or it is none of a
    constant rate.
    """
    named, _, text = spec.rpartition("@")
    samples = int(text) if text.isdecimal() else parse_count(text)
    if not named or not isinstance(samples, int):
        raise UserError(f"--branch {spec!r} does not name a run and samples", allowed="RUN@SAMPLES, e.g. run@51.2M")
    if any(override.partition("=")[0].strip() == "train.samples" for override in overrides):
        raise UserError(
            "--set train.samples was given with --branch: it is SAMPLES and the cooldown",
            allowed="--set train.optimizer.cooldown_samples=N",
            fix="omit --set train.samples",
        )
    source, begun = local_path(named).resolve(), bool(checkpoint_folders(run))
    facts = {"branch": {"run": str(source), "samples": samples}}
    if begun and recorded(run, "branch") != facts:
        raise UserError(f"{run} holds another run than the branch {spec}", fix="give another --out")
    checkpoint = None if begun else _constant_checkpoint(source, samples)
    config = config or (run if begun else source) / "config.yaml"
    settings = load_pipeline(config, [*overrides, f"train.samples={_LONG * samples}"], recipe).train
    if settings.optimizer.schedule != "wsd" or settings.weights == "visual":
        raise UserError(
            f"--branch: train.optimizer.schedule is {settings.optimizer.schedule}, train.weights {settings.weights}",
            allowed="wsd, and weights that are not measured after shares of the budget (idf, or a table)",
            fix="branch a run that was trained so",
        )
    wanted, size = settings.optimizer.cooldown_samples, settings.batch_size
    cooldown = max(1, round((samples / 4 if wanted is None else wanted) / size)) * size
    end = (f"train.samples={samples + cooldown}", f"train.optimizer.cooldown_samples={cooldown}")
    init = recorded(run if begun else source, "init").get("init")
    method = classification(init)
    return Branch(config, (*overrides, *end), replace(method, facts=method.facts | facts), checkpoint)


def _constant_checkpoint(run: Path, samples: int) -> Path:
    """The checkpoint of `samples`; UserError if the run has none, or it is none of schedule wsd before the cooldown."""
    newest = newest_checkpoint(run)
    kept = {samples_of(folder): folder for folder in checkpoint_folders(run)}
    cooldown = read_state(newest).cooldown
    if cooldown is None:
        raise UserError(
            f"{run} was trained with train.optimizer.schedule cosine: its rate has fallen from the warm-up on",
            allowed="a run of schedule wsd",
            fix="--set train.optimizer.schedule=wsd, for a new run",
        )
    constant = {number: folder for number, folder in kept.items() if number <= cooldown[0]}
    if samples not in constant:
        why = "that is in its cooldown" if samples in kept else "it has no such checkpoint"
        allowed = ", ".join(f"{number}" for number in constant) or "none: all that are kept are in its cooldown"
        raise UserError(
            f"{run}@{samples}: {why}",
            allowed=f"samples before the cooldown, at {cooldown[0]}, of a kept checkpoint: {allowed}",
            fix=f"--branch {run}@{max(constant)}" if constant else "keep more: train.checkpoint.keep and keep_every",
        )
    return constant[samples]
