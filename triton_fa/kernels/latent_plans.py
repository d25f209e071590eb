"""Which decodes with scored values run on the Hopper kernel of `latent.py`, and how.

As `hopper_plans.py` is for prefill; `decode.py` computes everything else.
"""

from __future__ import annotations

import functools
import importlib
import logging
from dataclasses import dataclass
from typing import Any

import torch

from triton_fa.device import DeviceFacts
from triton_fa.env import settings
from triton_fa.kernels import hopper_plans
from triton_fa.kernels.hopper_plans import MOST, WRAP, Described, View
from triton_fa.problem import Problem
from triton_fa.schedule.tiles import DecodeTile

FEATURES = frozenset(
    {
        "qv",
        "only_qv",
        "scheduler_metadata",
        "seqused_q",
        "out",
        "batch_invariant",
        "k",
        "rotary_cos",
        "rotary_seqlens",
        "cache_batch_idx",
    }
)
ROWS = 64
"""Query rows of a program."""
FEWEST = 16
"""Up to so many rows `decode.py` is as quick. Two tokens of 16 heads took 88 us there and four took
54 here (16 sequences of 8192 keys)."""
K_DIM, V_DIM = 64, 512
SMALLEST_BOX = 32
"""Keys that a descriptor loads at once; of 16, the producer's addresses spill registers."""
TENSORS = ("k_ptr", "v_ptr")

_logger = logging.getLogger("triton_fa")


@dataclass(frozen=True)
class Variant:
    """What the kernel is specialised on besides argument types; it is called C there.

    Plain values only: together with the kernel's source their text names a compiled kernel.
    """

    BLOCK_N: int  # keys of a tile
    TMA: bool  # tiles are loaded by descriptors
    BOX: int  # keys of a descriptor's box
    PAGE_SIZE: int
    HAS_K: bool
    PRODUCER_WARPS: int
    NUM_HEADS_KV: int
    ROW_BLOCKS: int
    GROUP: int
    MAX_ROWS: int
    BLOCK_B: int
    LANES_DIVIDE: bool
    CHUNKED: bool
    HAS_LSE: bool
    PDL: bool


SCHEDULED = DecodeTile(64, 16, 2, 1)
"""What the schedule asks of a tile."""


def takes(problem: Problem, device: DeviceFacts, most_rows: int) -> bool:
    """Whether the kernel computes `problem`, of at most `most_rows` rows a sequence and kv head."""
    reasons = refusals(problem, device, most_rows)
    if reasons:
        _logger.debug("latent decode runs on the portable kernel: %s", "; ".join(reasons))
        return False
    _logger.debug("latent decode runs on the Hopper kernel")
    return True


@functools.cache
def kernel_module() -> Any:
    """`latent.py`, or the text of the error of importing it."""
    try:
        return importlib.import_module("triton_fa.kernels.latent")
    except (ImportError, AttributeError) as error:  # other names in Gluon
        return f"{type(error).__name__}: {error}"


def refusals(problem: Problem, device: DeviceFacts, most_rows: int) -> list[str]:
    """Every reason why the kernel does not take `problem`."""
    reason = hopper_plans.unavailable(device)
    if reason:
        return [reason]
    if isinstance(kernel_module(), str):
        return [kernel_module()]
    spec = problem.spec
    reasons = [f"{name} is given" for name in sorted(spec.features - FEATURES)]
    if spec.dtype not in (torch.bfloat16, torch.float16) or spec.kv_dtype != spec.dtype:
        reasons.append(f"{spec.dtype} beside {spec.kv_dtype}")
    if spec.head_dim_v != V_DIM or ("only_qv" not in spec.features and spec.head_dim != K_DIM):
        reasons.append(f"head dims {spec.head_dim}, {spec.head_dim_v}")
    if spec.softmax_scale < 0:
        reasons.append("softmax_scale < 0")
    if spec.softcap > 0:
        reasons.append("softcap")
    if spec.window_left >= 0 or spec.attention_chunk:
        reasons.append("rows do not see the first keys")
    rows = spec.q_heads_per_kv if spec.batch_invariant else most_rows
    if settings().hopper is None and rows <= FEWEST:
        reasons.append(f"{rows} rows")
    for name in ("qv", "v") if "only_qv" in spec.features else ("q", "qv", "k", "v"):
        if not _in_steps(getattr(problem.tensors, name), spec.batch_invariant):
            reasons.append(f"{name}: strides or address")
    return reasons


