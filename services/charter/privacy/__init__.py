"""Removes personal data from text before it reaches the bus.

    redact("Write to ada@example.org") == ("Write to [EMAIL]", {"EMAIL": 1})

The rules are our own, in `charter.privacy.rules`, each with its reason. Of the libraries, presidio-analyzer
will not start without a spaCy language model, a download of hundreds of megabytes that an air-gapped
installation (and a gateway without torch) cannot have; with its pattern recognisers alone it knows fewer
kinds than these, and no secrets. scrubadub and its like are no longer kept. What rules cannot find, names
above all, docs/privacy.md says plainly.
"""

from charter.privacy.redaction import redact
from charter.privacy.rules import Kind

__all__ = ["Kind", "redact"]
