"""A workload's tensors: deterministic from its seed, the same values on every backend."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from bench.workloads import Workload

ROTARY_BASE = 10000.0


@dataclass(frozen=True, slots=True)
class Inputs:
    """Tensors of one workload, named as the public functions name them."""

    row: Workload
    q: torch.Tensor  # [total_q, heads, dim], or [batch, seqlen_q, heads, dim] when dense
    k: torch.Tensor  # [pages, page_size, heads_kv, dim], packed [total_k, ...] or dense
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor | None  # [batch + 1]
    cu_seqlens_k: torch.Tensor | None  # [batch + 1], packed keys only
    seqused_k: torch.Tensor  # [batch], without keys that the call appends
    page_table: torch.Tensor | None  # [batch, pages per sequence]
    sinks: torch.Tensor | None  # [heads]
    # What few rows have: k and v to append, qv, rotary_cos, q_descale, ..., or out_partial.
    options: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def other_cache(self) -> "Inputs":
        """The same call over a copy of K and V elsewhere in memory."""
        if self.row.latent:
            k, v = latent_views(torch.cat([self.v, self.k], dim=-1), self.row)
            return replace(self, k=k, v=v)
        return replace(self, k=self.k.clone(), v=self.v.clone())

    def forget_new(self) -> None:
        """Make the slots of new keys NaN: who does not append reads nothing that passes."""
        if self.row.new:
            pages, slots = new_slots(self)
            self.k[pages, slots] = math.nan
            self.v[pages, slots] = math.nan


def new_slots(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages and slots in them, [batch, new], that the call writes its new keys to."""
    table, size = inputs.page_table, inputs.row.page_size
    assert table is not None
    assert size is not None
    tokens = inputs.seqused_k[:, None] + torch.arange(inputs.row.new, device=table.device)
    return table.gather(1, (tokens // size).long()), tokens % size


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
    on_cpu = torch.Generator().manual_seed(row.seed)
    on_device = torch.Generator(device=device).manual_seed(row.seed)
    dtype, key_dtype = getattr(torch, row.dtype), getattr(torch, row.key_dtype)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        drawn = torch.bfloat16 if dtype.itemsize == 1 else dtype
        values = torch.randn(shape, generator=on_device, device=device, dtype=drawn)
        return values.to(dtype)

    def factors() -> torch.Tensor:
        shape = (row.batch, row.heads.kv)
        return 0.5 + torch.rand(shape, generator=on_device, device=device)

    table: torch.Tensor | None = None
    leading: tuple[int, ...] = (sum(row.k_lens),)
    if row.page_size:
        on_host, pages = page_table(row, on_cpu)
        table, leading = on_host.to(device), (pages, row.page_size)
    elif row.dense:
        leading = (row.batch, row.k_lens[0])
    if row.phase == "metadata":  # lengths are all that counts
        leading = (1, *leading[1:])
    rows_q: tuple[int, ...] = (sum(row.q_lens),)
    if row.dense:
        rows_q = (row.batch, row.q_lens[0])
    if row.phase == "combine":  # there are partial results only
        rows_q = leading = (0,)
    dim, dim_v = row.heads.dim, row.head_dim_v
    q = normal(*rows_q, row.heads.q, dim)
    if row.latent:
        k, v = latent_views(normal(*leading, row.heads.kv, dim_v + dim, dtype=key_dtype), row)
    else:
        k = normal(*leading, row.heads.kv, dim, dtype=key_dtype)
        v = normal(*leading, row.heads.kv, dim_v, dtype=key_dtype)
    sinks = normal(row.heads.q) if row.sinks else None
    options: dict[str, torch.Tensor] = {}
    if row.new:
        options["k"] = normal(row.batch, row.new, row.heads.kv, dim, dtype=key_dtype)
        options["v"] = normal(row.batch, row.new, row.heads.kv, dim_v, dtype=key_dtype)
    if row.rotary:
        options |= rotary_tables(row, device)
    if row.latent:
        options["qv"] = normal(*rows_q, row.heads.q, dim_v)
    if key_dtype.itemsize == 1:
        names = ("k_descale", "v_descale") + (("q_descale",) if dtype.itemsize == 1 else ())
        options |= {name: factors() for name in names}
    if row.splits:
        options |= partial_results(row, normal)
    inputs = Inputs(
        row=row,
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=None if row.dense else prefix_sums(row.q_lens, device),
        cu_seqlens_k=prefix_sums(row.k_lens, device) if row.layout == "packed" else None,
        seqused_k=torch.tensor([n - row.new for n in row.k_lens], dtype=torch.int32, device=device),
        page_table=table,
        sinks=sinks,
        options=options,
    )
    inputs.forget_new()
    return inputs


def latent_views(cache: torch.Tensor, row: Workload) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a cache that holds the latent dims first, as engines keep it."""
    return cache[..., row.head_dim_v :], cache[..., : row.head_dim_v]


def rotary_tables(row: Workload, device: torch.device) -> dict[str, torch.Tensor]:
    """cos and sin for all dims of a head and all positions that the pages hold."""
    assert row.page_size is not None
    positions = -(-max(row.k_lens) // row.page_size) * row.page_size
    steps = torch.arange(0, row.heads.dim, 2, device=device, dtype=torch.float64) / row.heads.dim
    angles = torch.arange(positions, device=device)[:, None] * ROTARY_BASE**-steps
    dtype = getattr(torch, row.dtype)
    return {"rotary_cos": angles.cos().to(dtype), "rotary_sin": angles.sin().to(dtype)}


def partial_results(row: Workload, normal: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    """[splits, batch, tokens, heads, dim] and their lse, tokens last in memory as FA3 wants it."""
    rows = (row.splits, row.batch, row.q_lens[0])
    lse = normal(*rows[:2], row.heads.q, rows[2], dtype=torch.float32).transpose(-1, -2)
    out = normal(*rows, row.heads.q, row.head_dim_v, dtype=torch.float32)
    return {"out_partial": out, "lse_partial": lse}
