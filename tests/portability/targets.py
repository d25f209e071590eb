"""The chips: what the compiler and the planner have to know of each."""

from dataclasses import dataclass

from triton_fa.device import DeviceFacts


@dataclass(frozen=True)
class Target:
    """What a kernel is compiled for, and planned on."""

    arch: int | str
    warp_size: int
    facts: DeviceFacts


def nvidia(capability: int, sms: int, shared_kib: int) -> Target:
    arch = divmod(capability, 10)
    return Target(capability, 32, DeviceFacts("cuda", arch, sms, shared_kib << 10))


def amd(arch: str, warp_size: int, units: int, shared_kib: int = 64) -> Target:
    return Target(arch, warp_size, DeviceFacts("hip", (0, 0), units, shared_kib << 10, warp_size))


TARGETS = {
    "sm_80": nvidia(80, sms=108, shared_kib=163),
    "sm_86": nvidia(86, sms=84, shared_kib=99),
    "sm_89": nvidia(89, sms=142, shared_kib=99),
    "sm_90": nvidia(90, sms=132, shared_kib=227),
    "sm_100": nvidia(100, sms=148, shared_kib=227),
    "sm_103": nvidia(103, sms=148, shared_kib=227),
    "sm_120": nvidia(120, sms=170, shared_kib=99),
    "gfx90a": amd("gfx90a", 64, units=104),
    "gfx942": amd("gfx942", 64, units=304),
    "gfx950": amd("gfx950", 64, units=256, shared_kib=160),
    "gfx1100": amd("gfx1100", 32, units=96),
    "gfx1201": amd("gfx1201", 32, units=64),
}
