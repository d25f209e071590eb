"""Local memory within loops that is known and stays, and why.

An exception that nothing needs any more is a fault of a run of the whole matrix.
"""

import re
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True)
class Exempt:
    """Launches that may go through local memory in loops; every pattern matches from the start."""

    why: str
    target: str
    case: str
    kernel: str
    triton: str = ""  # version

    def applies(self, target: str, case: str, kernel: str) -> bool:
        return bool(
            re.match(self.triton, metadata.version("triton"))
            and re.match(self.target, target)
            and re.match(self.case, case)
            and re.match(self.kernel, kernel)
        )


EXCEPTIONS: tuple[Exempt, ...] = ()
