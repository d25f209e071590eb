"""score_mod and mask_mod beside FlashAttention-4: one function in three languages.

Each stands here as a Triton function and as PyTorch on matrices of scores, and in cute_mods.py as
a CuTe function. Ours is compared with float64 on any device, FA4 with the same on a GPU.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import triton_fa
from parity_tests.budgets import KVCACHE_ATOL, LSE_ATOL, MAX_MULT, MAX_MULT_SOFTCAP, MEAN_MULT
from parity_tests.device import Device
from triton_fa.backends import fa4

Tensor = torch.Tensor
# Values of an aux tensor for each sequence or head: more than keys, since rows and keys behind the
# end of a sequence, up to a tile of them, ask for theirs, too.
WIDTH = tl.constexpr(1024)
HEADS, HEADS_KV, DIM, PAGE = 8, 2, 128, 128
PAGED = ("alibi", "documents")  # tried over pages, too


@triton.jit
def alibi(score, batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    apart = tl.abs(q_idx + seqlen_k - seqlen_q - kv_idx)
    return score - tl.load(aux[0] + head) * apart


@triton.jit
def distance(score, batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    return score - 0.03125 * tl.abs(q_idx + seqlen_k - seqlen_q - kv_idx)


@triton.jit
def capped(score, batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    """2 tanh(score / 2)"""
    return 2.0 * (1.0 - 2.0 / (1.0 + tl.exp(score)))


@triton.jit
def key_bias(score, batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    return score + tl.load(aux[0] + head * WIDTH + kv_idx)


@triton.jit
def causal(batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    return kv_idx <= q_idx + seqlen_k - seqlen_q


@triton.jit
def documents(batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):
    numbers = aux[0] + batch * WIDTH
    return tl.load(numbers + q_idx + seqlen_k - seqlen_q) == tl.load(numbers + kv_idx)


@dataclass(frozen=True)
class Modifier:
    """`plain` maps (scores [heads, q, k], batch, head, position, key, aux) to scores or bools."""

    name: str
    jitted: Any
    plain: Callable[..., Tensor]
    is_mask: bool = False
    causal: bool = False
    aux: Callable[[], Tensor] | None = None
    max_mult: float = MAX_MULT

    def options(self, function: Any, device: str) -> dict[str, Any]:
        """Arguments of a call with `function`, a Triton or a CuTe one."""
        found: dict[str, Any] = {"mask_mod" if self.is_mask else "score_mod": function}
        if self.causal:
            found["causal"] = True
        if self.aux:
            found["aux_tensors"] = [self.aux().to(device)]
        return found


def slopes() -> Tensor:
    return 2.0 ** -torch.arange(1, HEADS + 1)


def biases() -> Tensor:
    return torch.randn(HEADS, WIDTH.value, generator=torch.Generator().manual_seed(1))


def numbers() -> Tensor:
    """Three sequences, whose documents have 5, 11 and 50 tokens."""
    return torch.stack([torch.arange(WIDTH.value) // n for n in (5, 11, 50)]).int()


MODIFIERS = [
    Modifier("alibi", alibi, lambda s, b, h, p, k, x: s - x[h] * (p - k).abs(), aux=slopes),
    Modifier(
        "causal alibi",
        alibi,
        lambda s, b, h, p, k, x: s - x[h] * (p - k).abs(),
        aux=slopes,
        causal=True,
    ),
    Modifier("distance", distance, lambda s, b, h, p, k, x: s - 0.03125 * (p - k).abs()),
    Modifier(
        "capped",
        capped,
        lambda s, b, h, p, k, x: 2 * (s / 2).tanh(),
        causal=True,
        max_mult=MAX_MULT_SOFTCAP,
    ),
    Modifier("key bias", key_bias, lambda s, b, h, p, k, x: s + x[h, k], aux=biases),
    Modifier("causal", causal, lambda s, b, h, p, k, x: k <= p, is_mask=True),
    Modifier(
        "documents", documents, lambda s, b, h, p, k, x: x[b, p] == x[b, k], True, aux=numbers
    ),
]
EACH = pytest.mark.parametrize("modifier", MODIFIERS, ids=lambda modifier: modifier.name)
CASES = pytest.mark.parametrize(
    ("modifier", "paged"),
    [(x, paged) for x in MODIFIERS for paged in (False, True) if not paged or x.name in PAGED],
    ids=lambda value: getattr(value, "name", ("packed", "paged")[bool(value)]),
)


class Batch:
    """Three sequences: a prompt behind cached keys, a prompt alone, and a decoding step."""

    def __init__(self, device: Device, paged: bool) -> None:
        self.device, self.paged = device.name, paged
        small = device.interpreted
        self.q_lens, self.k_lens = (
            ((20, 19, 1), (35, 19, 16)) if small else ((300, 129, 1), (577, 129, 64))
        )
        # The interpreter cuts bfloat16 off, where a GPU rounds.
        self.dtype = torch.float16 if small else torch.bfloat16
        rng = torch.Generator().manual_seed(0)
        shapes = ((self.q_lens, HEADS), (self.k_lens, HEADS_KV), (self.k_lens, HEADS_KV))
        self.q, self.k, self.v = (
            torch.randn(sum(lens), heads, DIM, generator=rng).to(self.device, self.dtype)
            for lens, heads in shapes
        )

    def arguments(self) -> dict[str, Any]:
        """Of FA4's varlen function and of ours alike."""
        q_lens, k_lens = (torch.tensor(x, dtype=torch.int32) for x in (self.q_lens, self.k_lens))
        shared = {
            "q": self.q,
            "cu_seqlens_q": torch.nn.functional.pad(q_lens.cumsum(0), (1, 0)).int().to(self.device),
            "max_seqlen_q": max(self.q_lens),
            "max_seqlen_k": max(self.k_lens),
        }
        if not self.paged:
            prefix = torch.nn.functional.pad(k_lens.cumsum(0), (1, 0)).int().to(self.device)
            return shared | {"k": self.k, "v": self.v, "cu_seqlens_k": prefix}
        width = -(-max(self.k_lens) // PAGE)
        order = torch.randperm(width * len(k_lens), generator=torch.Generator().manual_seed(2))
        table = order.view(len(k_lens), width).int()
        pools = []
        for x in (self.k, self.v):
            pool = torch.zeros(order.numel(), PAGE, HEADS_KV, DIM, dtype=x.dtype, device=x.device)
            for row, part in zip(table, x.split(self.k_lens), strict=True):
                pages = part.new_zeros(width * PAGE, HEADS_KV, DIM)
                pages[: len(part)] = part
                pool[row.long().to(x.device)] = pages.unflatten(0, (width, PAGE))
            pools.append(pool)
        return shared | {
            "k": pools[0],
            "v": pools[1],
            "cu_seqlens_k": None,
            "seqused_k": k_lens.to(self.device),
            "page_table": table.to(self.device),
        }

    def attend(self, modifier: Modifier, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """out [total_q, heads, dim] and lse [heads, total_q]: exact in float64."""
        aux = modifier.aux().to(self.device) if modifier.aux else None
        outs, lses = [], []
        cut = zip(
            self.q.split(self.q_lens),
            self.k.split(self.k_lens),
            self.v.split(self.k_lens),
            strict=True,
        )
        for batch, (q, k, v) in enumerate(cut):
            k, v = (x.to(dtype).repeat_interleave(HEADS // HEADS_KV, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q.to(dtype), k * DIM**-0.5)
            key = torch.arange(len(k), device=q.device)
            position = (torch.arange(len(q), device=q.device) + len(k) - len(q))[:, None]
            head = torch.arange(HEADS, device=q.device)[:, None, None]
            found = modifier.plain(scores, batch, head, position, key, aux)
            if modifier.is_mask:
                scores = scores.masked_fill(~found, -math.inf)
            else:
                scores = found
            if modifier.causal:
                scores = scores.masked_fill(key > position, -math.inf)
            outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1).to(dtype), v).double())
            lses.append(scores.logsumexp(-1).double())
        return torch.cat(outs), torch.cat(lses, 1)

    def ours(self, modifier: Modifier) -> tuple[Tensor, Tensor]:
        with triton_fa.strict():
            return triton_fa.flash_attn_varlen_func(
                **self.arguments(),
                **modifier.options(modifier.jitted, self.device),
                return_softmax_lse=True,
                ver="triton",
            )


def judge(batch: Batch, modifier: Modifier, results: dict[str, tuple[Tensor, Tensor]]) -> None:
    """FlashAttention's rule: within a multiple of what PyTorch is off in the same dtype."""
    exact, exact_lse = batch.attend(modifier, torch.float64)
    apart = (batch.attend(modifier, batch.dtype)[0] - exact).abs()
    for name, (out, lse) in results.items():
        off = (out.double() - exact).abs()
        assert off.max() <= modifier.max_mult * apart.max() + KVCACHE_ATOL, name
        assert off.mean() <= MEAN_MULT * apart.mean() + KVCACHE_ATOL, name
        torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=LSE_ATOL, msg=name)


