"""Which prefills run on the Hopper kernel of `hopper.py`, and how it is launched.

The kernel is written in Gluon, whose meaning may change with a Triton version: it is chosen on
versions that it was run on, and `prefill.py` computes everything else. Its module is imported when
it is first chosen.
"""

from __future__ import annotations

import functools
import importlib
import logging
import struct
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import mangle_type

from triton_fa.device import DeviceFacts
from triton_fa.env import settings
from triton_fa.errors import UnsupportedError
from triton_fa.kernels import submit
from triton_fa.kernels.compat import INTERPRETED, TRITON_VERSION
from triton_fa.kernels.launch import names_of, specialisation
from triton_fa.kernels.transpose import transpose_kernel
from triton_fa.problem import BlockSparseTensors, Problem
from triton_fa.spec import AttnSpec

RUN_ON: frozenset[tuple[int, int]] = frozenset({(3, 6)})
"""Triton versions that the kernel was run and tested on."""

FEATURES = frozenset(
    {
        "sinks",
        "scheduler_metadata",
        "seqused_q",
        "out",
        "batch_invariant",
        "k",
        "rotary_cos",
        "rotary_seqlens",
        "cache_batch_idx",
        "cache_leftpad",
        "attention_chunk",
        "score_mod",
        "mask_mod",
        "aux_tensors",
        "block_sparse_tensors",
    }
)
DESCALES = frozenset({"q_descale", "k_descale", "v_descale"})
SHORTEST = 96
"""Where no sequence has more query tokens than this, `prefill.py` wastes fewer rows: its tiles hold
those of all heads of a group."""
TRANSPOSED_KEYS = 128  # of one program's block
TRANSPOSING_PROGRAMS = 32
"""About the most for each multiprocessor: bounds may be far above the lengths, and programs that
find nothing take time. On an H200 each has at most 32 blocks of 2 GiB at head_dim 128, however
skewed they are."""
NARROWEST = 512
"""Where rows see fewer keys than this its larger tiles are mostly mask: at head_dim 64 and a window
of 128 it took 498 µs, `prefill.py` 301; with a window of 1024 it is 1.4 times as quick."""

WRAP = 1 << 30
MOST = 0x7FFF0000  # the largest size of a descriptor's dimension that is used
SHARED_MEMORY = 227 << 10
ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8e4nv"}
KEPT_DESCRIPTORS = 4096
HOPPER = GPUTarget("cuda", 90, 32)
TENSORS = ("out_ptr", "q_ptr", "k_ptr")
"""What `hopper.py` has descriptors of, besides values."""

_logger = logging.getLogger("triton_fa")


@dataclass(frozen=True)
class Variant:
    """What the kernel is specialised on besides argument types; it is called C there.

    Plain values only: together with the kernel's source their text names a compiled kernel.
    """

    BLOCK_M: int  # query tokens of a tile
    BLOCK_N: int  # keys of a tile
    CONSUMERS: int
    FP8: bool  # values come transposed, weights are float8
    BYTES: int  # of an element of queries, keys and values
    D0: int  # columns of the panels of queries and keys, 0 for no second one
    D1: int
    V0: int  # and of values and the result
    V1: int
    NAMED: bool  # stages are given back by hardware barriers
    PARTIAL: bool  # row sums stay divided between threads
    LAZY: bool  # accumulators are rescaled where the maximum grows by more than 2^SLACK
    SLACK: float
    SHIFT: float  # weights are times 2^SHIFT
    OWN_OUT: bool  # the result has shared memory of its own, else that of the queries
    REGISTERS: int  # of a consumer's threads, and of the producer's
    PRODUCER_REGISTERS: int
    BOX: int  # keys of a descriptor's box
    ALIGN: int  # key tiles begin at multiples of this
    PAGE_SIZE: int
    DENSE: bool  # queries are rows of a batch, not packed
    HEADS_Q: int
    GROUP: int
    DECODE_ROWS: int
    PLANNED: bool  # tiles are found in the prefix sums of all sequences
    ORDERED: bool  # in the order of the plan, if it is one
    BLOCK_B: int
    HAS_FIRST: bool  # rows may not see the first keys of what is loaded, or the last
    HAS_END: bool
    HAS_SOFTCAP: bool
    HAS_LSE: bool
    SPARSE_M: int  # queries and keys of a listed block; 0 without lists
    SPARSE_N: int


