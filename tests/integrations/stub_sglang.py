"""The parts of SGLang 0.5.23 that its attention backends are made of, by its own interface.

For machines without SGLang. Where it can be imported the tests run on the real classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, IntEnum, auto
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


class AttentionType(Enum):
    DECODER = "decoder"
    DECODER_BIDIRECTIONAL = "decoder_bidirectional"
    ENCODER_ONLY = "encoder_only"


class ForwardMode(IntEnum):
    EXTEND = auto()
    DECODE = auto()
    MIXED = auto()
    IDLE = auto()
    TARGET_VERIFY = auto()
    DRAFT_EXTEND_V2 = auto()
    PREBUILT = auto()
    SPLIT_PREFILL = auto()
    DLLM_EXTEND = auto()

    def is_decode(self) -> bool:
        return self == ForwardMode.DECODE

    def is_idle(self) -> bool:
        return self == ForwardMode.IDLE

    def is_target_verify(self) -> bool:
        return self == ForwardMode.TARGET_VERIFY

    def is_draft_extend_v2(self) -> bool:
        return self == ForwardMode.DRAFT_EXTEND_V2

    def is_dllm_extend(self) -> bool:
        return self == ForwardMode.DLLM_EXTEND


class SpeculativeAlgorithm(Enum):
    DFLASH = auto()
    EAGLE = auto()
    STANDALONE = auto()
    NGRAM = auto()
    NONE = auto()

    def is_none(self) -> bool:
        return self == SpeculativeAlgorithm.NONE

    def is_eagle(self) -> bool:
        return self == SpeculativeAlgorithm.EAGLE

    def is_standalone(self) -> bool:
        return self == SpeculativeAlgorithm.STANDALONE


class IdSpaceKind(Enum):
    FULL = auto()
    SLIDING_WINDOW = auto()


@dataclass
class KVWriteLoc:
    loc: torch.Tensor
    swa_loc: torch.Tensor | None = None
    full_loc: torch.Tensor | None = None
    physical: bool = False

    @classmethod
    def for_layer(
        cls,
        forward_batch: Any,
        layer: Any,
        *,
        swa_loc: torch.Tensor | None = None,
        full_loc: torch.Tensor | None = None,
    ) -> "KVWriteLoc":
        assert not layer.is_cross_attention
        physical = forward_batch.out_cache_loc_is_physical
        return cls(forward_batch.out_cache_loc, swa_loc, full_loc, physical=physical)

    def __post_init__(self) -> None:
        if self.swa_loc is not None and self.swa_loc.shape[0] != self.loc.shape[0]:
            self.swa_loc = self.swa_loc[: self.loc.shape[0]]


class RadixAttention(torch.nn.Module):
    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scaling: float,
        num_kv_heads: int,
        layer_id: int,
        logit_cap: float = 0.0,
        v_head_dim: int = -1,
        sliding_window_size: int = -1,
        is_cross_attention: bool = False,
        pos_encoding_mode: str = "NONE",
        logit_capping_method: str = "tanh",
        quant_config: Any = None,
        attn_type: AttentionType = AttentionType.DECODER,
        use_irope: bool = False,
        prefix: str = "",
        use_prefill_attention_wrapper: bool = True,
    ) -> None:
        super().__init__()
        self.tp_q_head_num = num_heads
        self.tp_k_head_num = self.tp_v_head_num = num_kv_heads
        self.head_dim = self.qk_head_dim = head_dim
        self.v_head_dim = v_head_dim if v_head_dim != -1 else head_dim
        self.scaling = scaling
        self.layer_id = layer_id
        self.logit_cap = logit_cap
        self.sliding_window_size = sliding_window_size or -1
        self.is_cross_attention = is_cross_attention
        self.use_irope = use_irope
        self.k_scale = self.v_scale = None
        self.attn_type = attn_type
        self.pos_encoding_mode = pos_encoding_mode
        self.logit_capping_method = logit_capping_method
        self.xai_temperature_len = -1


class AttentionBackend:
    needs_cpu_seq_lens: bool = True
    extend_dummy_seqs_capped_by_req_pool: bool = False
    forward_metadata: object | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        raise NotImplementedError

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        pass

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        pass

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        raise NotImplementedError

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        raise NotImplementedError

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return q.new_empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        run = self.forward_decode if mode.is_decode() else self.forward_extend
        return run(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        raise NotImplementedError

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        raise NotImplementedError


def _bags() -> dict[str, Any]:
    """The settings that SGLang publishes when it starts."""
    return {
        "exec": SimpleNamespace(
            deterministic=SimpleNamespace(enable_deterministic_inference=False)
        ),
        "parallel": SimpleNamespace(attn_tp_size=1, attn_dcp_size=1),
        "spec": SimpleNamespace(speculative_eagle_topk=None),
    }


def modules(plugins: str | None = None) -> dict[str, ModuleType]:
    """What to put into `sys.modules`; `plugins` is the value of SGLANG_PLUGINS."""
    bags = _bags()
    backends: dict[str, Any] = {}

    def register_attention_backend(name: str) -> Callable[[Any], Any]:
        def decorator(create: Any) -> Any:
            backends[name] = create
            return create

        return decorator

    variable = SimpleNamespace(get=lambda: plugins)
    contents: dict[str, dict[str, Any]] = {
        "sglang": {"__version__": "0.5.23"},
        "sglang.srt": {},
        "sglang.srt.environ": {"envs": SimpleNamespace(SGLANG_PLUGINS=variable)},
        "sglang.srt.arg_groups": {},
        "sglang.srt.arg_groups.choices": {
            "ATTENTION_BACKEND_CHOICES": ["triton", "fa3"],
            "DETERMINISTIC_ATTENTION_BACKEND_CHOICES": ["triton", "fa3"],
        },
        "sglang.srt.layers": {},
        "sglang.srt.layers.attention": {},
        "sglang.srt.layers.attention.attention_registry": {
            "ATTENTION_BACKENDS": backends,
            "register_attention_backend": register_attention_backend,
        },
        "sglang.srt.layers.attention.base_attn_backend": {"AttentionBackend": AttentionBackend},
        "sglang.srt.layers.radix_attention": {
            "AttentionType": AttentionType,
            "RadixAttention": RadixAttention,
        },
        "sglang.srt.mem_cache": {},
        "sglang.srt.mem_cache.kv_loc_plan": {"IdSpaceKind": IdSpaceKind},
        "sglang.srt.mem_cache.memory_pool": {"KVWriteLoc": KVWriteLoc},
        "sglang.srt.model_executor": {},
        "sglang.srt.model_executor.forward_batch_info": {"ForwardMode": ForwardMode},
        "sglang.srt.runtime_context": {
            f"get_{name}": lambda bag=bag: bag for name, bag in bags.items()
        },
        "sglang.srt.speculative": {},
        "sglang.srt.speculative.spec_info": {"SpeculativeAlgorithm": SpeculativeAlgorithm},
    }
    made = {}
    for name, attributes in contents.items():
        made[name] = ModuleType(name)
        made[name].__dict__.update(attributes, __path__=[])
    return made