def _in_steps(tensor: torch.Tensor, all_strides: bool) -> bool:
    """Whether rows begin at multiples of 16 bytes, those of all heads within 32 bits of elements.

    `all_strides` is as in `hopper_plans.py`.
    """
    sized = zip(tensor.stride()[:-1], tensor.shape, strict=False)
    used = [s for s, size in sized if all_strides or size > 1]
    in_steps = all(s > 0 and s % 8 == 0 for s in used) and tensor.stride(-1) == 1
    near = (tensor.shape[-2] - 1) * tensor.stride(-2) < 1 << 31
    return in_steps and near and tensor.data_ptr() % 16 == 0


def launch(
    problem: Problem, common: dict[str, Any], shared: dict[str, Any]
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(kernel, values, options) of the launch, whose part of the schedule is `shared`."""
    spec = problem.spec
    page = spec.page_size
    box = min(SCHEDULED.block_n, page & -page) if page else SCHEDULED.block_n
    has_k = "only_qv" not in spec.features
    described = box >= SMALLEST_BOX and _describable(problem.tensors.v)
    if has_k:
        described = described and _describable(problem.tensors.k)
    c = Variant(
        BLOCK_N=SCHEDULED.block_n,
        TMA=described,
        BOX=box,
        PAGE_SIZE=page,
        HAS_K=has_k,
        PRODUCER_WARPS=1 if described else 4,
        CHUNKED=shared["most_pieces"] is not None,
        NUM_HEADS_KV=spec.num_heads_kv,
        GROUP=spec.q_heads_per_kv,
        HAS_LSE=problem.return_lse,
        MAX_ROWS=shared["MAX_ROWS"],
        ROW_BLOCKS=shared["ROW_BLOCKS"],
        BLOCK_B=shared["BLOCK_B"],
        LANES_DIVIDE=shared["LANES_DIVIDE"],
        PDL=shared["PDL"],
    )
    kernel = Described(
        kernel_module().latent_kernel,
        TENSORS,
        views(problem, c, common) if described else (None, None),
    )
    given = common | shared
    values = {name: given[name] for name in kernel.arg_names if name in given} | {"C": c}
    return kernel, values, {"num_warps": 4}


def _describable(tensor: torch.Tensor) -> bool:
    """Whether a tensor map can hold the strides and sizes of [..., tokens, heads, dim]."""
    strides = tensor.stride()
    columns = (tensor.shape[-2] - 1) * strides[-2] + tensor.shape[-1]
    fits = columns < MOST and tensor.shape[-3] < WRAP and tensor.shape[0] < WRAP
    return bool(fits and strides[-3] > 0 and strides[-3] % 8 == 0 and max(strides) < 1 << 34)


def views(problem: Problem, c: Variant, common: dict[str, Any]) -> list[View | None]:
    """The descriptors of K and V; see `hopper.py` on their five dimensions."""
    spec, tensors = problem.spec, problem.tensors
    rows = 1 if spec.key_layout == "packed" else tensors.k.shape[0]
    made: list[View | None] = []
    for place, (name, dim, width) in enumerate((("k", K_DIM, K_DIM), ("v", V_DIM, V_DIM // 2))):
        if name == "k" and not c.HAS_K:
            made.append(None)
            continue
        per_batch, per_token, per_head = (common[f"{name}_stride_{axis}"] for axis in "bth")
        shape = (MOST, MOST, rows, WRAP, (spec.num_heads_kv - 1) * per_head + dim)
        per_batch = per_batch if rows > 1 else per_token
        strides = ((1 << 34) - per_token, per_token, per_batch, per_token, 1)
        # Boxes lie one after the other within columns of 128 bytes.
        block = (1, 1, 1, c.BOX, width if c.BOX == c.BLOCK_N else 64)
        made.append(View(place, shape, strides, block, spec.dtype))
    return made
