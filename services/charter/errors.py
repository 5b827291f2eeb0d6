"""Every failure that Charter raises on purpose, in one tree.

    CharterError
    ├── ConfigError             an option, a file or a combination of them that cannot work
    │   └── ConstitutionError   a constitution that does not follow its schema (file, line, field, remedy)
    ├── CheckpointError         weights or a manifest that cannot be used
    ├── RequestError            the caller's request cannot be served as it is
    │   └── ContextOverflow     the prompt is longer than the model's context
    ├── BackendError            a model, a server or a broker failed
    │   ├── BackendUnavailable  … and may come back: retry, wait
    │   └── BackendUnsupported  … and never will: this backend lacks the ability
    ├── BusError                the log refused an operation
    │   ├── Fenced              another process took over this consumer's place
    │   └── MalformedMessage    a message on a topic that cannot be understood
    ├── TrainingStopped         a run diverged or drifted and stopped itself; the last good checkpoint holds
    └── Overloaded              a bounded queue is full

A message says what happened, to which thing, and what to do.
"""

from __future__ import annotations


class CharterError(Exception):
    """The root: catching it catches everything that Charter raises on purpose."""


class ConfigError(CharterError):
    """An option, a file, or a combination of them cannot work."""


class ConstitutionError(ConfigError):
    """A constitution does not follow its schema."""


class CheckpointError(CharterError):
    """Weights or a manifest cannot be used."""


class RequestError(CharterError):
    """The caller's request cannot be served as it is."""


class ContextOverflow(RequestError):
    """The prompt is longer than the model's context."""


class BackendError(CharterError):
    """A model, a server or a broker failed."""


class BackendUnavailable(BackendError):
    """A backend cannot be reached now; it may come back."""


class BackendUnsupported(BackendError):
    """A backend lacks an ability and never will have it."""


class BusError(CharterError):
    """The log refused an operation."""


class Fenced(BusError):
    """Another process took over this consumer's place; stop working."""


class MalformedMessage(BusError):
    """A message on a topic cannot be understood; trying again will not help."""


class TrainingStopped(CharterError):
    """A training run diverged or drifted and stopped itself; the last good checkpoint stays in force."""


class Overloaded(CharterError):
    """A bounded queue is full; come back later."""
