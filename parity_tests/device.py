"""Where a run happens. Must be settled before triton is imported, so this imports torch only."""

import os
import sys
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """A torch device, and whether Triton's interpreter stands in for a GPU there."""

    name: str
    interpreted: bool

    @property
    def description(self) -> str:
        """For people."""
        if self.interpreted:
            return "CPU, kernels in Triton's interpreter (TRITON_INTERPRET=1), scaled-down cases"
        return f"{self.name}: {torch.cuda.get_device_name(self.name)}"


def settle(name: str | None = None) -> Device:
    """Choose the device; without a CUDA GPU, turn Triton's interpreter on for this process."""
    if os.environ.get("TRITON_FA_FORCE"):
        raise RuntimeError("TRITON_FA_FORCE is set: every backend would be the same one; unset it")
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise RuntimeError(f"device {name} was asked for, but torch sees no CUDA GPU")
        return Device(name, interpreted=False)
    if os.environ.get("TRITON_INTERPRET") != "1":
        if "triton" in sys.modules:
            raise RuntimeError("triton was imported before TRITON_INTERPRET=1 could be set")
        os.environ["TRITON_INTERPRET"] = "1"
    return Device(name, interpreted=True)
