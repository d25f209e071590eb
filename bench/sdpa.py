"""torch's scaled_dot_product_attention on cuDNN as a peer: sequences of one length, no extras."""

import warnings
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.inputs import Inputs
from bench.workloads import Workload
from triton_fa import UnsupportedError

LABEL = "sdpa"
BACKEND = SDPBackend.CUDNN_ATTENTION


def refusals(row: Workload) -> list[str]:
    """What scaled_dot_product_attention has no argument for, or cuDNN no kernel."""
    reasons = {
        "a paged cache": row.page_size is not None,
        "sequences of several lengths": len({*row.q_lens, *row.k_lens}) > 1,
        "windows": row.window != (-1, -1),
        "softcap": row.softcap > 0,
        "sinks": row.sinks,
        "returning the lse": row.return_lse,
    }
    return [reason for reason, applies in reasons.items() if applies]


def batched(x: torch.Tensor, batch: int) -> torch.Tensor:
    """[batch, heads, tokens, dim] of packed or of dense tensors, without a copy."""
    return x.reshape(batch, -1, *x.shape[-2:]).transpose(1, 2)


def cudnn_refusals(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> list[str]:
    """Why cuDNN does not take these tensors: torch warns of each reason when asked to explain."""
    parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, causal, True)
    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter("always")
        if torch.backends.cuda.can_use_cudnn_attention(parameters, debug=True):
            return []
    return [str(reason.message) for reason in reasons] or ["cuDNN attention is not available"]


def bind_attention(inputs: Inputs) -> Callable[[Inputs], torch.Tensor]:
    """The call of a workload like `inputs`.

    Raises:
        UnsupportedError: the row asks for what this peer does not do.
    """
    row = inputs.row
    reasons = refusals(row)
    if not reasons and BACKEND == SDPBackend.CUDNN_ATTENTION:
        q, k, v = (batched(x, row.batch) for x in (inputs.q, inputs.k, inputs.v))
        reasons = cudnn_refusals(q, k, v, row.causal)
    if reasons:
        raise UnsupportedError(LABEL, reasons)

    def call(x: Inputs) -> torch.Tensor:
        q, k, v = (batched(t, row.batch) for t in (x.q, x.k, x.v))
        with sdpa_kernel(BACKEND):
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=row.causal, enable_gqa=True
            )
        return out.transpose(1, 2)

    return call
