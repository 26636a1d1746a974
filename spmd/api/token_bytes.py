"""The bytes of a token, which its text doesn't tell where it holds a part of a character, and texts without such parts.

A character of several bytes may be spread over tokens. Each of them decodes to U+FFFD by itself, and so does what was
cut off behind the first of them.
"""

import re
from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are no character
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte in vocabularies with byte fallback: Llama 2, Mistral, Gemma
BYTE_LEVEL = {character: byte for byte, character in bytes_to_unicode().items()}  # in those of GPT-2's kind
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # in those of SentencePiece
INVALID = "".join(map(chr, range(0xDC80, 0xDD00)))  # bytes that are no character, decoded with surrogateescape


def decode(tokenizer: Any, tokens: Sequence[int], skip_special_tokens: bool) -> str:
    """The text of tokens as transformers decodes it, without cleaning up spaces."""
    text: str
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # several times faster than through transformers
        text = backend.decode(list(tokens), skip_special_tokens=skip_special_tokens)
    else:
        text = tokenizer.decode(
            list(tokens), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
    return text


def token_bytes(tokenizer: Any, token: int, text: str) -> bytes:
    """The bytes that a token stands for. `text` is what it decodes to by itself.

    They differ from the text's where the token is a part of a character, and where the text has lost the space that
    SentencePiece drops at the start. Of a vocabulary that writes bytes in none of the known ways they are the text's.
    """
    piece = tokenizer.convert_ids_to_tokens(token)
    if isinstance(piece, bytes):
        return piece
    if not isinstance(piece, str):  # of a padded embedding's row
        return text.encode()
    if text != piece and (byte := BYTE_PIECE.fullmatch(piece)):
        return bytes.fromhex(byte[1])
    if UNFINISHED in text and BYTE_LEVEL.keys() >= set(piece):
        return bytes(BYTE_LEVEL[character] for character in piece)
    if SPACE in piece and (spaced := piece.replace(SPACE, " ")).endswith(text):
        return spaced.encode()
    return text.encode()


def finished_text(tokenizer: Any, tokens: Sequence[int], skip_special_tokens: bool) -> str:
    """The text of tokens without what stands at its end of a character that isn't whole.

    A U+FFFD that stands there as a character of its own stays. Costs a look at the last tokens up to one whose text is
    whole.
    """
    text = decode(tokenizer, tokens, skip_special_tokens)
    if not text.endswith(UNFINISHED):
        return text
    held: list[bytes] = []  # of the last tokens, the last one's first
    for token in reversed(tokens):
        alone = decode(tokenizer, [token], skip_special_tokens)
        if alone and UNFINISHED not in alone:
            break
        held.append(token_bytes(tokenizer, token, alone) if alone else b"")
    whole = b"".join(reversed(held)).decode(errors="surrogateescape")
    extra = len(whole) - len(whole.rstrip(INVALID))  # bytes at the end that are in no character
    if not extra:
        return text
    dropped = 0
    while extra and dropped < len(held) and len(held[dropped]) <= extra:
        extra -= len(held[dropped])
        dropped += 1
    # Decoded anew: with byte fallback the bytes that are too many spoil the characters before them as well.
    text = decode(tokenizer, tokens[: len(tokens) - dropped], skip_special_tokens)
    return text[: -len(held[dropped][-extra:].decode(errors="replace"))] if extra else text
