"""Language models behind one interface: see `charter.lm.base` for it, `open_model` for how to get one."""

from __future__ import annotations

from typing import Any

from charter.lm.base import LanguageModel
from charter.lm.uri import Backend, parse_uri

__all__ = ["open_model"]


def open_model(uri: str, **options: Any) -> LanguageModel:
    """Opens the model that a URI names; the options are those of the backend's class.

        local:<folder or hub id>      `charter.lm.local.LocalModel`
        grpc://host:port              `charter.lm.policy_client.PolicyModel`
        tgi+http://host:port          `charter.lm.tgi_client.TgiModel`
        openai+http://host:port/v1#m  `charter.lm.openai_client.OpenAIModel`

    A local model is loaded here, which takes seconds; servers are first spoken to when used. Raises
    `ConfigError` for a URI or an option that means nothing. Only the chosen backend is imported.
    """
    parsed = parse_uri(uri)
    if parsed.backend is Backend.LOCAL:
        from charter.lm.local import LocalModel

        return LocalModel(parsed.target, **options)
    if parsed.backend is Backend.GRPC:
        from charter.lm.policy_client import PolicyModel

        return PolicyModel(parsed.target, **options)
    if parsed.backend is Backend.TGI:
        from charter.lm.tgi_client import TgiModel

        return TgiModel(parsed.target, **options)
    from charter.lm.openai_client import OpenAIModel

    return OpenAIModel(parsed.target, parsed.model, **options)
