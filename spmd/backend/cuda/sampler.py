"""Sampling on GPUs by a kernel of ours, sampler.cu, in a few passes over the logits: one upload and one launch a tick.

It chooses the tokens that `spmd.sampling.sampler.Sampler` chooses, which is the reference and says how. The host's
share of a row is to look up what its request asked for, and its seed and position.
"""

import ctypes
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spmd.backend.cuda.nvrtc import architecture, available, checked, compile_source, load
from spmd.parallel.tensor import likeliest
from spmd.parallel.transfer import HostCopy, to_device
from spmd.sampling.penalties import TokenCounts
from spmd.sampling.sampler import COLDEST, PackedLogprobs, Sampled, held_open, plain_greedy
from spmd.schedule.request import Request, SamplingParams

WHAT = "sampling by a kernel"
LOGITS = (torch.bfloat16, torch.float16, torch.float32)  # dtypes in the order of LOGIT in sampler.cu
THREADS = 1024
MAX_PARTS = 8  # thread blocks of a row: more than that aren't sure to find place side by side
MAX_KNOWN = 4096  # requests' parameters that are kept packed
ASKED = np.dtype(  # what a request asked for: the first half of `Row` in sampler.cu
    [
        ("top_p", "<f8"),
        ("temperature", "<f4"),
        ("min_score", "<f4"),
        ("repetition", "<f4"),
        ("frequency", "<f4"),
        ("presence", "<f4"),
        ("top_k", "<i4"),
    ]
)
ROW = np.dtype(  # all of `Row`
    [
        ("asked", ASKED),
        ("stream", "<u8"),
        ("position", "<i4"),
        ("counts", "<i4"),
        ("bias", "<i4"),
        ("bias_end", "<i4"),
        ("logprobs", "<i4"),
        ("unused", "<i4"),
    ]
)
Biases = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]  # token ids, ascending, and what is added to each
NO_BIASES: Biases = np.zeros(0, np.int32), np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True)
class Packed:
    """Sampling parameters as the kernel takes them, and what the host needs to know of them in every tick."""

    params: SamplingParams  # keeps `id(params)` from being given to others
    asked: bytes  # one of ASKED
    penalised: bool
    logprobs: bool
    biased: bool  # by logit_bias or, for a while, by min_tokens
    bias: Biases
    bias_held_open: Biases  # with what min_tokens forbids


