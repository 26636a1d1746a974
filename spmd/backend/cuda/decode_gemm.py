"""Products of a decode batch's few rows by a kernel of ours, on Hopper: `x` `[M, K]` times `weight` `[N, K]`ᵀ.

The exception to leaving products to cuBLAS. They take as long as reading the weights, and this kernel, decode_gemm.cu,
begins to read while the one in front of it still runs. Together with layer_kernels.py, which lets it, Qwen3-8B gains
17 % at 8 rows and 3 % at 128 (one H200). NVRTC, which torch brings along, compiles it for each shape, all at once in
less than a second. To launch it takes the host longer than cuBLAS, so it is for CUDA graphs.
"""

import ctypes
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spmd.integers import ceil_div

SMALL = 8 * 2**20  # numbers in a weight; reading it takes no longer than starting
MOST, MOST_IF_SMALL = 128, 256  # rows; with more, arithmetic counts and cuBLAS is as fast
OUTS = (64, 128, 192)  # weight rows that a thread block may own
FEWEST, FEWEST_IF_SMALL = 60, 30  # thread blocks that still draw nearly the full bandwidth
PART = 1024  # columns that are worth a thread block of their own
SHARED_BYTES = 227 * 1024 - 1024 - 512  # a block's shared memory for copies in flight: less alignment and barriers
COLUMN_BYTES = 128  # of a row in one copy: 64 columns, the width at which the matrix unit reads without bank conflicts


