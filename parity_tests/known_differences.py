"""Where FlashAttention-3 and -4, or Triton's interpreter, differ by design.

An entry widens the budget of the cases it applies to, or says why they are not launched at all. A
result inside the ordinary budget still counts as agreement: no entry is needed to pass.

Each entry has a case of its own, which is part of every run whose backends it covers. Whether the
difference still exists is judged by that case alone: `applies` is an upper bound, so that other
cases may well agree. An entry that is outlived fails the run (`suite.occurred`).
"""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from parity_tests import named
from parity_tests.budgets import Limits
from parity_tests.cases import Case, unbounded

FA3, FA4 = 3, 4
# What an entry does: widen a budget, or keep the backend from being launched, for either reason.
BUDGET, INCOMPARABLE, CRASH = "budget", "not comparable", "crash"


def _same(limits: Limits, _case: Case) -> Limits:
    return limits


@dataclass(frozen=True)
class Difference:
    """One documented disagreement."""

    id: str
    reason: str
    where: str  # who says so, or how it was seen
    applies: Callable[[Case, Any], bool]
    case: Case  # that shows it
    widen: Callable[[Limits, Case], Limits] = _same
    kind: str = BUDGET
    needs_clean_inputs: bool = False  # True: zeros in place of NaN, page 0 in place of garbage

    @cached_property
    def own_case(self) -> Case:
        """The case that shows it, by a name."""
        return self.case if self.case.name else self.case.with_changes(name=f"known: {self.id}")


def has_empty_rows(case: Case) -> bool:
    """Whether some query row may see no key at all (an upper bound, cheap to tell)."""
    if 0 in case.keys:
        return True
    reaches_out = any(sq > sk for sq, sk in zip(case.seqlens_q, case.keys, strict=True))
    return reaches_out and (case.causal or not unbounded(case.window) or case.attention_chunk > 0)


def may_hide_new_keys(case: Case) -> bool:
    """Whether some new key may be one that no query sees (an upper bound, cheap to tell)."""
    left, _ = case.window
    nobody = any(sq == 0 and new > 0 for sq, new in zip(case.seqlens_q, case.new, strict=True))
    return nobody or (
        sum(case.new) > 0 and ((left is not None and left >= 0) or case.attention_chunk > 0)
    )


def _on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def _fast_tanh_lse(limits: Limits, case: Case) -> Limits:
    # tanh.approx.f32 has a relative error of 2**-11, so a capped score is off by at most
    # softcap * 2**-11, and the log of a sum of exponentials by no more than its worst score.
    return dataclasses.replace(limits, lse_atol=limits.lse_atol + case.softcap * 2.0**-11)


def _accept_empty_lse(*values: float) -> Callable[[Limits, Case], Limits]:
    return lambda limits, _case: dataclasses.replace(limits, empty_lse=(*limits.empty_lse, *values))


def _truncation(limits: Limits, case: Case) -> Limits:
    # bfloat16 keeps 8 bits: cutting the rest off is wrong by up to 2**-7 of a value, once for the
    # weights and once for the result, and always in the same direction.
    limits = dataclasses.replace(limits, relative=2.0**-6)
    if case.rotary_dim == 0:
        return limits
    # Rotated queries and keys are cut off too, by 2**-8 of their value on average: a score by 2**-7
    # of its size. That is rarely above 4 standard deviations; with a softcap c, for which queries
    # are c / 4 times as large, what is left of it by the slope of tanh is below c / 2.
    scale = case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale
    size = max(4.0 * scale * case.head_dim**0.5, case.softcap / 2)
    return dataclasses.replace(limits, lse_atol=limits.lse_atol + size * 2.0**-7)


def _named(name: str) -> Case:
    return next(case for case in named.full() if case.name == name)


