"""The names of models: `local:<folder or hub id>`, `grpc://…`, `tgi+http://…`, `openai+http://…#model`."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from urllib.parse import urlsplit

from charter.errors import ConfigError

FORMS = (
    "local:<folder or hub id>, grpc://host:port, tgi+http://host:port, "
    "openai+http://host:port/v1#model (https with tgi+https and openai+https)"
)


class Backend(enum.StrEnum):
    """What speaks for a model."""

    LOCAL = "local"
    GRPC = "grpc"
    TGI = "tgi"
    OPENAI = "openai"


@dataclass(frozen=True, slots=True)
class ModelUri:
    """A parsed model URI."""

    backend: Backend
    target: str
    """A folder or hub id; host:port; or the server's base URL."""
    model: str = ""
    """The model's name on the server, where it serves several."""


def parse_uri(uri: str) -> ModelUri:
    """Reads a model URI; raises `ConfigError` with the forms that exist."""
    scheme, _, rest = uri.partition(":")
    if scheme == "local" and rest:
        return ModelUri(Backend.LOCAL, rest)
    parts = urlsplit(uri)
    if not parts.netloc:
        raise ConfigError(f"{uri!r} names no model; write one of {FORMS}")
    if scheme == "grpc":
        return ModelUri(Backend.GRPC, parts.netloc)
    kind, _, transport = scheme.partition("+")
    if kind in (Backend.TGI, Backend.OPENAI) and transport in ("http", "https"):
        base = f"{transport}://{parts.netloc}{parts.path.rstrip('/')}"
        return ModelUri(Backend(kind), base, parts.fragment)
    raise ConfigError(f"{uri!r} has the unknown scheme {scheme!r}; write one of {FORMS}")
