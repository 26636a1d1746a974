"""What tells one checkpoint from another wherever it lies, for little reading: digests of the files that shape answers.

Of weights only samples are read: of each kind of tensor in a file (names that differ in numbers alone) 64 KiB out of
the middle of the first and of the last one. Training moves nearly every weight, and an adapter that is merged into a
model those of a kind of tensor, if not in all layers then in the last ones.
"""

import json
import os
import re
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from huggingface_hub import snapshot_download

from spmd.messages import first_line

SAMPLE_BYTES = 64 * 2**10
CONFIGS = ("config.json", "generation_config.json")
TEXT = (  # names of files that turn rows into tokens begin so
    *("tokenizer", "tokenization", "vocab", "merges", "spiece", "sentencepiece", "tekken"),
    *("special_tokens_map", "added_tokens", "chat_template"),
)
DOWNLOADED = ["*.json", "*.jinja", "*.txt", "*.model"]


def fingerprint(
    path: str, load_format: str = "auto", revision: str | None = None, tokenizer: str | None = None
) -> dict[str, str]:
    """Digests of a model's files by name and, under "weights", of all safetensors files with their number and size.

    Args:
        path: a folder, or a Hub id, which is downloaded.
        load_format: `dummy`: weights are not looked at.
        tokenizer: a folder or Hub id to take the tokenizer from instead.

    Raises:
        ValueError: neither a folder nor a Hub id that can be had.
        OSError: a file can't be read.
    """
    weights = load_format != "dummy"
    folder = _folder(path, revision, [*DOWNLOADED, "*.safetensors"] if weights else DOWNLOADED)
    text = _folder(tokenizer, revision, DOWNLOADED) if tokenizer else folder
    files = [folder / name for name in CONFIGS if (folder / name).is_file()]
    files += [file for file in sorted(text.iterdir()) if file.name.startswith(TEXT) and file.is_file()]
    digests = {file.name: blake2b(file.read_bytes(), digest_size=8).hexdigest() for file in files}
    return digests | ({"weights": _weights(folder)} if weights else {})


def _folder(path: str, revision: str | None, patterns: list[str]) -> Path:
    if os.path.isdir(path):
        return Path(path)
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is neither a folder nor a Hub id within reach: {first_line(error)}") from error


def _weights(folder: Path) -> str:
    size, digest = 0, blake2b(digest_size=8)
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        size += path.stat().st_size
        for piece in _samples(path):
            digest.update(piece)
    return f"{digest.hexdigest()} of {len(files)} files, {size:,} bytes"


def _samples(path: Path) -> Iterator[bytes]:
    """The header of a safetensors file, then pieces of its tensors; none of a broken one, which loading will tell."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, os.fstat(file.fileno()).st_size))
        yield header
        for begin, end in _chosen(header):
            file.seek(8 + length + max(begin, (begin + end - SAMPLE_BYTES) // 2))
            yield file.read(min(end - begin, SAMPLE_BYTES))


def _chosen(header: bytes) -> list[tuple[int, int]]:
    """Where the first and the last tensor of each kind begin and end, behind the header."""
    kinds: dict[str, list[tuple[int, int]]] = {}
    try:
        for name, tensor in json.loads(header).items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                kinds.setdefault(re.sub(r"\d+", "", name), []).append((begin, end))
    except (ValueError, AttributeError, TypeError, KeyError):
        return []
    return sorted({end(spans) for spans in kinds.values() for end in (min, max)})
