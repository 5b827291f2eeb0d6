"""Opens a Hugging Face checkpoint safely: safetensors only, no remote code, digests of what was read.

Imports torch and transformers lazily, so that the module can be imported anywhere.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charter.errors import CheckpointError
from charter.lm.base import ModelVersion
from charter.lm.chat import ChatCodec

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
LOADING = threading.Lock()
"""Held while transformers makes a model: it changes global state meanwhile, and two threads that load at once
lose tied weights. Whoever calls `from_pretrained` of a model in a process with threads takes it."""
_UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded model and everything that belongs to its weights."""

    network: Any
    """The transformers model, in evaluation mode, without gradients."""
    codec: ChatCodec
    version: ModelVersion
    context_length: int


def weights_digest(folder: Path) -> str:
    """SHA-256 over the names and bytes of the folder's safetensors files."""
    return _digest(sorted(folder.glob("*.safetensors")))


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 over the names and bytes of the folder's tokenizer files."""
    return _digest([folder / name for name in TOKENIZER_FILES if (folder / name).is_file()])


def _digest(files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            inner = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.name}\0{inner}\n".encode())
    return total.hexdigest() if files else ""


def checkpoint_folder(source: str, *, offline: bool = False) -> Path:
    """The local folder of a checkpoint: the folder, `seed`, or a hub id's files, fetched if need be."""
    if source == "seed":
        from charter.seedmodel import WEIGHTS

        source = str(WEIGHTS)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise CheckpointError(
            f"there is no model folder {source!r}; give a folder that holds config.json and "
            "*.safetensors, or a hub id such as organisation/model"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns, local_files_only=offline))
    except Exception as e:
        raise CheckpointError(f"the hub has no usable model {source!r}, or cannot be reached: {e}") from e


def load_checkpoint(
    source: str,
    *,
    version: str = "",
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> Checkpoint:
    """Loads a model with its tokenizer; raises `CheckpointError` for anything that cannot be used.

    Float32 on the CPU and the checkpoint's own type elsewhere, unless `dtype` says otherwise.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    folder = checkpoint_folder(source)
    config, tokenizer = _read_parts(folder)
    network = _read_network(folder, config, dtype or (torch.float32 if device == "cpu" else "auto"))
    network = network.to(device).eval().requires_grad_(False)
    _check_finite(folder, network)
    known, rows = int(tokenizer.vocab_size), network.get_input_embeddings().weight.shape[0]
    if known > rows:
        raise CheckpointError(
            f"{folder}: the tokenizer knows {known} tokens but the model only {rows}; "
            "the files belong to different models"
        )
    width = network.get_output_embeddings().weight.shape[0]
    return Checkpoint(
        network=network,
        codec=ChatCodec(tokenizer, _stop_ids(folder, network, tokenizer), width),
        version=ModelVersion(
            version or _recorded_version(folder), weights_digest(folder), tokenizer_digest(folder)
        ),
        context_length=_context_length(config, tokenizer),
    )


def _read_parts(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    if not any(folder.glob("*.safetensors")):
        unsafe = sorted(f.name for f in folder.iterdir() if f.suffix in _UNSAFE)
        reason = (
            f"it has {', '.join(unsafe)}, which can run code when loaded; convert it with "
            "`save_pretrained`, which writes safetensors"
            if unsafe
            else "save the model there with `save_pretrained`"
        )
        raise CheckpointError(f"{folder} holds no *.safetensors file; {reason}")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as e:
        raise CheckpointError(f"{folder}: config or tokenizer cannot be read: {e}") from e
    return config, tokenizer


def _read_network(folder: Path, config: Any, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    with LOADING:
        bars = hf_logging.is_progress_bar_enabled()
        hf_logging.disable_progress_bar()
        try:
            network, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                attn_implementation="sdpa",
            )
        except Exception as e:
            raise CheckpointError(f"{folder}: the weights cannot be loaded: {e}") from e
        finally:
            if bars:
                hf_logging.enable_progress_bar()
    missing = sorted(report.get("missing_keys", ()))
    mismatched = sorted(str(m) for m in report.get("mismatched_keys", ()))
    if missing or mismatched:
        raise CheckpointError(
            f"{folder}: the weights do not fit config.json; "
            f"missing {missing[:5]}, of another shape {mismatched[:5]}"
        )
    return network


def _check_finite(folder: Path, network: Any) -> None:
    for name, parameter in network.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise CheckpointError(f"{folder}: weight {name} has NaN or infinite values; do not serve it")


def _stop_ids(folder: Path, network: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: those of generation_config.json, and the tokenizer's own."""
    listed = getattr(network.generation_config, "eos_token_id", None)
    ids = [listed] if isinstance(listed, int) else list(listed or ())
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise CheckpointError(
            f"{folder}: neither generation_config.json nor the tokenizer names an end-of-answer token "
            "(eos_token_id); answers would never end"
        )
    return sorted(set(ids))


def _context_length(config: Any, tokenizer: Any) -> int:
    """Tokens of prompt and answer that the model was made for.

    A sliding window narrower than the context bounds it, because the engine's masks are those of full
    attention: within the window the two are the same.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions")]
    if getattr(text, "use_sliding_window", True):
        limits.append(getattr(text, "sliding_window", None))
    limits.append(tokenizer.model_max_length)
    known = [n for n in limits if isinstance(n, int) and 0 < n < 10**9]
    return min(known) if known else 2048


def _recorded_version(folder: Path) -> str:
    """The registry's id of this checkpoint if its manifest has one, `seed`, or the folder's name."""
    from charter.seedmodel import WEIGHTS

    if folder.resolve() == WEIGHTS.resolve():
        return "seed"
    try:
        recorded = json.loads((folder / "manifest.json").read_text()).get("id")
    except (OSError, ValueError, AttributeError):
        recorded = None
    return str(recorded or folder.resolve().name)
