"""Filling a decoder from safetensors: a rank reads its stage's tensors, and of those its own slices and experts."""

import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from spmd.messages import first_line, listed
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
        reason = first_line(error)
        raise ValueError(f"model.path={path} is neither a folder nor a Hub id within reach: {reason}") from error


@dataclass(frozen=True)
class Checkpoint:
    """Which tensors the files of a checkpoint hold, as the index or their headers say."""

    path: str
    files: dict[str, Path]  # that holds each tensor
    names: dict[str, str]  # of each tensor, by what `Decoder.pieces` calls it

    @property
    def stacked(self) -> bool:
        """Whether one tensor holds all experts of a layer."""
        return any(name.endswith(".experts.gate_up_proj") for name in self.names)

    def check_complete(self, needed: Iterable[str], arch: Architecture, where: str = "") -> None:
        """Raises a ValueError if it lacks some of them; `where` says who needs them."""
        if missing := [name for name in needed if name not in self.names]:
            raise ValueError(f"{self.path} lacks {listed(missing, 5)}, which {arch.family} needs{where}")

    def check_known(self, known: Container[str], arch: Architecture) -> None:
        """Raises a ValueError if it holds tensors that the whole model does not have."""
        if unknown := [raw for name, raw in self.names.items() if name not in known and not _is_redundant(name, arch)]:
            raise ValueError(
                f"{self.path} holds {listed(unknown, 5)}, which {arch.family} with this config.json does not have"
            )

    def by_file(self, needed: Iterable[str]) -> dict[Path, list[str]]:
        """The needed tensors of each file that has some."""
        found: dict[Path, list[str]] = {}
        for name in needed:
            found.setdefault(self.files[self.names[name]], []).append(name)
        return dict(sorted(found.items()))


def load(decoder: Decoder, path: str, load_format: str = "auto", revision: str | None = None) -> None:
    """Fill every parameter of `decoder`, from the checkpoint at `path` or, with `dummy`, at random.

    Raises:
        ValueError: no or broken files, tensors that are missing, unknown to the architecture, or of another shape.
    """
    if load_format == "dummy":
        _fill_randomly(decoder.pieces(), decoder.arch.stored)
        return
    checkpoint = _open(path, revision)
    pieces = decoder.pieces(checkpoint.stacked)
    checkpoint.check_complete(pieces, decoder.arch)
    checkpoint.check_known(Decoder(decoder.arch, device="meta").pieces(checkpoint.stacked), decoder.arch)
    for file, names in checkpoint.by_file(pieces).items():
        with _reading(file) as opened:
            for name in names:
                source = _slices(opened, file, checkpoint.names[name], pieces[name])
                for piece in pieces[name]:
                    piece.target.copy_(source[piece.index])


def check_files(
    arch: Architecture, path: str, load_format: str, revision: str | None, layers: Sequence[range]
) -> Checkpoint | None:
    """Check that a checkpoint has what the stages need, from its headers alone; None with `dummy`, which needs none.

    Args:
        layers: those of each stage.

    Raises:
        ValueError: as `load` would on some stage, which is named if there are several.
    """
    if load_format == "dummy":
        return None
    checkpoint = _open(path, revision)
    for stage, own in enumerate(layers):
        first, last = stage == 0, stage == len(layers) - 1
        needed = Decoder(arch, own, first, last, device="meta").pieces(checkpoint.stacked)
        where = f" on stage {stage} (layers {own[0]}-{own[-1]})" if len(layers) > 1 else ""
        checkpoint.check_complete(needed, arch, where)
    pieces = Decoder(arch, device="meta").pieces(checkpoint.stacked)
    checkpoint.check_known(pieces, arch)
    for file, names in checkpoint.by_file(pieces).items():
        with _reading(file) as opened:
            for name in names:
                _slices(opened, file, checkpoint.names[name], pieces[name])
    return checkpoint


def _fill_randomly(pieces: dict[str, list[Piece]], stored: torch.dtype) -> None:
    """Norms 1, everything else uniform with a standard deviation of 0.02, transformers' initializer_range.

    A tensor's values depend on its name alone: each rank draws the whole tensor, in the dtype that a checkpoint would
    have, and keeps its slice, so the model is the same on every topology (of one kind of device).
    """
    for name, targets in pieces.items():
        for piece in targets:
            if name.endswith("norm.weight"):
                piece.target.fill_(1)
                continue
            device = piece.target.device
            digest = hashlib.sha256(f"0:{name}".encode()).digest()  # with another number another model
            generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little"))
            whole = torch.empty(piece.shape, dtype=stored, device=device)
            bound = 0.02 * 3**0.5
            piece.target.copy_(whole.uniform_(-bound, bound, generator=generator)[piece.index])


@contextmanager
def _reading(file: Path) -> Iterator[Any]:
    """An open safetensors file; what is wrong with it becomes a ValueError."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _slices(opened: Any, file: Path, name: str, pieces: Sequence[Piece]) -> Any:
    """The tensor `name` of an open file, to be read slice by slice; it has the shape that its pieces are of."""
    source = opened.get_slice(name)
    shape = tuple(source.get_shape())
    for piece in pieces:
        if shape != piece.shape:
            raise ValueError(f"{file}: {name} has shape {shape}, config.json implies {piece.shape}")
    return source


def _open(path: str, revision: str | None) -> Checkpoint:
    files = _tensor_files(resolve(path, revision))
    return Checkpoint(path, files, {_canonical(name): name for name in files})


def _tensor_files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = {name: folder / file for name, file in _weight_map(index).items()}
        if absent := sorted({file.name for file in files.values() if not file.is_file()}):
            raise ValueError(f"{folder} lacks {listed(absent, 5)}, which {index.name} names")
        return files
    files = {}
    for file in sorted(folder.glob("*.safetensors")):
        with _reading(file) as opened:
            files |= dict.fromkeys(opened.keys(), file)
    if not files:
        raise ValueError(f"{folder} has no *.safetensors; model.load_format=dummy runs without weights")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return files
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} cannot be read: {error!r}") from error


def _canonical(name: str) -> str:
    return ".".join(MIXTRAL.get(part, part) for part in name.removeprefix("model.").split("."))


def _is_redundant(name: str, arch: Architecture) -> bool:
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and arch.tie_word_embeddings)
