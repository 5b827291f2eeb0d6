"""Turns sampled token ids into text as they come: never half a character, never part of a stop string.

Pure Python. `TokenBytes` knows the bytes behind each token where the tokenizer's decoder is a plain
concatenation (byte-level BPE, BPE with byte fallback); other tokenizers are decoded over a window.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Protocol

REPLACEMENT = "\ufffd"

_PLAIN_STEPS = {"Replace", "ByteFallback", "Fuse"}


class Decoder(Protocol):
    """The text of one answer, token by token."""

    def push(self, token_id: int) -> str:
        """Takes a token; returns the whole characters that it completed."""
        ...

    def flush(self) -> str:
        """Ends the answer; bytes that never became a character come out as replacement characters."""
        ...


class TokenBytes:
    """The bytes of every token: text is their concatenation, decoded as UTF-8."""

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table

    def decoder(self) -> Decoder:
        """A decoder for one answer."""
        return _ByteDecoder(self._table)

    def text(self, token_ids: Iterable[int]) -> str:
        """The text of a whole answer; the same as pushing its tokens one by one."""
        table = self._table
        return b"".join([table[i] for i in token_ids]).decode("utf-8", "replace")


class _ByteDecoder:
    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._table[token_id])

    def flush(self) -> str:
        return self._utf8.decode(b"", True)


class WindowText:
    """Decoding by the tokenizer itself, over the window since the last whole character.

    For tokenizers whose decoder looks at neighbours (WordPiece, Unigram with a prefix space). A token's
    text is the difference that it makes; text that ends in a replacement character is held back.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode

    def decoder(self) -> Decoder:
        """A decoder for one answer."""
        return _WindowDecoder(self._decode)

    def text(self, token_ids: Iterable[int]) -> str:
        """The text of a whole answer; the same as pushing its tokens one by one."""
        decoder = self.decoder()
        return "".join([decoder.push(i) for i in token_ids]) + decoder.flush()


class _WindowDecoder:
    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._prefix = 0  # where the window starts
        self._read = 0  # tokens before this one have come out

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        known = self._decode(self._ids[self._prefix : self._read])
        whole = self._decode(self._ids[self._prefix :])
        if len(whole) <= len(known) or whole.endswith(REPLACEMENT):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return whole[len(known) :]

    def flush(self) -> str:
        known = self._decode(self._ids[self._prefix : self._read])
        whole = self._decode(self._ids[self._prefix :])
        self._prefix = self._read = len(self._ids)
        return whole[len(known) :]


Detokeniser = TokenBytes | WindowText


def token_bytes(tokenizer: Any, silent: Collection[int]) -> TokenBytes | None:
    """The bytes of every token of a Hugging Face tokenizer; None where its decoder is no concatenation.

    `silent` are the ids without text of their own (special tokens).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    to_bytes = _piece_decoder(json.loads(backend.to_str()).get("decoder"))
    if to_bytes is None:
        return None
    added = {i: t.content.encode() for i, t in tokenizer.added_tokens_decoder.items()}
    table: list[bytes] = []
    for i, piece in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if i in silent or piece is None:
            table.append(b"")
        else:
            table.append(added[i] if i in added else to_bytes(piece))
    return TokenBytes(table)


def _piece_decoder(decoder: Any) -> Callable[[str], bytes] | None:
    """How one piece of the vocabulary becomes bytes, from the `decoder` of tokenizer.json."""
    if not decoder:
        return None
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        alphabet = _byte_level_alphabet()
        return lambda piece: (
            bytes(alphabet[c] for c in piece) if all(c in alphabet for c in piece) else piece.encode()
        )
    if not kinds <= _PLAIN_STEPS:
        return None
    swaps = [(s["pattern"].get("String"), s["content"]) for s in steps if s["type"] == "Replace"]
    if any(pattern is None for pattern, _ in swaps):
        return None

    def to_bytes(piece: str) -> bytes:
        if "ByteFallback" in kinds and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        for pattern, content in swaps:
            piece = piece.replace(pattern, content)
        return piece.encode()

    return to_bytes


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, reversed (openai/gpt-2 `encoder.py`, bytes_to_unicode)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    alphabet = {chr(b): b for b in printable}
    others = [b for b in range(256) if b not in set(printable)]
    alphabet.update({chr(256 + n): b for n, b in enumerate(others)})
    return alphabet


class StopStrings:
    """Holds back text that may be the beginning of a stop string, and ends the answer before one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Takes new text; returns what can no longer be part of a stop string."""
        if self.stopped:
            return ""
        if not self._stop:
            return text
        held = self._held + text
        found = [at for at in (held.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        keep = max((_overlap(held, s) for s in self._stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """Ends the answer; what was held back was no stop string after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - length :]):
            return length
    return 0
