"""The exact bytes of tokens. A token may hold half a character, which decoded text cannot show."""

import functools
import json
from collections.abc import Iterable
from typing import Any

SENTENCEPIECE_SPACE = "▁"


def token_bytes(tokenizer: Any, ids: Iterable[int]) -> list[bytes]:
    """The bytes that each token stands for; joined, they are the text (WordPiece keeps no exact text: a token that
    starts a word gets a space before it).

    Ids that the tokenizer lacks, such as -1, give no bytes. Special tokens give their names.
    """
    spell = _speller(tokenizer)
    special = set(tokenizer.all_special_ids)
    n_tokens = len(tokenizer)
    found = []
    for number in map(int, ids):
        if not 0 <= number < n_tokens:
            found.append(b"")
            continue
        token = tokenizer.convert_ids_to_tokens(number)
        if token is None:
            found.append(b"")
        elif number in special or number in tokenizer.added_tokens_decoder:
            found.append(token.encode())
        else:
            found.append(spell(token))
    return found


def printable(token: bytes) -> str:
    """A token's bytes as text in which nothing is hidden: what is not printable is escaped with a backslash."""
    try:
        text = token.decode().replace("\\", "\\\\")
    except UnicodeDecodeError:
        return "".join(chr(byte) if 32 <= byte < 127 and byte != 92 else f"\\x{byte:02x}" for byte in token)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _speller(tokenizer: Any) -> Any:
    """How the tokenizer's kind writes bytes as characters: told by its decoder."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.dumps(json.loads(backend.to_str())["decoder"]) if backend is not None else ""
    if "ByteLevel" in decoder:
        return _byte_level
    if "ByteFallback" in decoder or SENTENCEPIECE_SPACE in decoder or "\\u2581" in decoder:
        return _sentencepiece
    if "WordPiece" in decoder:
        return _wordpiece
    return lambda token: tokenizer.convert_tokens_to_string([token]).encode()


def _byte_level(token: str) -> bytes:
    table = _byte_of_char()
    return b"".join(bytes([table[char]]) if char in table else char.encode() for char in token)


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(SENTENCEPIECE_SPACE, " ").encode()


def _wordpiece(token: str) -> bytes:
    return token[2:].encode() if token.startswith("##") else b" " + token.encode()


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: printable Latin-1 bytes as themselves, the others, in
    order, from U+0100 on. Source: Radford et al. 2019 (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