def supported(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel can sample from logits of a dtype on a device: clusters of blocks begin with Hopper."""
    if device.type != "cuda" or dtype not in LOGITS or not available():
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


class CudaSampler:
    """Samples for one replica. Its only state is the token counts of running requests with penalties."""

    def __init__(self, vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """`dtype` is that of the logits; `supported` says which there can be."""
        self.vocab_size = vocab_size
        self.dtype = dtype
        self.device = device
        self.counts = TokenCounts(vocab_size, device)
        self.packing = Packing(vocab_size)
        self.processors = torch.cuda.get_device_properties(device).multi_processor_count
        # It takes a few seconds, in which other kernels are compiled and graphs captured.
        compiler = ThreadPoolExecutor(1)
        self._compiled = compiler.submit(compile_source, source(dtype), architecture(device), WHAT)
        compiler.shutdown(wait=False)

    @cached_property
    def kernel(self) -> Any:
        """The kernel on the device; the first to ask waits for the compiler."""
        return load(self._compiled.result(), "sample", 0, WHAT)

    @torch.no_grad()
    def sample(self, logits: Tensor, requests: Sequence[Request], positions: Sequence[int]) -> Sampled:
        """Choose the token at `positions[i]` of `requests[i]` from `logits[i]`: see `Sampler.sample`."""
        if plain_greedy(requests, positions):
            return Sampled(likeliest(logits))
        packed = self.packing.find(requests)
        rows = pack_rows(packed, requests, positions)
        if penalised := [i for i, p in enumerate(packed) if p.penalised]:
            rows["counts"][penalised] = self.counts.places([requests[i] for i in penalised])
        if asked := [i for i, p in enumerate(packed) if p.logprobs]:
            rows["logprobs"][asked] = range(len(asked))
        biases = pack_biases(rows, packed, requests, positions)
        token_ids = torch.empty(len(requests), dtype=torch.int64, device=self.device)
        logprobs = torch.empty(len(asked), 4, dtype=torch.float64, device=self.device)
        self._launch(logits, rows, biases, token_ids, logprobs)
        return Sampled(token_ids, self._logprobs(logits, requests, asked, logprobs) if asked else None)

    def _launch(
        self, logits: Tensor, rows: npt.NDArray[np.void], biases: Biases, token_ids: Tensor, logprobs: Tensor
    ) -> None:
        from cuda.bindings import driver

        assert logits.dtype == self.dtype and logits.stride(1) == 1
        upload = np.concatenate([part.view(np.uint8) for part in (rows, *biases)])
        at = to_device(upload, torch.uint8, self.device)
        parts, starts = self._parts(len(rows)), list(accumulate((rows.nbytes, biases[0].nbytes), initial=0))
        cluster = driver.CUlaunchAttribute()
        cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = parts, 1, 1
        launch = driver.CUlaunchConfig()
        launch.gridDimX, launch.gridDimY, launch.gridDimZ = len(rows) * parts, 1, 1
        launch.blockDimX, launch.blockDimY, launch.blockDimZ = THREADS, 1, 1
        launch.hStream = torch.cuda.current_stream(self.device).cuda_stream
        launch.attrs, launch.numAttrs = [cluster], 1
        pointers = [at.data_ptr() + start for start in starts]
        pointers += [self.counts.table.data_ptr(), token_ids.data_ptr(), logprobs.data_ptr()]
        values = (logits.data_ptr(), logits.stride(0), self.vocab_size, *pointers, parts)
        types = (ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int, *[ctypes.c_void_p] * 6, ctypes.c_int)
        checked(driver.cuLaunchKernelEx(launch, self.kernel, (values, types), 0), WHAT)

    def _parts(self, rows: int) -> int:
        """Thread blocks that share a row: as many as run all at once."""
        parts = 1
        while parts < MAX_PARTS and 2 * parts * rows <= self.processors:
            parts *= 2
        return parts

    def _logprobs(self, logits: Tensor, requests: Sequence[Request], asked: list[int], found: Tensor) -> PackedLogprobs:
        """What goes to the host, of `found` [asked, 4]: logprob, rank, and the two parts of a row's normalizer."""
        wanted = [min(requests[i].params.logprobs or 0, self.vocab_size) for i in asked]
        packed = found[:, :2]
        if most := max(wanted):
            chosen = logits if len(asked) == len(logits) else logits[to_device(asked, torch.int64, self.device)]
            best, log_sum = found[:, 2:].float().split(1, dim=1)
            top = chosen.topk(most)
            packed = torch.cat([packed, top.indices.double(), (top.values.float() - best - log_sum).double()], dim=1)
        return PackedLogprobs(len(requests), asked, wanted, HostCopy(packed))


def source(dtype: torch.dtype) -> str:
    """The kernel's text for logits of a dtype."""
    return f"#define LOGIT {LOGITS.index(dtype)}\n" + Path(__file__).with_name("sampler.cu").read_text()


class Packing:
    """Parameters as the kernel takes them. Those of requests that ask for the same are one object, packed once."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.known: dict[int, Packed] = {}

    def find(self, requests: Sequence[Request]) -> list[Packed]:
        return [self.known.get(id(r.params)) or self._enter(r.params) for r in requests]

    def _enter(self, params: SamplingParams) -> Packed:
        if len(self.known) == MAX_KNOWN:
            self.known.clear()
        packed = self.known[id(params)] = pack_params(params, self.vocab_size)
        return packed


def pack_params(params: SamplingParams, vocab_size: int) -> Packed:
    """What a request asks for, in the kernel's terms."""
    asked: npt.NDArray[Any] = np.zeros((), ASKED)
    asked["top_p"] = params.top_p
    asked["temperature"] = 0.0 if params.greedy else max(params.temperature, COLDEST)
    asked["min_score"] = math.log(params.min_p) if params.min_p > 0 else -math.inf  # as `Sampler._draw` cuts
    asked["repetition"] = params.repetition_penalty
    asked["frequency"] = params.frequency_penalty
    asked["presence"] = params.presence_penalty
    asked["top_k"] = params.top_k if 0 < params.top_k < vocab_size else vocab_size
    ends = [token for token in (*params.eos_token_ids, *params.stop_token_ids) if 0 <= token < vocab_size]
    held = sorted(
        [*params.logit_bias, *((token, -math.inf) for token in ends)] if params.min_tokens else params.logit_bias
    )
    return Packed(
        params=params,
        asked=asked.tobytes(),
        penalised=params.penalised,
        logprobs=params.logprobs is not None,
        biased=bool(held),
        bias=_biases(params.logit_bias),
        bias_held_open=_biases(held),
    )


def _biases(entries: Sequence[tuple[int, float]]) -> Biases:
    return np.array([token for token, _ in entries], np.int32), np.array([bias for _, bias in entries], np.float32)


def pack_rows(packed: Sequence[Packed], requests: Sequence[Request], positions: Sequence[int]) -> npt.NDArray[np.void]:
    """One of ROW for each request, as of one without penalties, logprobs and biases."""
    rows: npt.NDArray[np.void] = np.zeros(len(requests), ROW)
    rows["asked"] = np.frombuffer(b"".join([p.asked for p in packed]), ASKED)
    rows["stream"] = np.array([request.stream for request in requests], np.uint64)
    rows["position"] = positions
    rows["counts"] = rows["logprobs"] = -1
    return rows


def pack_biases(
    rows: npt.NDArray[np.void], packed: Sequence[Packed], requests: Sequence[Request], positions: Sequence[int]
) -> Biases:
    """Biases of all rows, one row's after the other's; `rows` are told where theirs begin and end."""
    biased = [i for i, p in enumerate(packed) if p.biased]
    if not biased:
        return NO_BIASES
    own = [packed[i].bias_held_open if held_open(requests[i], positions[i]) else packed[i].bias for i in biased]
    lengths = np.array([len(tokens) for tokens, _ in own], np.int32)
    ends = lengths.cumsum()
    rows["bias"][biased], rows["bias_end"][biased] = ends - lengths, ends
    return np.concatenate([tokens for tokens, _ in own]), np.concatenate([values for _, values in own])
