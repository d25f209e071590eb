"""SGLang's own `fa3` attention backend on our kernels, as a plug-in.

SGLang loads `register` by the entry point of this package, in each of its processes and before it
imports any kernel. Nothing changes until `SGLANG_PLUGINS` names `triton_fa`: then what
`--attention-backend fa3` imports of `sgl_kernel.flash_attn` is our stand-in, and its planning,
graphs, sliding windows and speculative decoding stay SGLang's own.
"""

from __future__ import annotations

import logging

from triton_fa.integrations import require

require("sglang", ">=0.5.11,<0.6")

from sglang.srt.environ import envs

from triton_fa.compat import install

NAME = "triton_fa"
_logger = logging.getLogger("triton_fa")


def register() -> None:
    """Stand in for `sgl_kernel.flash_attn` in this process, if `SGLANG_PLUGINS` names us.

    Calling it again changes nothing more.
    """
    named = (envs.SGLANG_PLUGINS.get() or "").split(",")
    if NAME not in (name.strip() for name in named):
        return
    install("sgl_kernel.flash_attn", replace=True)
    _logger.info("sgl_kernel.flash_attn runs on triton_fa")