@dataclass(frozen=True)
class Tiling:
    """How a product is cut up; see decode_gemm.cu for what the blocks do.

    Attributes:
        rows: of x in a block, a multiple of 8.
        outs: weight rows of a block.
        parts: blocks that share these, each with its part of the columns.
        halves: 2 where the weight holds gate and up and the product ends in silu(gate) * up; else 1.
        deep: copies of 64 columns a step; a second one halves the steps' overhead where there is room for many.
    """

    rows: int
    outs: int
    parts: int
    halves: int
    deep: int

    @property
    def slots(self) -> int:
        """Steps in flight."""
        return SHARED_BYTES // self._step_bytes

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the steps', then in the same place the sums'."""
        return max(self.slots * self._step_bytes, self.rows * (self.outs + 4) * 4) + 1024

    @property
    def _step_bytes(self) -> int:
        return self.deep * (self.outs + self.rows) * COLUMN_BYTES


def tiling(rows: int, size: int, columns: int, halves: int, processors: int) -> Tiling | None:
    """The one with most blocks in one wave, for a weight `[size, columns]`; None if cuBLAS is the better choice.

    In how many parts the columns are summed depends on the weight alone: a row's sums are the same in any batch.
    """
    small = size * columns <= SMALL
    fewest, most = (FEWEST_IF_SMALL, MOST_IF_SMALL) if small else (FEWEST, MOST)
    parts = _parts(size, columns, processors)
    if rows > most or columns % 256 or columns < 512 or size // OUTS[0] * parts < fewest:
        return None
    at_once = MOST if size // OUTS[0] * parts >= FEWEST else MOST // 2  # where there are few, let them share the rows
    groups = ceil_div(rows, at_once)
    box = ceil_div(rows, 8 * groups) * 8
    for outs in OUTS:
        blocks = size // outs * parts
        if size % outs == 0 and fewest <= blocks and blocks * groups <= processors:
            return Tiling(box, outs, parts, halves, 2 if box <= 64 else 1)
    return None


def _parts(size: int, columns: int, processors: int) -> int:
    """As many as two, where there is nothing else for half of the multiprocessors; four would leave some idle."""
    blocks = max((size // outs for outs in OUTS if size % outs == 0 and size // outs <= processors), default=0)
    return 2 if blocks * 2 <= processors and columns >= 2 * PART else 1


CAPABILITY = (9, 0)  # Hopper's matrix unit: no other generation has it


def supported(device: torch.device) -> bool:
    """Whether the kernel can run on a GPU."""
    try:
        import cuda.bindings  # noqa: F401  # torch for CUDA needs it too, as a rule
    except ImportError:
        return False
    return torch.cuda.get_device_capability(device) == CAPABILITY


class Products:
    """The products of given shapes, compiled."""

    def __init__(self, shapes: Iterable[tuple[int, int, int]], rows: Iterable[int], device: torch.device) -> None:
        """`shapes` are the weights' `[N, K]` and how many `halves` they have, see `__call__`; `rows` what x may have.

        Those that don't suit the kernel are left out.
        """
        torch.cuda.synchronize(device)  # the driver loads kernels into torch's context, which there must be
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        wanted = {(m, *shape): tiling(m, *shape, processors) for shape in set(shapes) for m in rows}
        self.tilings = {shape: cut for shape, cut in wanted.items() if cut}
        cuts = list(set(self.tilings.values()))
        with ThreadPoolExecutor() as pool:
            self.kernels = {cut: _load(cubin, cut) for cut, cubin in zip(cuts, pool.map(_compile, cuts), strict=True)}

    def __call__(self, x: Tensor, weight: Tensor, halves: int = 1) -> Tensor | None:
        """`[M, N]`, or None if it wasn't compiled for these shapes. Both contiguous and in bfloat16.

        With two `halves` the weight holds those of gate and up, one after the other, and the result is
        silu(gate) * up, `[M, N / 2]`.
        """
        cut = self.tilings.get((len(x), *weight.shape, halves))
        if cut is None:
            return None
        out = x.new_empty(len(x), len(weight) // halves)
        self.launch(cut, x, weight, out)
        return out

    def launch(self, cut: Tiling, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """Into `out`, on the current stream; can be captured in a CUDA graph."""
        from cuda.bindings import driver

        early, cluster = driver.CUlaunchAttribute(), driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = cut.parts, 1, 1
        launch = driver.CUlaunchConfig()
        launch.gridDimX, launch.gridDimY = len(weight) // cut.outs * cut.parts, ceil_div(len(x), cut.rows)
        launch.gridDimZ = 1
        launch.blockDimX, launch.blockDimY, launch.blockDimZ = cut.outs * 2 + 32, 1, 1
        launch.sharedMemBytes = cut.shared_bytes
        launch.hStream = torch.cuda.current_stream(x.device).cuda_stream
        launch.attrs, launch.numAttrs = [early, cluster], 2
        values = (
            *(_map(weight, cut.outs // cut.halves), _map(x, cut.rows)),
            *(out.data_ptr(), len(x), out.shape[1], weight.shape[1]),
        )
        types = (None, None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int)
        _checked(driver.cuLaunchKernelEx(launch, self.kernels[cut], (values, types), 0))


def _map(matrix: Tensor, rows: int) -> Any:
    """What the copy engine needs to know of a matrix, to copy `rows` rows by 64 columns at a time."""
    from cuda.bindings import driver as cu

    height, width = matrix.shape
    sizes, strides = [cu.cuuint64_t(width), cu.cuuint64_t(height)], [cu.cuuint64_t(width * 2)]
    box, steps = [cu.cuuint32_t(COLUMN_BYTES // 2), cu.cuuint32_t(rows)], [cu.cuuint32_t(1)] * 2
    encoded = cu.cuTensorMapEncodeTiled(
        cu.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, matrix.data_ptr(), sizes, strides, box, steps,
        cu.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE, cu.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        cu.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        cu.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    return _checked(encoded)


def _source(cut: Tiling) -> str:
    """The kernel's text, with the matrix unit's instruction for so many rows, which names all its registers."""
    sizes = {"ROWS": cut.rows, "OUTS": cut.outs, "HALVES": cut.halves, "PARTS": cut.parts}
    sizes |= {"SLOTS": cut.slots, "DEEP": cut.deep}
    count = cut.rows // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(sum[{i}])' for i in range(count))
    mma = (
        f'asm volatile("{{.reg .pred p; setp.ne.b32 p, %{count + 2}, 0; '
        f"wgmma.mma_async.sync.aligned.m64n{cut.rows}k16.f32.bf16.bf16 {{{registers}}}, "
        f'%{count}, %{count + 1}, p, 1, 1, 0, 0;}}" : {operands} : "l"(a), "l"(b), "r"((int)(add)))'
    )
    defined = {**sizes, "MMA(sum, a, b, add)": mma}
    lines = "".join(f"#define {name} {value}\n" for name, value in defined.items())
    return lines + Path(__file__).with_name("decode_gemm.cu").read_text()


def _compile(cut: Tiling) -> bytes:
    """The machine code."""
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(_source(cut).encode(), b"decode_gemm.cu", 0, [], []))
    options = [b"--gpu-architecture=sm_90a", b"--std=c++17"]
    result = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if result[0].value:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(log.decode())
    cubin = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return cubin


def _load(cubin: bytes, cut: Tiling) -> Any:
    """The kernel on the current device."""
    from cuda.bindings import driver

    kernel = _checked(driver.cuModuleGetFunction(_checked(driver.cuModuleLoadData(cubin)), b"product"))
    most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(kernel, most, cut.shared_bytes))
    return kernel


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call returned besides its error code.

    Raises:
        RuntimeError: the code.
    """
    code, *rest = result
    if code.value:
        raise RuntimeError(f"products of decode batches: {code!r}; model.decode_products=torch does without")
    return rest[0] if rest else None
