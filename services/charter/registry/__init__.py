"""Checkpoints: folders that never change once written, a manifest each, and who serves now.

registry = Registry(".charter/checkpoints")
manifest = registry.write(Facts(Kind.RL, parent=old.id, step=12), lambda folder: save(model, folder))
registry.set_status(manifest.id, Status.CANDIDATE)
folder = registry.resolve(manifest.id)   # checked against the manifest's digests
"""

from charter.registry.manifest import Facts, Kind, Labels, Manifest
from charter.registry.registry import Registry
from charter.registry.status import Change, Status

__all__ = ["Change", "Facts", "Kind", "Labels", "Manifest", "Registry", "Status"]
