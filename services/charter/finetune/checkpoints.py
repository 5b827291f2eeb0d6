"""Reads what belongs to a checkpoint beside its weights, and writes folders whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charter.errors import CheckpointError
from charter.lm.chat import ChatCodec
from charter.lm.checkpoint import TOKENIZER_FILES, checkpoint_folder, tokenizer_digest

_DEFAULT_CONTEXT = 2048


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A checkpoint's tokenizer and what follows from it."""

    folder: Path
    tokenizer: Any
    """transformers' own."""
    codec: ChatCodec
    end_id: int
    """The token that the chat template writes after an answer."""
    context_length: int
    digest: str

    @property
    def pad_id(self) -> int:
        """The padding token, or the end of answers where there is none."""
        pad = self.tokenizer.pad_token_id
        return int(self.end_id if pad is None else pad)


def load_vocabulary(source: str | Path) -> Vocabulary:
    """The tokenizer of a folder or hub id, without its weights. Raises `CheckpointError`."""
    from transformers import AutoConfig, AutoTokenizer

    folder = checkpoint_folder(str(source))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{folder}: config or tokenizer cannot be read: {error}") from error
    text = config.get_text_config()
    codec = ChatCodec(tokenizer, _stop_ids(folder, tokenizer), int(text.vocab_size))
    return Vocabulary(
        folder=folder,
        tokenizer=tokenizer,
        codec=codec,
        end_id=_end_of_answer(tokenizer, codec),
        context_length=_context_length(text, tokenizer),
        digest=tokenizer_digest(folder),
    )


def _stop_ids(folder: Path, tokenizer: Any) -> list[int]:
    try:
        listed = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    except (OSError, ValueError):
        listed = None
    ids = {listed} if isinstance(listed, int) else set(listed or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise CheckpointError(
            f"{folder}: neither generation_config.json nor the tokenizer names an end-of-answer token "
            "(eos_token_id); answers would never end"
        )
    return sorted(ids)


def _end_of_answer(tokenizer: Any, codec: ChatCodec) -> int:
    """What the template writes after an answer, where that ends answers; else the tokenizer's eos."""
    if getattr(tokenizer, "chat_template", None):
        marker = "charteranswer"
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": marker}]
        with contextlib.suppress(Exception):  # a template may want other turns; eos is right then, too
            rendered = str(tokenizer.apply_chat_template(turns, tokenize=False))
            after = tokenizer.encode(rendered.rpartition(marker)[2], add_special_tokens=False)
            for token in after:
                if token in codec.stop_ids:
                    return int(token)
    eos = tokenizer.eos_token_id
    return int(min(codec.stop_ids) if eos is None else eos)


def _context_length(config: Any, tokenizer: Any) -> int:
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    limits.append(tokenizer.model_max_length)
    return min((n for n in limits if isinstance(n, int) and 0 < n < 10**9), default=_DEFAULT_CONTEXT)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Keeps transformers' progress bars, and its remarks about layers, out of the log."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def copy_tokenizer(source: Path, target: Path) -> None:
    """The tokenizer's files, byte for byte, so that its digest stays what it is."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends well, in one rename.

    After a crash or an error `target` is as it was, and what was written is removed by the next attempt.
    Raises `CheckpointError` when the disk refuses, and when `target` exists already.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists already; name another folder, or remove it")
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        _flush(partial)
        partial.rename(target)
        _flush_folder(target.parent)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        # safetensors has an error class of its own for a full disk.
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise CheckpointError(
                f"{target} cannot be written ({getattr(error, 'strerror', None) or error}); nothing was "
                "changed; make room on the disk and start again"
            ) from error
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_whole(file: Path, text: str) -> None:
    """Replaces a file in one rename; readers see the old text or the new. Raises `CheckpointError`."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
        _flush_folder(file.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"{file} cannot be written ({error.strerror or error}); the old one stays; make room on the disk"
        ) from error


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
