"""Filling a decoder from safetensors: a rank reads its stage's tensors, and of those its own slices and experts."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from spmd.model.architecture import Architecture
from spmd.model.decoder import Decoder
from spmd.model.weights import Piece

# Mixtral's own names, where the other families agree.
MIXTRAL = {"block_sparse_moe": "mlp", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def resolve(path: str, revision: str | None = None) -> Path:
    """The local folder of a checkpoint; a Hub id is downloaded (safetensors and json files) or found in the cache.

    Raises:
        ValueError: neither a folder nor a Hub id that can be had.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model.path={path} is neither a folder nor a Hub id within reach: {reason}") from error


def load(decoder: Decoder, path: str, load_format: str = "auto", revision: str | None = None, seed: int = 0) -> None:
    """Fill every parameter of `decoder`, from the checkpoint at `path` or, with `dummy`, at random.

    Raises:
        ValueError: no or broken files, tensors that are missing, unknown to the architecture, or of another shape.
    """
    if load_format == "dummy":
        fill_randomly(decoder.pieces(), seed)
        return
    arch = decoder.arch
    files = _tensor_files(resolve(path, revision))
    names = {_canonical(name): name for name in files}
    stacked = any(name.endswith(".experts.gate_up_proj") for name in names)
    pieces = decoder.pieces(stacked)
    if missing := [name for name in pieces if name not in names]:
        raise ValueError(f"{path} lacks {_listed(missing)}, which {arch.family} needs")
    known = Decoder(arch, device="meta").pieces(stacked)
    if unknown := [raw for name, raw in names.items() if name not in known and not _is_redundant(name, arch)]:
        raise ValueError(f"{path} holds {_listed(unknown)}, which {arch.family} with this config.json does not have")
    for file in sorted({files[names[name]] for name in pieces}):
        _read(file, [(names[name], pieces[name]) for name in pieces if files[names[name]] == file])


def fill_randomly(pieces: dict[str, list[Piece]], seed: int) -> None:
    """Norms 1, everything else uniform with a standard deviation of 0.02, transformers' initializer_range.

    A tensor's values depend on the seed and its name alone: each rank draws the whole tensor and keeps its slice, so
    the model is the same on every topology (of one kind of device).
    """
    for name, targets in pieces.items():
        for piece in targets:
            if name.endswith("norm.weight"):
                piece.target.fill_(1)
                continue
            device = piece.target.device
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little"))
            whole = torch.empty(piece.shape, dtype=piece.target.dtype, device=device)
            bound = 0.02 * 3**0.5
            piece.target.copy_(whole.uniform_(-bound, bound, generator=generator)[piece.index])


def _read(file: Path, tensors: Iterable[tuple[str, list[Piece]]]) -> None:
    try:
        with safe_open(file, framework="pt") as opened:
            for name, pieces in tensors:
                source = opened.get_slice(name)
                for piece in pieces:
                    shape = tuple(source.get_shape())
                    if shape != piece.shape:
                        raise ValueError(f"{file}: {name} has shape {shape}, config.json implies {piece.shape}")
                    piece.target.copy_(source[piece.index])
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _tensor_files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        if absent := sorted({file.name for file in files.values() if not file.is_file()}):
            raise ValueError(f"{folder} lacks {_listed(absent)}, which {index.name} names")
        return files
    files = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                files |= dict.fromkeys(opened.keys(), file)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
    if not files:
        raise ValueError(f"{folder} has no *.safetensors; model.load_format=dummy runs without weights")
    return files


def _canonical(name: str) -> str:
    return ".".join(MIXTRAL.get(part, part) for part in name.removeprefix("model.").split("."))


def _is_redundant(name: str, arch: Architecture) -> bool:
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and arch.tie_word_embeddings)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
