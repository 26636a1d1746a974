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

from spmd.backend.cuda.nvrtc import available, checked, compile_source, load
from spmd.integers import ceil_div

SMALL_WEIGHT = 8 * 2**20  # numbers in a weight up to which reading it takes no longer than starting
MAX_ROWS, MAX_ROWS_IF_SMALL = 128, 256  # of x; with more, arithmetic counts and cuBLAS is as fast
MIN_BLOCKS, MIN_BLOCKS_IF_SMALL = 60, 30  # thread blocks that still draw nearly the full bandwidth
TILES_N = (64, 128, 192)  # weight rows that a thread block may own
MIN_SPLIT_COLUMNS = 1024  # that are worth a thread block of their own
SHARED_BYTES = 227 * 1024 - 1024 - 512  # a block's shared memory for copies in flight: less alignment and barriers
COPY_COLUMNS = 64  # of one copy, 128 bytes: the width at which the matrix unit reads without bank conflicts


@dataclass(frozen=True)
class Tiling:
    """How the product of `x` `[M, K]` and a weight `[N, K]` is cut up among thread blocks.

    A block owns `tile_m` rows of x and `tile_n` rows of the weight, and computes their products over all K columns, or
    over its share of them where `split_k` blocks (a cluster) own the same; these then add up in each other's shared
    memory. It goes through its columns in steps of `tile_k`. One thread starts the copies of a step's tiles into shared
    memory, `stages` steps ahead of the threads that multiply; a barrier for each stage says that its copies are there,
    another that it was multiplied with and may be overwritten. decode_gemm.cu has names of its own for these numbers,
    see `_source`.

    Attributes:
        tile_m: a multiple of 8.
        tile_n: one of TILES_N.
        tile_k: a multiple of COPY_COLUMNS; two copies a step halve the steps' overhead where there is room for many.
        split_k: 1 or 2.
        gated: the weight holds gate and up, one after the other, and the product ends in silu(gate) * up.
    """

    tile_m: int
    tile_n: int
    tile_k: int
    split_k: int
    gated: bool

    @property
    def stages(self) -> int:
        """Steps in flight."""
        return SHARED_BYTES // self._step_bytes

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the steps', then in the same place the sums'."""
        return max(self.stages * self._step_bytes, self.tile_m * (self.tile_n + 4) * 4) + 1024

    @property
    def _step_bytes(self) -> int:
        return self.tile_k * (self.tile_n + self.tile_m) * 2


def choose_tiling(rows: int, size: int, columns: int, gated: bool, processors: int) -> Tiling | None:
    """The one with most blocks that run all at once; None if cuBLAS is the better choice.

    `split_k` depends on the weight alone, so that a row's sums are the same bits in any batch.

    Args:
        rows: of x.
        size, columns: of the weight.
        processors: multiprocessors of the GPU; each runs one block.
    """
    small = size * columns <= SMALL_WEIGHT
    min_blocks, max_rows = (MIN_BLOCKS_IF_SMALL, MAX_ROWS_IF_SMALL) if small else (MIN_BLOCKS, MAX_ROWS)
    split_k = _split_k(size, columns, processors)
    most_blocks = size // TILES_N[0] * split_k
    if rows > max_rows or columns % 256 or columns < 512 or most_blocks < min_blocks:
        return None
    max_tile_m = MAX_ROWS if most_blocks >= MIN_BLOCKS else MAX_ROWS // 2  # where there are few, they share the rows
    row_tiles = ceil_div(rows, max_tile_m)
    tile_m = ceil_div(rows, 8 * row_tiles) * 8
    for tile_n in TILES_N:
        blocks = size // tile_n * split_k
        if size % tile_n == 0 and min_blocks <= blocks and blocks * row_tiles <= processors:
            return Tiling(tile_m, tile_n, COPY_COLUMNS * (2 if tile_m <= 64 else 1), split_k, gated)
    return None


def _split_k(size: int, columns: int, processors: int) -> int:
    """As many as two, where there is nothing else for half of the multiprocessors; four would leave some idle."""
    blocks = max((size // tile for tile in TILES_N if size % tile == 0 and size // tile <= processors), default=0)
    return 2 if blocks * 2 <= processors and columns >= 2 * MIN_SPLIT_COLUMNS else 1


WHAT = "products of decode batches (model.decode_products=torch does without this kernel)"
CAPABILITY = (9, 0)  # Hopper's matrix unit: no other generation has it


def supported(device: torch.device) -> bool:
    """Whether the kernel can run on a GPU."""
    return available() and torch.cuda.get_device_capability(device) == CAPABILITY


class DecodeGemm:
    """The products of given shapes, compiled."""

    def __init__(self, shapes: Iterable[tuple[int, int, bool]], rows: Iterable[int], device: torch.device) -> None:
        """`shapes` are the weights' `[N, K]` and whether they are gated, see `__call__`; `rows` what x may have.

        Those that don't suit the kernel are left out.
        """
        torch.cuda.synchronize(device)  # the driver loads kernels into torch's context, which there must be
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        wanted = {(m, *shape): choose_tiling(m, *shape, processors) for shape in set(shapes) for m in rows}
        self.tilings = {shape: found for shape, found in wanted.items() if found}
        distinct = list(set(self.tilings.values()))
        with ThreadPoolExecutor() as pool:
            compiled = pool.map(lambda tiling: compile_source(_source(tiling), "sm_90a", WHAT), distinct)
            self.kernels = {
                tiling: load(cubin, "product", tiling.shared_bytes, WHAT)
                for tiling, cubin in zip(distinct, compiled, strict=True)
            }

    def __call__(self, x: Tensor, weight: Tensor, gated: bool = False) -> Tensor | None:
        """`[M, N]`, or None if it wasn't compiled for these shapes. Both contiguous and in bfloat16.

        If it is gated, the weight holds gate and up, one after the other, and the result is silu(gate) * up,
        `[M, N / 2]`.
        """
        tiling = self.tilings.get((len(x), *weight.shape, gated))
        if tiling is None:
            return None
        out = x.new_empty(len(x), len(weight) // (2 if gated else 1))
        self.launch(tiling, x, weight, out)
        return out

    def launch(self, tiling: Tiling, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """Into `out`, on the current stream; can be captured in a CUDA graph."""
        from cuda.bindings import driver

        early, cluster = driver.CUlaunchAttribute(), driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = tiling.split_k, 1, 1
        launch = driver.CUlaunchConfig()
        launch.gridDimX = len(weight) // tiling.tile_n * tiling.split_k
        launch.gridDimY, launch.gridDimZ = ceil_div(len(x), tiling.tile_m), 1
        launch.blockDimX, launch.blockDimY, launch.blockDimZ = tiling.tile_n * 2 + 32, 1, 1
        launch.sharedMemBytes = tiling.shared_bytes
        launch.hStream = torch.cuda.current_stream(x.device).cuda_stream
        launch.attrs, launch.numAttrs = [early, cluster], 2
        values = (
            *(_map(weight, tiling.tile_n // (2 if tiling.gated else 1)), _map(x, tiling.tile_m)),
            *(out.data_ptr(), len(x), out.shape[1], weight.shape[1]),
        )
        types = (None, None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int)
        checked(driver.cuLaunchKernelEx(launch, self.kernels[tiling], (values, types), 0), WHAT)


def _map(matrix: Tensor, rows: int) -> Any:
    """What the copy engine needs to know of a matrix, to copy `rows` rows by COPY_COLUMNS columns at a time."""
    from cuda.bindings import driver as cu

    height, width = matrix.shape
    sizes, strides = [cu.cuuint64_t(width), cu.cuuint64_t(height)], [cu.cuuint64_t(width * 2)]
    copied, steps = [cu.cuuint32_t(COPY_COLUMNS), cu.cuuint32_t(rows)], [cu.cuuint32_t(1)] * 2
    encoded = cu.cuTensorMapEncodeTiled(
        cu.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, matrix.data_ptr(), sizes, strides, copied, steps,
        cu.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE, cu.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        cu.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        cu.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    return checked(encoded, WHAT)


def _source(tiling: Tiling) -> str:
    """The kernel's text, with the matrix unit's instruction for so many rows, which names all its registers."""
    sizes = {"ROWS": tiling.tile_m, "OUTS": tiling.tile_n, "PARTS": tiling.split_k, "HALVES": 2 if tiling.gated else 1}
    sizes |= {"SLOTS": tiling.stages, "DEEP": tiling.tile_k // COPY_COLUMNS}
    count = tiling.tile_m // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(sum[{i}])' for i in range(count))
    mma = (
        f'asm volatile("{{.reg .pred p; setp.ne.b32 p, %{count + 2}, 0; '
        f"wgmma.mma_async.sync.aligned.m64n{tiling.tile_m}k16.f32.bf16.bf16 {{{registers}}}, "
        f'%{count}, %{count + 1}, p, 1, 1, 0, 0;}}" : {operands} : "l"(a), "l"(b), "r"((int)(add)))'
    )
    defined = {**sizes, "MMA(sum, a, b, add)": mma}
    lines = "".join(f"#define {name} {value}\n" for name, value in defined.items())
    return lines + Path(__file__).with_name("decode_gemm.cu").read_text()