@dataclass(frozen=True)
class Tile:
    """The part of a variant that follows from the head dims; what was measured is in the log."""

    block_m: int
    block_n: int
    consumers: int
    dims: tuple[int, int]  # panels of queries and keys
    dims_v: tuple[int, int]
    named: bool = True
    partial: bool = True
    lazy: bool = False
    own_out: bool = True
    registers: tuple[int, int] = (240, 24)
    slack: float = 8.0
    shift: float = 0.0


TILES = {
    (64, 64): Tile(192, 128, 3, (64, 0), (64, 0), False, False, registers=(160, 32)),
    (80, 80): Tile(128, 128, 2, (64, 16), (64, 16)),
    (96, 96): Tile(128, 128, 2, (64, 32), (64, 32)),
    (128, 128): Tile(128, 128, 2, (128, 0), (128, 0)),
    (160, 160): Tile(128, 128, 2, (128, 32), (128, 32), own_out=False),
    (192, 128): Tile(128, 128, 2, (128, 64), (128, 0), own_out=False),
    (192, 192): Tile(128, 64, 2, (128, 64), (128, 64)),
    (256, 256): Tile(128, 64, 2, (256, 0), (256, 0), False, False, True, False),
}
"""By head_dim and head_dim_v."""
FP8_TILES = {
    (64, 64): Tile(128, 128, 2, (64, 0), (64, 0), shift=8.0),
    (96, 96): Tile(128, 128, 2, (64, 32), (64, 32), shift=8.0),
    (128, 128): Tile(128, 128, 2, (128, 0), (128, 0), shift=8.0),
    (192, 128): Tile(128, 128, 2, (128, 64), (128, 0), shift=8.0),
    (256, 256): Tile(128, 128, 2, (256, 0), (256, 0), False, False, True, slack=1.75, shift=7.0),
}
"""The same for e4m3. Weights are times 2^shift: most of what e4m3 holds lies below 1, and 2^8.75 is
about the most. A maximum that is outgrown by 2^slack at most needs room for it."""
LISTED_TILES = {(64, 64): Tile(128, 128, 2, (64, 0), (64, 0))}
"""Others for lists of blocks, of which usual ones have 128 queries and keys."""
MOST_TRANSPOSED = 1 << 31
"""The most bytes of values that a call transposes."""


# ---------------------------------------------------------------- the choice


def tile(problem: Problem, device: DeviceFacts) -> Tile | None:
    """The tile of the Hopper kernel for `problem`; None where it does not take it.

    Raises:
        UnsupportedError: the size of a batch-invariant call alone keeps it from the kernel.
    """
    reasons = refusals(problem, device)
    if problem.spec.batch_invariant and reasons == [too_much_transposed(problem)]:
        # Smaller calls run on this kernel; on the other one the same row would have other bits.
        less = "fewer sequences or a narrower page_table take less, TRITON_FA_HOPPER=0 takes none"
        raise UnsupportedError("triton", [f"batch_invariant: {reasons[0]}; {less}"])
    if reasons:
        _logger.debug("prefill runs on the portable kernel: %s", "; ".join(reasons))
        return None
    _logger.debug("prefill runs on the Hopper kernel")
    return tile_of(problem)


def tile_of(problem: Problem) -> Tile | None:
    """The tile for the dtype and head dims, which does not leave listed blocks; None if none is."""
    spec = problem.spec
    is_fp8 = spec.dtype == torch.float8_e4m3fn
    found = (FP8_TILES if is_fp8 else TILES).get((spec.head_dim, spec.head_dim_v))
    lists = lists_of(problem)
    if found is None or lists is None:
        return found
    assert lists.block_size is not None
    queries, keys = lists.block_size
    other = None if is_fp8 else LISTED_TILES.get((spec.head_dim, spec.head_dim_v))
    for each in (found, other):
        if each is not None and queries % each.block_m == 0 and keys % each.block_n == 0:
            return each
    return None


