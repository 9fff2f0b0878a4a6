"""What a figure was measured on."""

import os
import platform
from pathlib import Path

import torch


def describe_hardware() -> dict[str, object]:
    """Return processor, cores and GPUs by their makers' names, and no name of the machine."""
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = dict(
            [part.strip() for part in line.split(":", 1)]
            for line in cpuinfo.read_text().splitlines()
            if ":" in line
        )
        if "model name" in lines:
            name = lines["model name"]
            widest = [f for f in ("avx2", "avx512f", "amx_bf16") if f in lines.get("flags", "")]
            return f"{name} ({', '.join(widest)})" if widest else name
    return platform.processor() or platform.machine()
