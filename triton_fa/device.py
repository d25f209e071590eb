"""Facts about a device, looked up once."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from triton_fa.env import triton_interpreted


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What scheduling and tile choice need to know about a device."""

    kind: str  # "cuda", "hip" or "cpu"
    arch: tuple[int, int]  # compute capability; (0, 0) off NVIDIA
    num_sms: int  # multiprocessors, or compute units
    shared_memory: int  # bytes a program may use
    warp_size: int = 32  # 64 on AMD's CDNA


@functools.cache
def facts(device: torch.device) -> DeviceFacts:
    """Facts of `device`. For a CPU these describe the Triton interpreter."""
    if device.type != "cuda":
        return DeviceFacts("cpu", (0, 0), 4, 1 << 20)
    props = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        shared = (160 if "gfx95" in getattr(props, "gcnArchName", "") else 64) << 10
        warp_size = getattr(props, "warp_size", 64)
        return DeviceFacts("hip", (0, 0), props.multi_processor_count, shared, warp_size)
    shared = getattr(props, "shared_memory_per_block_optin", 99 << 10)
    return DeviceFacts("cuda", (props.major, props.minor), props.multi_processor_count, shared)


def runs_triton(device: torch.device) -> bool:
    """Whether Triton kernels can run on `device`, going by its type alone."""
    return device.type == "cuda" or (device.type == "cpu" and triton_interpreted())
