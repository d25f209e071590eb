"""`python -m triton_fa`."""

from __future__ import annotations

import sys

try:
    from triton_fa.cli import main
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("click", "rich"):
        raise
    sys.exit(f"python -m triton_fa needs {error.name}: pip install 'triton-fa[cli]'")

if __name__ == "__main__":
    main(prog_name="python -m triton_fa")