@CASES
def test_ours_is_the_function_in_float64(modifier: Modifier, paged: bool, device: Device) -> None:
    batch = Batch(device, paged)
    judge(batch, modifier, {"triton": batch.ours(modifier)})


@EACH
def test_the_function_matters(modifier: Modifier, device: Device) -> None:
    """Leaving it away would be seen: the exact results differ by far more than the budget."""
    batch = Batch(device, paged=False)
    nothing = Modifier("", None, lambda s, *_: s, causal=modifier.causal)
    exact, plain = (batch.attend(each, torch.float64)[0] for each in (modifier, nothing))
    baseline = batch.attend(modifier, batch.dtype)[0]
    assert (plain - exact).abs().max() > 5 * modifier.max_mult * (baseline - exact).abs().max()


@pytest.mark.gpu
@CASES
def test_fa4_and_ours_match(modifier: Modifier, paged: bool, device: Device) -> None:
    """FA4 called by its own function; ver=4 hands it the same, bit for bit."""
    functions = fa4.load()
    if isinstance(functions, str):
        pytest.skip(f"FA4 is not here: {functions}")
    cute_mods = importlib.import_module("parity_tests.cute_mods")
    batch = Batch(device, paged)
    cute = getattr(cute_mods, modifier.jitted.__name__)
    given = batch.arguments() | modifier.options(cute, batch.device)
    theirs = functions.varlen(**given, return_lse=True)
    judge(batch, modifier, {"FA4": theirs, "triton": batch.ours(modifier)})
    with triton_fa.strict():
        through = triton_fa.flash_attn_varlen_func(**given, return_softmax_lse=True, ver=4)
    assert all(map(torch.equal, through, theirs))