DIFFERENCES = (
    Difference(
        id="interpreter-truncates-bfloat16",
        reason="Triton's interpreter cuts float32 off to bfloat16 instead of rounding it",
        where="seen with Triton 3.6.0 and 3.9.0: triton/runtime/interpreter.py",
        applies=lambda case, ver: (
            ver == "triton"
            and case.out_dtype == "bfloat16"
            and os.environ.get("TRITON_INTERPRET") == "1"
        ),
        case=Case(**named.PACKED, seqlens_q=(128,), seqlens_k=(64,), softmax_scale=0.01),
        widen=_truncation,
    ),
    Difference(
        id="unused-slots-must-be-finite",
        reason="unused slots of a loaded tile meet weights of zero, and 0 * NaN is NaN;"
        " page ids of unused table entries are loaded",
        where="Dao-AILab/flash-attention#2374; FA4 4.0.0b36 documents it for the tail page",
        applies=lambda _case, ver: ver in (FA3, FA4),
        case=Case(**named.BATCHED, seqlens_q=(1,), seqlens_k=(5,), pad_k=19),
        needs_clean_inputs=True,
    ),
    Difference(
        id="fast-tanh",
        reason="softcap uses the hardware's approximate tanh",
        where="hopper/utils.h and flash_attn/cute/utils.py: tanh.approx.f32",
        applies=lambda case, ver: ver in (FA3, FA4) and case.softcap > 0,
        case=Case(
            **named.PACKED,
            seqlens_q=(300,),
            seqlens_k=(1,),  # the LSE is the score itself
            heads_q=8,
            softcap=1000.0,  # at 50 the error was never above 0.0004
            softmax_scale=0.3,
        ),
        widen=_fast_tanh_lse,
    ),
    Difference(
        id="fa3-sink-without-key-block",
        reason="a tile without any key block writes lse -inf and leaves the sink out",
        where="hopper/epilogue_fwd.hpp store_zero, as built in sgl-kernel",
        applies=lambda case, ver: ver == FA3 and case.sinks and has_empty_rows(case),
        case=_named("zero lengths, varlen, sinks"),
        widen=_accept_empty_lse(-float("inf")),
    ),
    Difference(
        id="fa3-empty-key-tensor",
        reason="when the key tensor itself has no element, the host fills lse with +inf",
        where="hopper/flash_api.cpp: total_k == 0",
        applies=lambda case, ver: (
            ver == FA3 and case.kv_layout != "paged" and case.capacity == 0 and sum(case.new) == 0
        ),
        case=Case(**named.BATCHED, seqlens_q=(1, 1), seqlens_k=(0, 0)),
        widen=_accept_empty_lse(float("inf")),
    ),
    Difference(
        id="fa3-more-than-64-sinks",
        reason="sinks are staged in 64 shared-memory entries without a check: reads out of bounds",
        where="hopper/mainloop_fwd_sm90_tma_gmma_ws.hpp, as built in sgl-kernel",
        applies=lambda case, ver: ver == FA3 and case.sinks and case.heads_q > 64,
        case=Case(heads_q=66, sinks=True),
        kind=INCOMPARABLE,
    ),
    Difference(
        id="fa3-stores-visible-keys",
        reason="new keys are stored by the programs that attend to them: not where no query sees"
        " their tile",
        where="hopper/block.h get_n_block_k_new_min_max, hopper/mainloop_fwd_*.hpp store_kv_new",
        applies=lambda case, ver: ver == FA3 and may_hide_new_keys(case),
        case=Case(
            q_layout="packed",
            append="packed",
            seqlens_q=(0, 1),
            seqlens_k=(5, 5),
            seqlens_new=(1, 1),
        ),
        widen=lambda limits, _case: dataclasses.replace(limits, hidden_keys_may_be_missing=True),
    ),
    Difference(
        id="fa3-append-beyond-the-cache",
        reason="new keys that the cache has no room for are written behind it",
        where="hopper/mainloop_fwd_*.hpp store_kv_new: compared with the new length only",
        applies=lambda case, ver: (
            ver == FA3 and sum(case.ends) < sum(case.seqlens_k) + sum(case.new)
        ),
        case=Case(**named.BATCHED, append="packed", seqlens_new=(2,), overflow=1),
        kind=INCOMPARABLE,
    ),
    Difference(
        id="fa3-angles-beyond-the-table",
        reason="positions behind the last row of rotary_cos are read from behind it",
        where="hopper/rotary.h load_cos_sin: compared with the length of the sequence only",
        applies=lambda case, ver: ver == FA3 and 0 < case.rotary_rows < case.rotary_end,
        case=Case(
            **named.BATCHED,
            append="batched",
            seqlens_new=(1,),
            rotary_dim=16,
            rotary_rows=8,
        ),
        kind=INCOMPARABLE,
    ),
    Difference(
        id="fa3-window-and-chunk",
        reason="with a left window shorter than the attention chunk, rows see the keys of the"
        " chunk before that the window reaches",
        where="sglang-kernel 0.4.2 on an H200: wrong at windows 1 to 3 of chunk 7, 16 of 64",
        applies=lambda case, ver: (
            ver == FA3
            and case.window[0] is not None
            and 0 <= case.window[0] < case.attention_chunk - 1
        ),
        case=Case(causal=True, window=(1, 0), attention_chunk=7, seqlens_q=(2,), seqlens_k=(36,)),
        kind=INCOMPARABLE,
    ),
    Difference(
        id="fa3-rotates-padded-heads-wrongly",
        reason="new keys turned by halves: some of the turned dims are 0 in the cache where heads"
        " are padded to a wider kernel",
        where="sglang-kernel 0.4.2 on an H200, paged and not: (head_dim, rotary_dim) (32, 16),"
        " (32, 32), (40, 32), (48, 48), (72, 64), (80, 80), (112, 112), (160, 160), (224, 224)",
        applies=lambda case, ver: (
            ver == FA3
            and case.rotary_dim > 0
            and not case.rotary_interleaved
            and case.head_dim not in (64, 96, 128, 192, 256)
        ),
        case=Case(
            heads_q=1,
            heads_kv=1,
            head_dim=32,
            head_dim_v=32,
            append="batched",
            rotary_dim=16,
            rotary_interleaved=False,
            seqlens_k=(0,),
            seqlens_new=(2,),
        ),
        kind=INCOMPARABLE,
    ),
    Difference(
        id="fa3-splits-padded-queries-wrongly",
        reason="padded queries with seqused_q, split: sums are wrong, and results wrong or missing",
        where="sglang-kernel 0.4.2 on an H200: wrong in each of 16 calls with batched queries,"
        " right with packed ones",
        applies=lambda case, ver: (
            ver == FA3 and case.pad_q > 0 and case.num_splits not in (None, 1)
        ),
        case=Case(
            entry="varlen",
            kv_layout="packed",
            page_size=0,
            heads_q=2,
            heads_kv=1,
            seqlens_q=(1, 0),
            seqlens_k=(193, 0),
            num_splits=2,
            pad_q=1,
        ),
        kind=INCOMPARABLE,
    ),
    Difference(
        id="fa3-wide-values-in-float8",
        reason="e4m3 values wider than keys of up to 64 dims: results are unwritten, or of any"
        " size",
        where="sglang-kernel 0.4.2 on an H200: head dims (32, 192), (64, 192) and (64, 128); right"
        " in bfloat16",
        applies=lambda case, ver: (
            ver == FA3 and case.dtype == "float8_e4m3fn" and case.head_dim <= 64 < case.head_dim_v
        ),
        case=Case(
            **named.PACKED,
            dtype="float8_e4m3fn",
            heads_q=1,
            heads_kv=1,
            head_dim=32,
            head_dim_v=192,
            seqlens_q=(31,),
            seqlens_k=(552,),
        ),
        kind=INCOMPARABLE,
    ),
    Difference(
        id="fa3-wide-padded-values-in-large-pages",
        reason="values wider than keys, of a width that is padded: some rows are wrong with large"
        " pages",
        where="sglang-kernel 0.4.2 on an H200: head dims (64, 160), pages of 256, float16; 32 of 62"
        " calls, of which this is one as it was found",
        applies=lambda case, ver: (
            ver == FA3
            and case.kv_layout == "paged"
            and case.page_size >= 128
            and case.head_dim <= 64 < case.head_dim_v
            and case.head_dim_v not in (128, 192, 256, 512)
        ),
        case=Case(
            dtype="float16",
            heads_q=16,
            heads_kv=8,
            head_dim=64,
            head_dim_v=160,
            q_layout="packed",
            page_size=256,
            kv_strides="split",
            causal=True,
            out=True,
            seqlens_q=(1, 936, 0, 63, 128),
            seqlens_k=(537, 64, 255, 17, 65),
            pad_k=1,
            tail_q=3,
            spare_pages=2,
            table_slack=1,
            seed=119705,
        ),
        kind=INCOMPARABLE,
    ),
    Difference(
        id="fa3-empty-key-tensor-clears-all-rows",
        reason="when the key tensor itself has no element, the host clears out whole, with the rows"
        " behind the query lengths",
        where="sglang-kernel 0.4.2 on an H200; hopper/flash_api.cpp: total_k == 0",
        applies=lambda case, ver: (
            ver == FA3
            and case.kv_layout != "paged"
            and case.capacity == 0
            and sum(case.new) == 0
            and case.tail_q + case.pad_q > 0
        ),
        case=Case(
            **named.BATCHED,
            q_layout="packed",
            seqlens_q=(1, 1),
            seqlens_k=(0, 0),
            tail_q=3,
            out=True,
        ),
        kind=INCOMPARABLE,
    ),
    Difference(
        id="fa3-left-padding-beyond-the-keys",
        reason="padding that is longer than cache_seqlens makes a negative length of it",
        where="hopper/seqlen.h: seqlen_k_og",
        applies=lambda case, ver: (
            ver == FA3
            and any(pad > n for pad, n in zip(case.leftpads, case.seqlens_k, strict=False))
        ),
        case=Case(
            append="batched",
            seqlens_k=(2,),
            seqlens_new=(4,),
            leftpad=True,
            leftpads=(3,),
        ),
        kind=INCOMPARABLE,
    ),
    Difference(
        id="fa4-wide-heads-on-gathered-pages",
        reason="the copy that gathers pages makes an illegal memory access with wide heads",
        where="FA4 4.0.0b36 on an H200: head_dim 160, page_size 16",
        applies=lambda case, ver: (
            ver == FA4
            and case.kv_layout == "paged"
            and case.page_size != 128
            and 128 < case.head_dim < 256
            and _on_hopper()
        ),
        case=Case(head_dim=160, head_dim_v=160),
        kind=CRASH,
    ),
    Difference(
        id="fa4-gathers-144-keys",
        reason="tiles of 144 keys, gathered from pages of another size, give wrong numbers",
        where="FA4 4.0.0b36 on an H200: head_dim 80 and 96, pages of 16, 64, 128 and 256",
        applies=lambda case, ver: (
            ver == FA4
            and case.kv_layout == "paged"
            and case.page_size != 144
            and 64 < case.head_dim <= 96
            and not case.causal
            and unbounded(case.window)
            and _on_hopper()
        ),
        case=Case(head_dim=80, head_dim_v=80),
        kind=INCOMPARABLE,
    ),
    Difference(
        id="fa4-values-wider-than-keys",
        reason="the launch is rejected by CUDA: the tile asks for more shared memory than there is",
        where="FA4 4.0.0b36 on an H200: head_dim 96 with head_dim_v 192",
        applies=lambda case, ver: (
            ver == FA4 and case.head_dim_v > max(128, case.head_dim) and _on_hopper()
        ),
        case=Case(head_dim=96, head_dim_v=192),
        kind=CRASH,
    ),
)


def known(case: Case, ver: Any) -> tuple[Difference, ...]:
    """The entries that apply to this case on this backend."""
    return tuple(entry for entry in DIFFERENCES if entry.applies(case, ver))
