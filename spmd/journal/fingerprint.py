"""What tells one checkpoint from another wherever it lies, for little reading: digests of the files that shape answers.

Of weights only samples are read, of every tensor: up to 64 KiB in four pieces from its beginning to its end, of many
tensors less, so that it is 64 MiB in all, besides the headers. Each file is read in order, several at a time.

Earlier versions looked at the first and the last tensor of each kind alone, in all safetensors files of the folder
(`first_form`). Outputs that they began are compared by that.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from pathlib import Path

from huggingface_hub import snapshot_download

from spmd.messages import first_line

SAMPLE_BYTES = 64 * 2**10  # of a tensor
ALL_BYTES = 64 * 2**20  # of all
PIECES = 4  # of a sample
READERS = 16
CONFIGS = ("config.json", "generation_config.json")
TEXT = (  # names of files that turn rows into tokens begin so
    *("tokenizer", "tokenization", "vocab", "merges", "spiece", "sentencepiece", "tekken"),
    *("special_tokens_map", "added_tokens", "chat_template"),
)
DOWNLOADED = ["*.json", "*.jinja", "*.txt", "*.model"]


def fingerprint(
    path: str, weights: Sequence[Path] = (), revision: str | None = None, tokenizer: str | None = None
) -> dict[str, str]:
    """Digests of a model's files by name and, under "weights", of its safetensors files with their number and size.

    Args:
        path: a folder, or a Hub id, which is downloaded.
        weights: the safetensors files that count; without any, nothing is said of weights.
        tokenizer: a folder or Hub id to take the tokenizer from instead.

    Raises:
        ValueError: neither a folder nor a Hub id that can be had.
        OSError: a file can't be read.
    """
    folder = _folder(path, revision)
    text = _folder(tokenizer, revision) if tokenizer else folder
    files = [folder / name for name in CONFIGS if (folder / name).is_file()]
    files += [file for file in sorted(text.iterdir()) if file.name.startswith(TEXT) and file.is_file()]
    digests = {file.name: blake2b(file.read_bytes(), digest_size=8).hexdigest() for file in files}
    return digests | ({"weights": _weights(weights)} if weights else {})


def first_form(told: str, weights: Sequence[Path]) -> str | None:
    """What an earlier version would say under "weights" of these files; None if it hasn't said `told`, or of others.

    It took all safetensors files of a folder, or, where there was an index, answered with those that it named.
    """
    if not weights or not re.fullmatch(r"[0-9a-f]{16} of [\d,]+ files, [\d,]+ bytes", told):
        return None
    folder = weights[0].parent
    if set(files := sorted(folder.glob("*.safetensors"))) != set(weights) and weights[0].name == "model.safetensors":
        return None
    size, digest = 0, blake2b(digest_size=8)
    for path in files:
        size += path.stat().st_size
        for piece in _samples(path):
            digest.update(piece)
    return f"{digest.hexdigest()} of {len(files)} files, {size:,} bytes"


def _folder(path: str, revision: str | None) -> Path:
    if os.path.isdir(path):
        return Path(path)
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=DOWNLOADED))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is neither a folder nor a Hub id within reach: {first_line(error)}") from error


def _weights(files: Sequence[Path]) -> str:
    size, digest = sum(file.stat().st_size for file in files), blake2b(digest_size=8)
    with ThreadPoolExecutor(READERS) as pool:
        headers = list(pool.map(_header, files))
        spans = [_spans(header) for header in headers]
        count = sum(map(len, spans))
        share = min(SAMPLE_BYTES, ALL_BYTES // max(count, 1))
        for header, samples in zip(headers, pool.map(partial(_sampled, share), files, spans), strict=True):
            digest.update(header + samples)
    return f"{digest.hexdigest()} of {len(files)} files, {size:,} bytes, {count:,} tensors"


def _header(path: Path) -> bytes:
    """The header of a safetensors file; what there is of a broken one, which loading will tell."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(min(length, os.fstat(file.fileno()).st_size))


def _spans(header: bytes) -> dict[str, tuple[int, int]]:
    """Where each tensor begins and ends, behind the header; nothing if that isn't one."""
    try:
        tensors = {name: tensor for name, tensor in json.loads(header).items() if name != "__metadata__"}
        offsets = {name: tensor["data_offsets"] for name, tensor in tensors.items()}
        return {name: (begin, end) for name, (begin, end) in offsets.items()}
    except (ValueError, AttributeError, TypeError, KeyError):
        return {}


def _sampled(share: int, path: Path, spans: dict[str, tuple[int, int]]) -> bytes:
    """The digest of so many bytes of each tensor."""
    digest = blake2b(digest_size=16)
    with open(path, "rb", buffering=0) as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        for begin, end in sorted(spans.values()):
            whole = end - begin <= share
            size = end - begin if whole else share // PIECES
            for piece in range(1 if whole else PIECES):
                at = begin + piece * (end - begin - size) // (PIECES - 1)
                digest.update(os.pread(file.fileno(), max(size, 1), start + at))
    return digest.digest()


def _samples(path: Path) -> Iterator[bytes]:
    """As earlier versions: the header of a safetensors file, then a piece of some of its tensors."""
    header = _header(path)
    yield header
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        for begin, end in _chosen(header):
            file.seek(start + max(begin, (begin + end - SAMPLE_BYTES) // 2))
            yield file.read(min(end - begin, SAMPLE_BYTES))


def _chosen(header: bytes) -> list[tuple[int, int]]:
    """Where the first and the last tensor of each kind begin and end, behind the header."""
    kinds: dict[str, list[tuple[int, int]]] = {}
    for name, span in _spans(header).items():
        kinds.setdefault(re.sub(r"\d+", "", name), []).append(span)
    return sorted({end(spans) for spans in kinds.values() for end in (min, max)})