def lists_of(problem: Problem) -> BlockSparseTensors | None:
    """The lists of key blocks, but where keys are counted from a first one that is not 0."""
    return None if problem.tensors.cache_leftpad is not None else problem.tensors.blocks


def unavailable(device: DeviceFacts) -> str | None:
    """Why the Hopper kernel is not used on `device` at all, or None."""
    wanted = settings().hopper
    if wanted is False:
        return "TRITON_FA_HOPPER=0"
    if device.kind != "cuda" or device.arch != (9, 0) or INTERPRETED:
        return "it is for compute capability 9.0"
    if device.shared_memory < SHARED_MEMORY:
        return f"{device.shared_memory} bytes of shared memory"
    if not wanted and TRITON_VERSION.release[:2] not in RUN_ON:
        return f"not run on triton {TRITON_VERSION} yet (TRITON_FA_HOPPER=1 tries it)"
    found = kernel_module()
    return found if isinstance(found, str) else None


@functools.cache
def kernel_module() -> Any:
    """`hopper.py`, or the text of the error of importing it."""
    try:
        return importlib.import_module("triton_fa.kernels.hopper")
    except (ImportError, AttributeError) as error:  # other names in Gluon
        return f"{type(error).__name__}: {error}"


def refusals(problem: Problem, device: DeviceFacts) -> list[str]:
    """Every reason why the Hopper kernel does not take `problem`."""
    reason = unavailable(device)
    if reason:
        return [reason]
    spec, bounds = problem.spec, problem.bounds
    is_fp8 = spec.dtype == torch.float8_e4m3fn
    taken = FEATURES | DESCALES if is_fp8 else FEATURES
    reasons = [f"{name} is given" for name in sorted(spec.features - taken)]
    if spec.dtype not in ELEMENTS or spec.kv_dtype != spec.dtype:
        reasons.append(f"{spec.dtype} beside {spec.kv_dtype}")
    if is_fp8 and transposed_shape(problem)[0] > MOST_TRANSPOSED:
        reasons.append(too_much_transposed(problem))
    if tile_of(problem) is None:
        lists = lists_of(problem)
        listed = "" if lists is None else f" with lists of blocks of {lists.block_size}"
        reasons.append(f"head dims {spec.head_dim}, {spec.head_dim_v}{listed}")
    if spec.softmax_scale < 0:
        reasons.append("softmax_scale < 0")
    if spec.key_layout == "paged" and spec.page_size % 8:
        reasons.append(f"pages of {spec.page_size}: not a multiple of 8")
    if spec.key_layout == "paged" and "cache_leftpad" in spec.features:
        reasons.append("left padding inside of pages")
    if settings().hopper is None:
        if bounds.max_seqlen_q < SHORTEST and not spec.batch_invariant:
            reasons.append(f"at most {bounds.max_seqlen_q} query tokens")
        if 0 < seen_by_a_row(spec) < NARROWEST:
            reasons.append(f"rows see at most {seen_by_a_row(spec)} keys")
    for name in ("q", "k", "out") if is_fp8 else ("q", "k", "v", "out"):
        tensor = getattr(problem.tensors, name)
        if tensor is not None and not _describable(tensor, spec.batch_invariant):
            reasons.append(f"{name}: strides {tensor.stride()} or address")
    if not reasons and (spec.score_mod is not None or spec.mask_mod is not None):
        aux = problem.tensors.aux
        kinds = None if aux is None else tuple(tensor.dtype for tensor in aux)
        fault = fault_of(spec.score_mod, spec.mask_mod, kinds, is_fp8)
        reasons += [fault] if fault else []
    return reasons


