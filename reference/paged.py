"""Keys of one sequence out of a cache cut into pages, by plain indexing."""

import torch

from reference.attention import Tensor


def gather_pages(cache: Tensor, page_row: Tensor, seqlen_k: int) -> Tensor:
    """The first `seqlen_k` tokens of a sequence.

    cache is (pages, page_size, heads_kv, head_dim); page_row lists the pages of this sequence in
    order. Token j lives on page page_row[j // page_size] in slot j % page_size. Entries of
    page_row that no token needs are never looked at.
    """
    token = torch.arange(seqlen_k, device=cache.device)
    page_size = cache.shape[1]
    pages = page_row.to(cache.device, torch.int64)[token // page_size]
    return cache[pages, token % page_size]
