"""A key/value cache, paged or dense, by plain indexing."""

from typing import NamedTuple

import torch

from reference.attention import Tensor
from reference.float8 import bits


class Cache(NamedTuple):
    """Keys and values of many sequences; rows[b] is where sequence b is.

    Dense k and v are (rows, seqlen, heads_kv, dim): token j of a sequence is at [row, j]. Paged
    ones are (pages, page_size, heads_kv, dim), and the row of page_table lists the pages of the
    sequence in order: token j is at [page_table[row, j // page_size], j % page_size]. Entries that
    no token needs are never looked at.
    """

    k: Tensor
    v: Tensor
    page_table: Tensor | None
    rows: list[int]

    @property
    def capacity(self) -> int:
        """Tokens that one sequence has room for."""
        size = self.k.shape[1]
        return size if self.page_table is None else self.page_table.shape[1] * size

    def slots(self, b: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """The pair of indices of tokens [first, end) of a sequence."""
        token = torch.arange(first, max(first, end), device=self.k.device)
        if self.page_table is None:
            return torch.full_like(token, self.rows[b]), token
        size = self.k.shape[1]
        page_row = self.page_table[self.rows[b]].to(token.device, torch.int64)
        return page_row[token // size], token % size

    def read(self, b: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [first, end) of a sequence, (tokens, heads_kv, dim)."""
        where = self.slots(b, first, end)
        k, v = bits(self.k)[where], bits(self.v)[where]
        return k.view(self.k.dtype), v.view(self.v.dtype)

    def append(self, b: int, at: int, k: Tensor, v: Tensor) -> int:
        """Write tokens behind the first `at` ones, as many as there is room for; how many are."""
        end = min(at + len(k), self.capacity)
        where = self.slots(b, at, end)
        bits(self.k)[where], bits(self.v)[where] = bits(k)[: end - at], bits(v)[: end - at]
        return end