@functools.cache
def fault_of(
    score_mod: Any, mask_mod: Any, aux: tuple[torch.dtype, ...] | None, is_fp8: bool
) -> str:
    """Why functions of the caller's cannot be part of the Hopper kernel; empty if they can.

    They are compiled alone, in the layout that scores have there: whatever says for itself how
    numbers are spread over threads may not go with that. `aux` are the dtypes of the tensors that
    they read. A reason is logged, once, as a warning.
    """
    kernel = kernel_module().functions_kernel
    values = {
        "scores_ptr": torch.empty(0),
        "aux_ptr": None if aux is None else tuple(torch.empty(0, dtype=d) for d in aux),
        "number": 0,
        "BLOCK_N": 128,
        "DEPTH": 32 if is_fp8 else 16,
        "SCORE_MOD": score_mod,
        "MASK_MOD": mask_mod,
    }
    try:
        made = cross_compiled(kernel, {}, values, {"num_warps": 4}, HOPPER)
    except Exception as error:  # noqa: BLE001  whatever the compiler raises is the reason
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        said = getattr(cause, "error_message", None) or str(cause)
        reason = f"{type(cause).__name__}: {said}".splitlines()[0]
    else:
        if not made.metadata.shared:
            return ""
        reason = "scores of several warps depend on each other"
    names = [f"{mod.__module__}.{mod.__name__}" for mod in (score_mod, mask_mod) if mod is not None]
    fault = f"{' and '.join(names)}: {reason}"
    _logger.warning("prefill does not run on the Hopper kernel, but on the portable one: %s", fault)
    return fault


def too_much_transposed(problem: Problem) -> str:
    """What is said of a call with more than MOST_TRANSPOSED."""
    size, _ = transposed_shape(problem)
    return f"transposed values take {size} bytes, of at most {MOST_TRANSPOSED}"


def seen_by_a_row(spec: AttnSpec) -> int:
    """The most keys that a window or an attention chunk leaves to a row; 0 for no such bound."""
    if spec.attention_chunk:
        return spec.attention_chunk
    if spec.window_left < 0 or spec.window_right < 0:
        return 0
    return spec.window_left + spec.window_right + 1


def _describable(tensor: torch.Tensor, all_strides: bool) -> bool:
    """Whether a tensor map can hold the strides and sizes of [..., tokens, heads, dim].

    With `all_strides` those count, too, by which nothing is stepped in this call: a batch of one.
    """
    strides = tensor.stride()
    sized = zip(strides[:-1], tensor.shape, strict=False)
    used = [s for s, size in sized if all_strides or size > 1]
    step = 16 // tensor.element_size()
    in_steps = all(s > 0 and s % step == 0 for s in (*used, strides[-3])) and strides[-1] == 1
    columns = (tensor.shape[-2] - 1) * strides[-2] + tensor.shape[-1]
    fits = columns < MOST and tensor.shape[-3] < WRAP and tensor.shape[0] < WRAP
    return bool(in_steps and fits and max(strides) < 1 << 34 and tensor.data_ptr() % 16 == 0)


# ---------------------------------------------------------------- the launch


def variant(problem: Problem, chosen: Tile, common: dict[str, Any], **planned: Any) -> Variant:
    """What the kernel is specialised on; `planned` is what depends on the grid and on lists."""
    spec = problem.spec
    page = spec.page_size
    limits = [common[name] is not None for name in ("window_left", "window_right")]
    is_chunked = common["attention_chunk"] is not None
    is_padded = problem.tensors.cache_leftpad is not None
    box = min(chosen.block_n, page & -page) if page else chosen.block_n
    is_fp8 = spec.dtype == torch.float8_e4m3fn
    return Variant(
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        CONSUMERS=chosen.consumers,
        FP8=is_fp8,
        BYTES=spec.dtype.itemsize,
        D0=chosen.dims[0],
        D1=chosen.dims[1],
        V0=chosen.dims_v[0],
        V1=chosen.dims_v[1],
        NAMED=chosen.named,
        PARTIAL=chosen.partial,
        LAZY=chosen.lazy,
        SLACK=chosen.slack,
        SHIFT=chosen.shift,
        OWN_OUT=chosen.own_out,
        REGISTERS=chosen.registers[0],
        PRODUCER_REGISTERS=chosen.registers[1],
        BOX=box,
        ALIGN=max(box if page else 1, 16 if is_fp8 else 1),
        PAGE_SIZE=page,
        DENSE=spec.query_layout == "dense",
        HEADS_Q=spec.num_heads_q,
        GROUP=spec.q_heads_per_kv,
        HAS_FIRST=limits[0] or is_chunked or is_padded,
        HAS_END=limits[1] or is_chunked,
        HAS_SOFTCAP=spec.softcap > 0,
        HAS_LSE=problem.return_lse,
        **planned,
    )


