"""What all ranks must have alike before they work together, and who is named when they don't.

Every rank plans for itself, so ranks that start from different configurations, files or libraries would drift apart:
they would wait for each other forever or, worse, not notice. Each of them therefore writes down what it has as flat
facts, and all compare them.
"""

import json
import os
import platform
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from spmd.config import Config
from spmd.messages import Mistake, listed
from spmd.model.linear import computed_in
from spmd.topology import Topology

T = TypeVar("T")
ERROR = "error"  # a fact under this name is no fact but why its rank has none
ABSENT = "absent"
TOLD = 5  # differences that a message names
OF_RANK_0 = ("run_dir", "progress")  # only its own count
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "jinja2", "triton", "flashinfer-python")
# NCCL hangs if ranks differ in the first three, the others change what products yield.
ENVIRONMENT = (
    *("NCCL_ALGO", "NCCL_PROTO", "NCCL_BUFFSIZE"),
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE"),
)


def facts(config: Config) -> dict[str, str]:
    """What this rank starts from: every key of its configuration, versions, its own source, its kind of device.

    GPUs may be of several models: their memory is compared elsewhere, and no plan depends on anything else of them.
    """
    found = {key: value for key, value in _flat("", asdict(config)) if key not in OF_RANK_0}
    found["python"] = platform.python_version()
    found |= {package: installed for package in PACKAGES if (installed := _version(package))}
    found["the kind of device"] = "cpu"
    if config.device != "cpu" and torch.cuda.is_available():
        found["the kind of device"] = "cuda"
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    else:
        found |= {f"what computes {dtype}": str(computed_in(dtype, "cpu")) for dtype in (torch.bfloat16, torch.float16)}
    found["the digest of spmd's source files"] = _source_digest()
    found |= {f"the environment's {name}": os.environ[name] for name in ENVIRONMENT if name in os.environ}
    return found


def agree(facts: Mapping[str, str]) -> None:
    """Return if the facts of all ranks of the default process group are equal; every rank must call this.

    A rank that has no facts takes part with `{ERROR: why}`. Where all agree, two numbers a rank travel.

    Raises:
        Mistake: on every rank alike, naming what differs and on which ranks, or what ERROR says.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size > 1 and not _equal(facts):
        everyone: list[tuple[str, Mapping[str, str]]] = [("", {})] * size
        dist.all_gather_object(everyone, (host(), facts))
        raise Mistake(difference(everyone))
    if ERROR in facts:
        raise Mistake(facts[ERROR])


def together(topology: Topology, step: Callable[[], T]) -> T:
    """Run a start-up step on every rank; if it fails on some, all ranks end with the first one's message.

    Raises:
        Mistake: on every rank alike, naming the rank that failed.
    """
    result, message = None, None
    try:
        result = step()
    except (ValueError, OSError) as error:
        message = f"{error} [rank {topology.rank}, {topology}]" if topology.world_size > 1 else str(error)
    messages: list[str | None] = [message]
    if topology.world_size > 1:
        messages = [None] * topology.world_size
        dist.all_gather_object(messages, message)
    if failed := next(filter(None, messages), None):
        raise Mistake(failed)
    return result  # type: ignore[return-value]  # set unless the step failed


def from_rank_0(topology: Topology, value: T) -> T:
    """Rank 0's value, on every rank."""
    values = [value]
    if topology.world_size > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def from_each(topology: Topology, value: T) -> list[T]:
    """The values of all ranks."""
    values = [value] * topology.world_size
    if topology.world_size > 1:
        dist.all_gather_object(values, value)
    return values


def on_each_host(topology: Topology) -> list[int]:
    """For each rank the lowest one on its host."""
    hosts = from_each(topology, host())
    return [hosts.index(each) for each in hosts]


def host() -> str:
    """The name under which people know this machine; SLURM's where there is one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def difference(everyone: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """How the facts of ranks differ, as one line. `everyone` is each rank's host and facts."""
    hosts = [host for host, _ in everyone]
    for rank, (_, facts) in enumerate(everyone):
        if ERROR in facts:
            return f"{_where([rank], hosts)}: {facts[ERROR]}"
    names = dict.fromkeys(name for _, facts in everyone for name in facts)
    differing = [told for name in names if (told := _told(name, [facts.get(name) for _, facts in everyone], hosts))]
    if (more := len(differing) - TOLD) > 0:
        differing[TOLD:] = [f"and {more} more"]
    return f"ranks disagree: {'; '.join(differing)}; start all ranks with the same command and the same files"


def _told(name: str, values: Sequence[str | None], hosts: Sequence[str]) -> str | None:
    """Which value is whose, those of fewest ranks first; None if all have the same one."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(ABSENT if value is None else value, []).append(rank)
    if len(ranks) == 1:
        return None
    *odd, (usual, rest) = sorted(ranks.items(), key=lambda item: (len(item[1]), -item[1][0]))
    several = len(rest) > 1 and len(rest) * 2 > len(values)
    told = [f"{_short(value)} on {_where(at, hosts)}" for value, at in odd]
    return f"{name} is {listed(told, 4)}, {_short(usual)} on {'the others' if several else _where(rest, hosts)}"


def _where(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """`ranks 1-3, 7 (node2)`, shortened where there are many."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][-1] == rank - 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    spans_told = listed(["-".join(map(str, span)) for span in spans], 4)
    return (
        f"rank{'s' * (len(ranks) > 1)} {spans_told} ({listed(list(dict.fromkeys(hosts[rank] for rank in ranks)), 4)})"
    )


def _short(value: str, most: int = 200) -> str:
    return value if len(value) <= most else f"{value[:most]}..."


def _equal(facts: Mapping[str, str]) -> bool:
    """Whether all ranks have the same facts, by the largest and the smallest of their digests."""
    content = json.dumps(dict(facts), sort_keys=True).encode()
    digest = int.from_bytes(blake2b(content, digest_size=7).digest())
    ends = torch.tensor([digest, -digest])
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    return bool(ends.sum() == 0)


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every value of nested mappings by its dotted name, as JSON."""
    if not isinstance(value, dict):
        yield name, json.dumps(value, default=str)
        return
    for key, child in value.items():
        yield from _flat(f"{name}.{key}" if name else str(key), child)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _source_digest() -> str:
    """Of the files that make this package, by name and content."""
    folder, digest = Path(__file__).parents[1], blake2b(digest_size=8)
    for file in sorted(file for ending in ("py", "cu") for file in folder.rglob(f"*.{ending}")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
