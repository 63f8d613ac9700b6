"""What `--beton` names: OUTs, manifests, single betons, globs of them, each with or without its share of the samples.

--beton A --beton 'pool/out*' --beton B/beton/00000.beton      all samples of all, one set
--beton A=0.7 --beton 'pool/out*=0.3'                          a mixture: 7 of 10 samples from A, 3 from the others together
"""

import glob
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from labels.errors import UserError
from labels.layout import Layout, out_path

_ALLOWED = "an OUT, its manifest.json, its beton/*.beton, or a glob of these; each may end in =SHARE, e.g. out=0.3"
_LONGEST_PERIOD = 1_000_000
_GLOB = re.compile(r"[*?[]")


@dataclass(frozen=True)
class Source:
    """One OUT, or some of its betons.

    Attributes:
        out: where it is; a UPath where it is in an object store.
        labels: another OUT whose labels are taken, for the same rows.
        numbers: of the betons that are taken; None takes all.
        group: number of the `--beton` whose share it is part of; 0 without shares.
    """

    out: Path
    labels: Path | None = None
    numbers: tuple[int, ...] | None = None
    group: int = 0


@dataclass(frozen=True)
class Mixture:
    """Sources, and how many of every `sum(quotas)` samples come from each group."""

    sources: tuple[Source, ...]
    quotas: tuple[int, ...] = (1,)


def parse_sources(texts: Sequence[str], labels: Sequence[Path] = ()) -> Mixture:
    """The sources that the values of `--beton` name, in their order.

    Args:
        texts: the values.
        labels: none, or for each OUT in turn another one whose labels are taken.

    Raises:
        UserError: nothing is there under a name, an OUT is named twice, or shares are given to some only.
    """
    parsed = [_split(text) for text in texts]
    shares = [share for _, share in parsed if share is not None]
    if shares and len(shares) < len(parsed):
        without = next(text for text, share in parsed if share is None)
        raise UserError(f"--beton {without} has no share, others have", allowed="a share for all of them, or for none", mend="add =SHARE")
    sources: list[Source] = []
    for group, (text, _) in enumerate(parsed):
        sources += [replace(source, group=group if shares else 0) for source in _named(text)]
    places = [str(source.out) for source in sources]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise UserError(f"--beton names {twice} twice", mend="name every OUT once; its betons together, as one glob")
    if labels and len(labels) != len(sources):
        raise UserError(
            f"{len(labels)} --labels for {len(sources)} OUTs of --beton", allowed="none, or one for each OUT, in the same order"
        )
    if labels:
        sources = [replace(source, labels=other) for source, other in zip(sources, labels, strict=True)]
    return Mixture(tuple(sources), _quotas(shares) if shares else (1,))


def _split(text: str) -> tuple[str, Fraction | None]:
    name, equals, share = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, None
    try:
        value = Fraction(share)
    except (ValueError, ZeroDivisionError):
        return text, None
    if value <= 0:
        raise UserError(f"--beton {text}: the share is {share}", allowed="more than 0")
    return name, value


def _quotas(shares: list[Fraction]) -> tuple[int, ...]:
    """The smallest whole numbers in the proportion of the shares."""
    scale = math.lcm(*(share.denominator for share in shares))
    wholes = [int(share * scale) for share in shares]
    quotas = tuple(whole // math.gcd(*wholes) for whole in wholes)
    if sum(quotas) > _LONGEST_PERIOD:
        raise UserError(
            f"the shares {', '.join(map(str, shares))} repeat only every {sum(quotas):,} samples",
            allowed=f"every {_LONGEST_PERIOD:,} at most",
            mend="round them, e.g. to three digits",
        )
    return quotas


def _named(text: str) -> list[Source]:
    """The OUTs under one name; betons of the same OUT are one source."""
    if "://" in text and not text.startswith(("file://", "local://")):
        return [Source(_without_manifest(out_path(text)))]
    plain = str(out_path(text))
    paths = [Path(plain)]
    if not paths[0].exists() and _GLOB.search(plain):
        paths = [Path(found) for found in sorted(glob.glob(plain))]
        if not paths:
            raise UserError(f"nothing fits --beton {text}", allowed=_ALLOWED)
    sources: dict[Path, Source] = {}
    for path in paths:
        if path.suffix == ".beton":
            out, number = path.resolve().parent.parent, _number(path)
            taken = sources.setdefault(out, Source(out, numbers=())).numbers
            sources[out] = Source(out, numbers=(*(taken or ()), number))
        else:
            sources.setdefault(_without_manifest(path), Source(_without_manifest(path)))
    return list(sources.values())


def _number(path: Path) -> int:
    if not path.stem.isdigit() or path.resolve() != Layout(path.resolve().parent.parent).beton_file(int(path.stem)):
        raise UserError(f"--beton {path} is no beton of an OUT", allowed=_ALLOWED, mend="give the OUT that build-labels wrote")
    return int(path.stem)


def _without_manifest(path: Path) -> Path:
    return path.parent if path.name == "manifest.json" else path