def launches(
    problem: Problem,
    device: DeviceFacts,
    chosen: Tile,
    common: dict[str, Any],
    lists: dict[str, int],
    *,
    entries: int,
    counter_offset: int,
    **planned: Any,
) -> tuple[list[tuple[Any, ...]], int, int]:
    """(kernel, grid, values, options) of each launch; the counters and bytes they need.

    Programs stay and take tiles, `entries` for each head, from a counter, which a launch before
    sets to 0 where there are more tiles than programs. The bytes are for transposed values.
    """
    tiles = entries * problem.spec.num_heads_q
    programs = min(tiles, max(1, device.num_sms - problem.spec.sm_margin))
    own = {name: planned.pop(name) for name in ("segment", "num_row_tiles")}
    own |= {"tiles": tiles, "counter_offset": counter_offset}
    sizes = {name: lists[name] for name in ("SPARSE_M", "SPARSE_N")}
    own |= {n: value if sizes["SPARSE_N"] else None for n, value in lists.items() if n not in sizes}
    own["C"] = c = variant(problem, chosen, common, **planned, **sizes)
    given = common
    if c.FP8:  # heads of transposed values lie that many rows apart
        given = common | {"v_stride_h": problem.spec.head_dim_v}
    module = kernel_module()
    tensors = (*TENSORS, "v_transposed_ptr" if c.FP8 else "v_ptr")
    kernel = Described(module.hopper_kernel, tensors, views(problem, c, given))
    values = {name: given[name] for name in names_of(kernel) if name in given} | own
    steps: list[tuple[Any, ...]] = [(kernel, (programs, 1, 1), values, {"num_warps": 4})]
    if tiles > programs:
        offset = {"counter_offset": counter_offset}
        steps.insert(0, (module.reset_kernel, (1, 1, 1), offset, {"num_warps": 1}))
    if not c.FP8:
        return steps, 1, 0
    size, row_stride = transposed_shape(problem)
    steps.insert(0, transposing(problem, device, common, row_stride, planned["DECODE_ROWS"]))
    return steps, 1, size


