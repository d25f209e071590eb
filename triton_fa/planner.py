"""The scheduler metadata of a serving step, for engines: computed once, read by every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from triton_fa.api import get_scheduler_metadata
from triton_fa.errors import ArgumentValueError
from triton_fa.spec import metadata_entries


class StepSchedules(NamedTuple):
    """What the layers of one step pass as `scheduler_metadata`."""

    full: torch.Tensor
    sliding: torch.Tensor | None  # of layers with the planner's window or chunk; None without one


class StepPlanner:
    """Owns the metadata buffers of a model's full-attention and sliding-window layers.

    The two kinds have schedules of their own. Call `plan` outside of any graph: on the eager path
    before the step, before capture, and before each replay. It refills the same memory, so a
    graph captured with the tensors that one call returned reads what the next call wrote. A step
    must have finished before the next one is planned on another stream.
    """

    def __init__(
        self,
        max_batch: int,
        num_heads_q: int,
        num_heads_kv: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        page_size: int | None = None,
        window_size: tuple[int, int] | None = None,
        attention_chunk: int = 0,
        has_softcap: bool = False,
        num_splits: int = 0,
        sm_margin: int = 0,
        batch_invariant: bool = False,
        ver: int | str | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        """Allocate the buffers.

        Args:
            max_batch: Largest batch that will be planned.
            num_heads_q: Query heads.
            num_heads_kv: Key heads.
            head_dim: Head size of queries and keys.
            head_dim_v: Head size of values; None: as head_dim.
            dtype: Of queries, keys and values.
            page_size: Tokens of a page; None: not paged.
            window_size: (left, right) of the sliding-window layers; None if there are none.
            attention_chunk: Of the same layers, or of the chunked ones of a model without windows.
            has_softcap: Whether the attention calls have a softcap.
            num_splits: As of the attention calls.
            sm_margin: As of the attention calls.
            batch_invariant: As of the attention calls.
            ver: As of the attention calls.
            device: Where the lengths live.
        """
        self.max_batch = max_batch
        self._model = {
            "num_heads_q": num_heads_q,
            "num_heads_kv": num_heads_kv,
            "headdim": head_dim,
            "headdim_v": head_dim_v,
            "qkv_dtype": dtype,
            "page_size": page_size,
            "causal": True,
            "has_softcap": has_softcap,
            "num_splits": num_splits,
            "sm_margin": sm_margin,
            "batch_invariant": batch_invariant,
            "ver": ver,
        }
        has_local = window_size is not None or attention_chunk > 0
        self._local = {"window_size": window_size or (-1, -1), "attention_chunk": attention_chunk}
        entries = metadata_entries(max_batch)
        self._full = torch.zeros(entries, dtype=torch.int32, device=device)
        self._sliding = torch.zeros_like(self._full) if has_local else None

    def plan(
        self,
        cache_seqlens: torch.Tensor,
        *,
        max_seqlen_k: int,
        max_seqlen_q: int = 1,
        cu_seqlens_q: torch.Tensor | None = None,
        cache_leftpad: torch.Tensor | None = None,
        cu_seqlens_k_new: torch.Tensor | None = None,
        max_seqlen_k_new: int = 0,
    ) -> StepSchedules:
        """Refill the buffers from the lengths on the device; no host synchronisation.

        Args:
            cache_seqlens: (batch,) int32 key lengths.
            max_seqlen_k: Upper bound of key lengths; with pages, table width x page size.
            max_seqlen_q: Upper bound of query lengths.
            cu_seqlens_q: (batch + 1,) int32 prefix sums of query lengths; None: all are
                max_seqlen_q.
            cache_leftpad: (batch,) int32 first keys in use.
            cu_seqlens_k_new: (batch + 1,) int32 prefix sums of appended lengths; None: all are
                max_seqlen_k_new.
            max_seqlen_k_new: Upper bound of appended lengths.

        Returns:
            The same memory for every call with this batch.

        Raises:
            ArgumentValueError: the batch is larger than max_batch.
        """
        batch = cache_seqlens.shape[0]
        if batch > self.max_batch:
            raise ArgumentValueError(
                f"cache_seqlens: expected at most {self.max_batch} lengths, got {batch}"
            )

        def fill(buffer: torch.Tensor, mask: Mapping[str, object]) -> torch.Tensor:
            return get_scheduler_metadata(
                batch,
                max_seqlen_q,
                max_seqlen_k,
                cache_seqlens=cache_seqlens,
                cu_seqlens_q=cu_seqlens_q,
                cache_leftpad=cache_leftpad,
                cu_seqlens_k_new=cu_seqlens_k_new,
                max_seqlen_k_new=max_seqlen_k_new,
                out=buffer[: metadata_entries(batch)],
                **self._model,  # type: ignore[arg-type]  # a dict of mixed values
                **mask,  # type: ignore[arg-type]  # the same
            )

        full = fill(self._full, {})
        if self._sliding is None:
            return StepSchedules(full, None)
        return StepSchedules(full, fill(self._sliding, self._local))
