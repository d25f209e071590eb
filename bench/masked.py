"""Our own kernel with causality given as a `mask_mod` and its block lists, beside the built-in."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl  # noqa: F401  # the interpreter looks for it

import triton_fa
from bench.inputs import Inputs
from bench.workloads import Workload

LABEL = "triton-mask"
BLOCK = 128  # queries and keys of a listed block


@triton.jit
def causal(batch, head, q_idx, kv_idx, seqlen_q, seqlen_k, aux):  # type: ignore[no-untyped-def]
    return kv_idx <= q_idx + seqlen_k - seqlen_q


def causal_blocks(row: Workload, device: torch.device) -> triton_fa.BlockSparseTensors:
    """The lists of blocks that a causal mask cuts and of those before it."""
    q_lens, k_lens = torch.tensor([row.q_lens, row.k_lens], device=device)
    begin = torch.arange(-(-max(row.k_lens) // BLOCK), device=device) * BLOCK
    queries = torch.arange(-(-max(row.q_lens) // BLOCK), device=device) * BLOCK
    # Position of the first query of each block, [batch, query blocks, 1].
    first = queries[None, :, None] + (k_lens - q_lens)[:, None, None]
    full = begin + BLOCK - 1 <= first
    cut = (begin <= first + BLOCK - 1) & ~full
    return triton_fa.BlockSparseTensors(*listed(cut), *listed(full), block_size=(BLOCK, BLOCK))


def listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and ascending entries of a mask [batch, query blocks, key blocks], for all heads."""
    entries = torch.argsort(blocks.byte(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], entries.int()[:, None]


def bind_attention(inputs: Inputs) -> Callable[[Inputs], torch.Tensor]:
    """The call for prefills that are causal and nothing else, over packed keys.

    Raises:
        triton_fa.UnsupportedError: another kind of row.
    """
    row = inputs.row
    if row.layout != "packed" or not row.causal or row.window != (-1, -1):
        raise triton_fa.UnsupportedError("triton", [f"{LABEL}: only causal rows over packed keys"])
    lists = causal_blocks(row, inputs.q.device)

    def call(x: Inputs) -> torch.Tensor:
        result = triton_fa.flash_attn_varlen_func(
            x.q,
            x.k,
            x.v,
            x.cu_seqlens_q,
            x.cu_seqlens_k,
            max_seqlen_q=row.bound_q,
            max_seqlen_k=max(row.k_lens),
            mask_mod=causal,
            block_sparse_tensors=lists,
            softcap=row.softcap,
            sinks=x.sinks,
            ver="triton",
        )
        assert isinstance(result, torch.Tensor)
        return result

    return call