def transposed_shape(problem: Problem) -> tuple[int, int]:
    """(bytes of all, keys of a row) of transposed values, see `transpose.py`."""
    spec, bounds, tensors = problem.spec, problem.bounds, problem.tensors
    if spec.key_layout == "packed":
        keys, batch = -(-tensors.v.shape[0] // 16) + bounds.batch, 1
    else:
        # One block at least, which has an address.
        keys, batch = -(-max(1, bounds.max_seqlen_k) // 16), bounds.batch
    return batch * spec.num_heads_kv * spec.head_dim_v * keys * 16, keys * 16


def transposing(
    problem: Problem,
    device: DeviceFacts,
    common: dict[str, Any],
    row_stride: int,
    decode_rows: int,
) -> tuple[Any, ...]:
    """The launch that transposes the values; `common` has the strides of the given ones."""
    spec, bounds = problem.spec, problem.bounds
    most = -(-TRANSPOSING_PROGRAMS * device.num_sms // (spec.num_heads_kv * bounds.batch))
    tiles = max(1, min(most, -(-bounds.max_seqlen_k // TRANSPOSED_KEYS)))
    values = {name: common[name] for name in transpose_kernel.arg_names if name in common}
    values |= {
        "row_stride": row_stride,
        "tiles": tiles,
        "DECODE_ROWS": decode_rows,
        "BLOCK_N": TRANSPOSED_KEYS,
        "BLOCK_DV": triton.next_power_of_2(spec.head_dim_v),
    }
    grid = (tiles * spec.num_heads_kv * bounds.batch, 1, 1)
    return transpose_kernel, grid, values, {"num_warps": 4}


@dataclass(frozen=True)
class View:
    """A tensor descriptor but for its address; see `hopper.py` on its five dimensions."""

    tensor: int  # place among the tensors that are described
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    dtype: torch.dtype


def views(problem: Problem, c: Variant, common: dict[str, Any]) -> list[View | None]:
    """The kernel's descriptors in its order: out, q, k and v, of each the two panels."""
    spec, tensors = problem.spec, problem.tensors
    batch = tensors.q.shape[0] if spec.query_layout == "dense" else 1
    batch_k = 1 if spec.key_layout == "packed" else tensors.k.shape[0]
    rows = c.BLOCK_M // c.CONSUMERS

    def width(dim: int) -> int:
        # Boxes lie one after the other within columns of 128 bytes.
        return dim if c.BOX == c.BLOCK_N else min(dim, 128 // c.BYTES)

    made: list[View | None] = []
    for place, (name, batch_rows, heads, box, panels) in enumerate(
        (
            ("out", batch, spec.num_heads_q, rows, (c.V0, c.V1)),
            ("q", batch, spec.num_heads_q, rows, (c.D0, c.D1)),
            ("k", batch_k, spec.num_heads_kv, c.BOX, (width(c.D0), width(c.D1))),
            ("v", batch_k, spec.num_heads_kv, c.BOX, (width(c.V0), width(c.V1))),
        )
    ):
        dim = spec.head_dim if name in ("q", "k") else spec.head_dim_v
        per_batch, per_token, per_head = (common[f"{name}_stride_{axis}"] for axis in "bth")
        if name == "v" and c.FP8:
            made += transposed_views(problem, c)
            continue
        dtype = spec.out_dtype if name == "out" else spec.dtype
        shape = (MOST, MOST, batch_rows, WRAP, (heads - 1) * per_head + dim)
        per_batch = per_batch if batch_rows > 1 else per_token
        strides = ((1 << 34) - per_token, per_token, per_batch, per_token, 1)
        for columns in panels:
            block = (1, 1, 1, box, columns)
            made.append(View(place, shape, strides, block, dtype) if columns else None)
    return made


def transposed_views(problem: Problem, c: Variant) -> list[View | None]:
    """Those of transposed values, [batch, heads and dims, keys]; `end` counts blocks of 16 keys."""
    size, row_stride = transposed_shape(problem)
    batch = 1 if problem.spec.key_layout == "packed" else problem.bounds.batch
    rows = problem.spec.num_heads_kv * problem.spec.head_dim_v
    shape = (MOST, MOST, batch, rows, WRAP)
    strides = ((1 << 38) - 16, 16, size // batch, row_stride, 1)
    return [
        View(3, shape, strides, (1, 1, 1, dim, c.BLOCK_N), problem.spec.dtype) if dim else None
        for dim in (c.V0, c.V1)
    ]


class Described:
    """A Hopper kernel as `Launch` knows kernels: its arguments are tensors, or their addresses.

    `tensors` become tensor descriptors on the way, which the kernel takes first. Making them takes
    longer than launching, so those of an address are kept.
    """

    def __init__(
        self, kernel: Any, tensors: tuple[str, ...], descriptors: Sequence[View | None]
    ) -> None:
        self._module = kernel_module()
        self._kernel = kernel
        self._tensors = tensors
        self._views = tuple(descriptors)
        self.arg_names = [*self._tensors, *self._kernel.arg_names[len(self._views) :]]
        self.__name__ = self._kernel.__name__

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        """Launch through Triton's dispatcher."""

        def launch(*given: Any, **options: Any) -> None:
            self._kernel[grid](*self._described(given), **options)

        return launch

    def specialisation(self, given: Sequence[Any]) -> tuple[Hashable, ...]:
        """As `launch.specialisation`: sizes and strides that descriptors hold make no variant."""
        boxes = tuple(None if v is None else (v.dtype, v.block) for v in self._views)
        rest = given[len(self._tensors) :]
        return boxes, *specialisation(self._kernel, (*(None for _ in boxes), *rest))

    def warmup(self, *given: Any, grid: tuple[int, int, int], **options: Any) -> Any:
        """The compiled kernel."""
        return self._kernel.warmup(*self._described(given), grid=grid, **options)

    def described_parameters(
        self, types: Sequence[Any], given: Sequence[Any], metas: Sequence[Any]
    ) -> list[submit.Parameter] | None:
        """As `submit.parameters`, of this kernel's arguments for tensors of these views.

        Triton 3.6 passes a tensor map, sizes and strides in place of a descriptor.
        """
        passed: list[submit.Parameter] = []
        left = iter(metas)
        for view in self._views:
            if view is not None:
                map_of = functools.partial(_map_of, {}, view, next(left))
                passed.append(submit.TensorMap(self._tensors[view.tensor], map_of))
                passed += [struct.pack("<i", size) for size in view.shape]
                passed += [struct.pack("<q", stride) for stride in view.strides]
        rest = submit.parameters(types[len(self._views) :], given[len(self._tensors) :])
        return None if rest is None else passed + rest

    def cross_compile(
        self, values: dict[str, Any], options: dict[str, Any], target: GPUTarget
    ) -> Any:
        """Compile for `target`, without such a chip, as a launch with these arguments would."""
        views = dict(zip(self._kernel.arg_names, self._views, strict=False))
        described = {
            name: f"tensordesc<{ELEMENTS[v.dtype]}[{', '.join(map(str, v.block))}],{layout!r}>"
            for name, v in views.items()
            if v is not None
            for layout in (self._layout(v),)
        }
        return cross_compiled(self._kernel, described, values, options, target)

    def _described(self, given: Sequence[Any]) -> list[Any]:
        descriptor = importlib.import_module("triton.experimental.gluon.nvidia.hopper")
        made = [
            None
            if view is None
            else descriptor.TensorDescriptor(
                given[view.tensor].view(view.dtype),  # float8 numbers come as bytes
                list(view.shape),
                list(view.strides),
                list(view.block),
                self._layout(view),
            )
            for view in self._views
        ]
        return [*made, *given[len(self._tensors) :]]

    def _layout(self, view: View) -> Any:
        gl = self._module.gl
        name = str(view.dtype).removeprefix("torch.")
        element = getattr(gl, {"float8_e4m3fn": "float8e4nv"}.get(name, name))
        return gl.NVMMASharedLayout.get_default_for(list(view.block), element)


def cross_compiled(
    kernel: Any,
    described: dict[str, str],
    values: dict[str, Any],
    options: dict[str, Any],
    target: GPUTarget,
) -> Any:
    """A Gluon kernel, compiled for `target`; `described` are the types of its descriptors."""
    gluon = importlib.import_module("triton.experimental.gluon._runtime")
    signature: dict[str, Any] = dict(described)
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for param in kernel.params:
        value = values.get(param.name)
        if param.name in described:
            continue
        if value is None or param.is_constexpr:
            signature[param.name] = "constexpr"
            constants[param.name] = value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = mangle_type(value)
            attributes[(param.num,)] = [["tt.divisibility", 16]]
        elif isinstance(value, tuple):
            signature[param.name] = tuple(map(mangle_type, value))
            attributes |= {(param.num, i): [["tt.divisibility", 16]] for i in range(len(value))}
        else:
            signature[param.name] = "fp32" if isinstance(value, float) else "i32"
            if signature[param.name] == "i32" and not param.do_not_specialize:
                attributes[(param.num,)] = [["tt.divisibility", 16]] * (value % 16 == 0)
    signature = {name: signature[name] for name in kernel.arg_names}
    source = gluon.GluonASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options | {"enable_fp_fusion": True})


def _map_of(
    kept: dict[int, tuple[int, Any]], view: View, meta: Any, address: int
) -> tuple[int, Any]:
    """Where the tensor map of the tensor at `address` is, and the object that holds it."""
    found = kept.get(address)
    if found is None:
        if len(kept) >= KEPT_DESCRIPTORS:
            kept.clear()
        nvidia = importlib.import_module("triton.backends.nvidia.driver")
        base = SimpleNamespace(data_ptr=lambda: address)
        like = {"shape": view.shape, "strides": view.strides, "padding": "zero"}
        holder, *_ = nvidia.make_tensordesc_arg(SimpleNamespace(base=base, **like), meta)
        # The map is the last that Triton's object holds.
        where = id(holder) + type(holder).__basicsize__ - submit.MAP_BYTES
        assert where % submit.MAP_BYTES == 0, "not where Triton 3.6 has it"
        found = kept[address] = where, holder
    return found
