"""Kernels in CUDA C++: NVRTC, which torch brings along, compiles them in about a second; the driver loads them."""

from typing import Any

import torch


def available() -> bool:
    """Whether the bindings are there; torch for CUDA needs them too, as a rule."""
    try:
        import cuda.bindings  # noqa: F401
    except ImportError:
        return False
    return True


def compile_source(source: str, architecture: str, what: str) -> bytes:
    """The machine code for an architecture such as `sm_90a`. Needs no GPU and may run in several threads.

    Division and `expf` are rounded as in torch's own kernels: no fast mathematics.

    Raises:
        RuntimeError: the compiler's messages; of `what`, if it can't even start.
    """
    from cuda.bindings import nvrtc

    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []), what)
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    result = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if result[0].value:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program), what)
        checked(nvrtc.nvrtcGetProgramLog(program, log), what)
        raise RuntimeError(log.decode())
    cubin: bytes = b" " * checked(nvrtc.nvrtcGetCUBINSize(program), what)
    checked(nvrtc.nvrtcGetCUBIN(program, cubin), what)
    checked(nvrtc.nvrtcDestroyProgram(program), what)
    return cubin


def load(cubin: bytes, name: str, shared_bytes: int, what: str) -> Any:
    """The kernel `name` on the current device, which may take `shared_bytes` of dynamic shared memory.

    The driver loads it into torch's context, which must be there.
    """
    from cuda.bindings import driver

    kernel = checked(driver.cuModuleGetFunction(checked(driver.cuModuleLoadData(cubin), what), name.encode()), what)
    if shared_bytes:
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(kernel, most, shared_bytes), what)
    return kernel


def checked(result: tuple[Any, ...], what: str) -> Any:
    """What a call of the bindings returned besides its error code.

    Raises:
        RuntimeError: the code, and in words `what` it is about.
    """
    code, *rest = result
    if code.value:
        raise RuntimeError(f"{what}: {code!r}")
    return rest[0] if rest else None


def architecture(device: torch.device, features: str = "") -> str:
    """The name of a GPU's generation, with `a` in `features` for what that generation alone has."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{features}"
