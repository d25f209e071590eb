"""Score and mask modifiers as CuTe functions: the same as in test_score_mod_fa4.py, for FA4.

Imports CuTe DSL, so only what needs FA4 may import this. FA4 gives `score`, `batch`, `head`,
`q_idx` and `kv_idx` as vectors of one or two elements; with aux tensors it is one.
"""

import cutlass
from cutlass import cute
from flash_attn.cute.utils import scalar_to_ssa

CAP = 2.0
SLOPE = 0.03125


@cute.jit
def alibi(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    position = q_idx + seqlen_info.seqlen_k - seqlen_info.seqlen_q
    apart = cute.where(position < kv_idx, kv_idx - position, position - kv_idx)
    slope = scalar_to_ssa(aux_tensors[0][head[0]], cutlass.Float32)
    return score - slope * apart.to(cutlass.Float32)


@cute.jit
def distance(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    position = q_idx + seqlen_info.seqlen_k - seqlen_info.seqlen_q
    apart = cute.where(position < kv_idx, kv_idx - position, position - kv_idx)
    return score - apart.to(cutlass.Float32) * SLOPE


@cute.jit
def capped(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    return CAP * cute.math.tanh(score / CAP)


@cute.jit
def key_bias(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    return score + scalar_to_ssa(aux_tensors[0][head[0], kv_idx[0]], cutlass.Float32)


@cute.jit
def causal(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    return kv_idx <= q_idx + seqlen_info.seqlen_k - seqlen_info.seqlen_q


@cute.jit
def documents(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    position = q_idx + seqlen_info.seqlen_k - seqlen_info.seqlen_q
    mine = scalar_to_ssa(aux_tensors[0][batch[0], position[0]], cutlass.Int32)
    return mine == scalar_to_ssa(aux_tensors[0][batch[0], kv_idx[0]], cutlass.Int32)
