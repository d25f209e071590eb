"""SGLang: our attention backend `triton_fa`, or our kernels under SGLang's own `fa3`.

SGLang loads `register` by the entry point of this package, in each of its processes, before it
reads its arguments and before it imports any kernel. That makes the backend's name known; nothing
runs on it until `--attention-backend triton_fa` asks for it. If `SGLANG_PLUGINS` names `triton_fa`,
what `--attention-backend fa3` imports of `sgl_kernel.flash_attn` is our stand-in as well, and its
planning, graphs, sliding windows and speculative decoding stay SGLang's own.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from triton_fa.integrations import FrameworkVersionError, require

require("sglang", ">=0.5.11,<0.6")

from sglang.srt.environ import envs

from triton_fa.compat import install

NAME = "triton_fa"
# The calls under `fa3` are older than the interface that the backend is written for.
BACKEND_VERSIONS = ">=0.5.23,<0.6"
_logger = logging.getLogger("triton_fa")


def register() -> None:
    """Make the backend known and, if `SGLANG_PLUGINS` names us, stand in below `fa3`.

    Calling it again changes nothing more. In an SGLang without the backend's interface only the
    stand-in is there; the log says so.
    """
    stand_in()
    try:
        require("sglang", BACKEND_VERSIONS)
    except FrameworkVersionError as error:
        _logger.info("no attention backend %s: %s", NAME, error)
        return
    choices = importlib.import_module("sglang.srt.arg_groups.choices")
    for known in (
        choices.ATTENTION_BACKEND_CHOICES,
        choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES,
    ):
        if NAME not in known:
            known.append(NAME)
    registry = importlib.import_module("sglang.srt.layers.attention.attention_registry")
    registry.register_attention_backend(NAME)(create_backend)


def create_backend(runner: Any) -> Any:
    """The backend of a model runner. Its module imports much of SGLang: only where it is chosen.

    Raises:
        FeatureError: the model or the settings need what the backend does not have.
    """
    backend = importlib.import_module("triton_fa.integrations.sglang_backend")
    made = backend.TritonFABackend(runner)
    _logger.info("SGLang's attention runs on triton_fa")
    return made


def stand_in() -> None:
    """Stand in for `sgl_kernel.flash_attn` in this process, if `SGLANG_PLUGINS` names us."""
    named = (envs.SGLANG_PLUGINS.get() or "").split(",")
    if NAME not in (name.strip() for name in named):
        return
    install("sgl_kernel.flash_attn", replace=True)
    _logger.info("sgl_kernel.flash_attn runs on triton_fa")
