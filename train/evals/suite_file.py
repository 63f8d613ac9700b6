"""The suite file: which encoders, on which data, by which protocols."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from labels.config import load_pipeline, read_yaml
from labels.errors import UserError
from labels.settings import Pipeline, Section
from train.encoders.encoder import EncoderSpec
from train.evals.protocol import Evaluation
from train.evals.protocols.registry import load_protocol, protocol_names


class EncoderEntry(Section):
    """`run:run`, or a mapping."""

    encoder: str
    weights: str | None = None
    layer: int | None = None
    pool: str | None = None

    @property
    def asked(self) -> EncoderSpec:
        """As load_encoder takes it."""
        return EncoderSpec(self.encoder, self.weights, self.layer, self.pool)


class ProtocolEntry(Section):
    """`probe`, or a mapping: `set` overrides keys of the protocol's section, `name` stands before its variants in the table."""

    protocol: str
    name: str | None = None
    set: Annotated[dict[str, Any], Field(default_factory=dict)]

    @property
    def evaluation(self) -> Evaluation:
        """The protocol of that name.

        Raises:
            UserError: there is none.
        """
        if self.protocol not in (names := protocol_names()):
            raise UserError(f"the protocol {self.protocol!r} is unknown", allowed=", ".join(names), mend="mend the suite file")
        return load_protocol(self.protocol)

    def pipeline(self, config: Path | None, overrides: tuple[str, ...]) -> Pipeline:
        """The configuration with this entry's own keys laid over it."""
        return load_pipeline(config, [*overrides, *_dotted(self.protocol, self.set)])


def _entry(key: str) -> BeforeValidator:
    """A bare word stands for a mapping with that key alone."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class Suite(Section):
    """The whole file."""

    encoders: Annotated[list[Annotated[EncoderEntry, _entry("encoder")]], Field(min_length=1)]
    data: Annotated[list[str], Field(min_length=1)]
    protocols: Annotated[list[Annotated[ProtocolEntry, _entry("protocol")]], Field(min_length=1)]


def read_suite(file: Path) -> Suite:
    """Read and check a suite file.

    Raises:
        UserError: naming every key that is wrong, missing or unknown.
    """
    try:
        return Suite.model_validate(read_yaml(file))
    except ValidationError as error:
        faults = [f"  {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors(include_url=False)]
        raise UserError(
            "\n".join([f"{file} is not a suite:", *faults]),
            allowed="encoders, data and protocols, each a list; an encoder with weights, layer, pool; a protocol with name, set",
        ) from None


def _dotted(prefix: str, values: dict[str, Any]) -> list[str]:
    found: list[str] = []
    for key, value in values.items():
        name = f"{prefix}.{key}"
        found += _dotted(name, value) if isinstance(value, dict) else [f"{name}={json.dumps(value)}"]
    return found
