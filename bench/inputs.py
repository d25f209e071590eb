"""A workload's tensors: deterministic from its seed, the same values on every backend."""

from dataclasses import dataclass, replace

import torch

from bench.workloads import Workload


@dataclass(frozen=True, slots=True)
class Inputs:
    """Tensors of one workload, named as the public functions name them."""

    row: Workload
    q: torch.Tensor  # [total_q, heads, dim], or [batch, seqlen_q, heads, dim] when dense
    k: torch.Tensor  # [pages, page_size, heads_kv, dim], packed [total_k, ...] or dense
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor | None  # [batch + 1]
    cu_seqlens_k: torch.Tensor | None  # [batch + 1], packed keys only
    seqused_k: torch.Tensor  # [batch]
    page_table: torch.Tensor | None  # [batch, pages per sequence]
    sinks: torch.Tensor | None  # [heads]

    def other_cache(self) -> "Inputs":
        """The same call over a copy of K and V elsewhere in memory."""
        return replace(self, k=self.k.clone(), v=self.v.clone())


def prefix_sums(lens: tuple[int, ...], device: torch.device) -> torch.Tensor:
    sums = torch.tensor([0, *lens], dtype=torch.int64).cumsum(0)
    return sums.to(device=device, dtype=torch.int32)


def page_table(row: Workload, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """Pages of each sequence in shuffled order, and how many there are; unused entries are 0."""
    assert row.page_size is not None
    needed = torch.tensor([-(-k // row.page_size) for k in row.k_lens])
    total = int(needed.sum())
    order = torch.randperm(total, generator=generator).to(torch.int32)
    table = torch.zeros(row.batch, int(needed.max()), dtype=torch.int32)
    table[torch.arange(table.shape[1]) < needed[:, None]] = order
    return table, total


def make_inputs(row: Workload, device: torch.device) -> Inputs:
    """Standard normal q, k, v and sinks. Page numbers come from the CPU, values from the device."""
    dtype = getattr(torch, row.dtype)
    on_cpu = torch.Generator().manual_seed(row.seed)
    on_device = torch.Generator(device=device).manual_seed(row.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=on_device, device=device, dtype=dtype)

    table: torch.Tensor | None = None
    leading: tuple[int, ...] = (sum(row.k_lens),)
    if row.page_size:
        on_host, pages = page_table(row, on_cpu)
        table, leading = on_host.to(device), (pages, row.page_size)
    elif row.dense:
        leading = (row.batch, row.k_lens[0])
    if row.phase == "metadata":  # lengths are all that counts
        leading = (1, *leading[1:])
    rows_q = (row.batch, row.q_lens[0]) if row.dense else (sum(row.q_lens),)
    return Inputs(
        row=row,
        q=normal(*rows_q, row.heads.q, row.heads.dim),
        k=normal(*leading, row.heads.kv, row.heads.dim),
        v=normal(*leading, row.heads.kv, row.head_dim_v),
        cu_seqlens_q=None if row.dense else prefix_sums(row.q_lens, device),
        cu_seqlens_k=prefix_sums(row.k_lens, device) if row.layout == "packed" else None,
        seqused_k=torch.tensor(row.k_lens, dtype=torch.int32, device=device),
        page_table=table,
        sinks=normal(row.heads.q) if row.sinks else None,
    )
