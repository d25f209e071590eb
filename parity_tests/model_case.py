"""q, k and v from the forward pass of a real model class: a small Llama with random weights."""

import functools
import importlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from parity_tests.cases import Case

Tensor = torch.Tensor


class CannotRunError(Exception):
    """A case cannot be made here, for a reason that is no fault of any backend."""


def llama_qkv(case: "Case", device: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Per sequence, what the last attention layer of a LlamaModel hands to attention.

    Hooks on the projections give q, k and v; the rotary embedding that the model computed is
    applied with the model's own function. The values are cast to the case's dtype at the end.
    """
    try:
        transformers = importlib.import_module("transformers")
        llama = importlib.import_module("transformers.models.llama.modeling_llama")
    except ImportError as error:
        raise CannotRunError(f"could not run: transformers missing ({error})") from error

    width = case.heads_q * case.head_dim
    vocabulary = 512
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=case.heads_q,
        num_key_value_heads=case.heads_kv,
        head_dim=case.head_dim,
        attn_implementation="eager",
    )
    seen: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        model = transformers.LlamaModel(config).to(device).eval()
        tokens = [torch.randint(0, vocabulary, (n,)) for n in case.seqlens_q]
    attention = model.layers[-1].self_attn
    handles = [
        getattr(attention, name).register_forward_hook(functools.partial(_keep, seen, name))
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    handles.append(model.rotary_emb.register_forward_hook(functools.partial(_keep, seen, "rotary")))

    dtype = getattr(torch, case.dtype)
    q: list[Tensor] = []
    k: list[Tensor] = []
    v: list[Tensor] = []
    for ids in tokens:
        if len(ids) == 0:
            raise CannotRunError("could not run: a model has no forward pass of zero tokens")
        with torch.no_grad():
            model(input_ids=ids[None].to(device), use_cache=False)
        heads = {
            name: seen[name].unflatten(-1, (-1, case.head_dim)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        }  # (1, heads, tokens, head_dim)
        rotated = llama.apply_rotary_pos_emb(heads["q_proj"], heads["k_proj"], *seen["rotary"])
        for into, value in zip((q, k, v), (*rotated, heads["v_proj"]), strict=True):
            into.append(value[0].transpose(0, 1).to(dtype))
    for handle in handles:
        handle.remove()
    return q, k, v


def _keep(seen: dict[str, Any], name: str, _module: Any, _inputs: Any, output: Any) -> None:
    seen[name] = output
