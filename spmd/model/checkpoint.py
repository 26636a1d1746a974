"""Filling a decoder from safetensors: a rank reads its stage's tensors, and of those its own slices and experts.

Which files of a folder count is decided as transformers does: model.safetensors alone where it is there, else those
that the index names. Where neither is there, all that no other program has left, none of which may hold a tensor twice.
"""

import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from spmd.messages import check_no_pointer, first_line, listed
from spmd.model.architecture import Architecture
from spmd.model.decoder import Decoder
from spmd.model.weights import Piece

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OF_OTHERS = ("adapter_", "consolidated")  # an adapter's, and those with Mistral's own names of tensors, begin so
OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf")
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names
COMPARED_BYTES = 2**26  # at a time

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
        patterns, others = ["*.safetensors", "*.json"], [f"{name}*" for name in OF_OTHERS]
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns, ignore_patterns=others))
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
            one_of_two = len(missing) == 1 and {missing[0], *self.names} > {EMBEDDING, HEAD} > {*missing}
            hint = (
                "; if one matrix is both, say so: 'model.overrides={tie_word_embeddings: true}'" if one_of_two else ""
            )
            raise ValueError(f"{self.path} lacks {listed(missing, 5)}, which {arch.family} needs{where}{hint}")

    def check_known(self, known: Container[str], arch: Architecture) -> None:
        """Raises a ValueError if it holds tensors that the whole model does not have."""
        if unknown := [raw for name, raw in self.names.items() if name not in known and not _is_redundant(name, arch)]:
            files = sorted({self.files[raw].name for raw in unknown})
            raise ValueError(
                f"{self.path} holds {listed(unknown, 5)}, which {arch.family} with this config.json does not have "
                f"(in {listed(files, 3)})"
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
    checkpoint = _open(path, revision, decoder.arch)
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
    checkpoint = _open(path, revision, arch)
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


def as_stored(arch: Architecture, path: str, load_format: str, revision: str | None) -> Architecture:
    """As transformers 5: embedding and head that config.json ties but the files hold both of, and differing, are two.

    Raises:
        ValueError: no or broken files.
    """
    if not arch.tie_word_embeddings or load_format == "dummy":
        return arch
    checkpoint = _open(path, revision, arch)
    embedding, head = (checkpoint.names.get(name) for name in (EMBEDDING, HEAD))
    if embedding is None or head is None or _equal(checkpoint, embedding, head):
        return arch
    return replace(arch, tie_word_embeddings=False)


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two matrices hold the same numbers; as a rule their first rows tell."""
    with _reading(checkpoint.files[one]) as first, _reading(checkpoint.files[other]) as second:
        a, b = first.get_slice(one), second.get_slice(other)
        if a.get_shape() != b.get_shape():
            return False
        rows, size = a.get_shape()
        step = max(1, COMPARED_BYTES // (4 * size))
        return all(torch.equal(a[i : i + step].float(), b[i : i + step].float()) for i in range(0, rows, step))


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
    check_no_pointer(file)
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        size = f"; of its {file.stat().st_size:,} bytes some may lack: fetch it again" if file.is_file() else ""
        raise ValueError(f"{file} cannot be read: {error}{size}") from error


def _slices(opened: Any, file: Path, name: str, pieces: Sequence[Piece]) -> Any:
    """The tensor `name` of an open file, to be read slice by slice; it has the shape that its pieces are of."""
    source = opened.get_slice(name)
    shape, kind = tuple(source.get_shape()), source.get_dtype()
    for piece in pieces:
        if shape != piece.shape:
            raise ValueError(f"{file}: {name} has shape {shape}, config.json implies {piece.shape}")
        if piece.target.is_floating_point() and kind not in FLOATS:
            raise ValueError(f"{file}: {name} is stored as {kind}; quantized checkpoints are not supported")
    return source


def _open(path: str, revision: str | None, arch: Architecture) -> Checkpoint:
    files = _tensor_files(resolve(path, revision))
    names: dict[str, str] = {}
    for raw in files:
        name = _canonical(raw)
        if (other := names.setdefault(name, raw)) != raw:
            raise ValueError(f"{path}: {_twice(name, files[other], files[raw])} (as {other} and {raw})")
    if arch.tie_word_embeddings and EMBEDDING not in names and HEAD in names:
        names[EMBEDDING] = names.pop(HEAD)  # of two names of one tensor safetensors' save_model keeps one
    return Checkpoint(path, files, names)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that count, in the order of their names, unopened; none if there are none.

    Raises:
        ValueError: an index that can't be read, or that names files which aren't there.
    """
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if (folder / INDEX).is_file():
        named = sorted({folder / file for file in _weight_map(folder / INDEX).values()})
        if absent := [file.name for file in named if not file.is_file()]:
            raise ValueError(f"{folder} lacks {listed(absent, 5)}, which {INDEX} names")
        return named
    files = [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith(".")]
    return [file for file in files if not file.name.startswith(OF_OTHERS)]


def _tensor_files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor."""
    chosen = weight_files(folder)
    if not chosen:
        raise ValueError(f"{folder} has no {_instead(folder)}; model.load_format=dummy runs without weights")
    if not (folder / WHOLE).is_file() and (folder / INDEX).is_file():
        return {name: folder / file for name, file in _weight_map(folder / INDEX).items()}
    files: dict[str, Path] = {}
    for file in chosen:
        with _reading(file) as opened:
            held: list[str] = opened.keys()
        for name in held:
            if (other := files.setdefault(name, file)) != file:
                raise ValueError(f"{folder}: {_twice(name, other, file)}; move the one that doesn't count elsewhere")
    return files


def _twice(name: str, one: Path, other: Path) -> str:
    where = f"{one.name} and {other.name} both hold" if one != other else f"{one.name} holds twice"
    return f"{where} {name}"


def _instead(folder: Path) -> str:
    """*.safetensors, and what a folder has in their place."""
    names = sorted(file.name for file in folder.iterdir())
    if other := [name for name in names if name.startswith(OF_OTHERS) and name.endswith(".safetensors")]:
        return f"*.safetensors of a whole model in transformers' format, only {listed(other, 3)}"
    if other := [name for name in names if name.endswith(OTHER_FORMATS)]:
        return f"*.safetensors, only {listed(other, 3)}: load it with transformers and save_pretrained it elsewhere"
    return "*.safetensors"


def _weight_map(index: Path) -> dict[str, str]:
    check_no_pointer(index)
    try:
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return {name: str(file) for name, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} cannot be read: {error!r}") from error


def _canonical(name: str) -> str:
    return ".".join(MIXTRAL.get(part, part) for part in name.removeprefix("model.").split("."))


def _is_redundant(name: str, arch: Architecture) -> bool:
    return name.endswith("rotary_emb.inv_freq") or (name == HEAD and arch.tie_word_embeddings)
