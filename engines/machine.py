"""The processor and the GPU of this machine, as engines are bound to them."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

from engines.errors import RuntimeUnavailable


@cache
def cpu_name() -> str:
    """The model name, and the vector extensions that engines are built for."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    text = info.read_text("utf-8", "replace")
    name = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")),
                platform.machine())
    flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
    return " ".join([name, *(flag for flag in known if flag in flags)])


def gpu(device: str) -> tuple[str, str, str]:
    """(name, compute capability, driver version) of `cuda:N`. Raises RuntimeUnavailable where there is none."""
    index = device.removeprefix("cuda:")
    try:
        import pynvml
    except ImportError as error:
        raise RuntimeUnavailable(f"device {device}", "nvidia-ml-py is not installed", "",
                                 "pip install 'enginesmith[gpu]'") from error
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(index))
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        return pynvml.nvmlDeviceGetName(handle), f"{major}{minor}", pynvml.nvmlSystemGetDriverVersion()
    except (pynvml.NVMLError, ValueError) as error:
        raise RuntimeUnavailable(f"device {device}", f"no such GPU ({error})", "cpu, or cuda:N of a GPU at hand",
                                 "see nvidia-smi for the GPUs of this machine") from error
