"""A parity case: plain numbers and a seed, from which the arguments of one public call are made.

Numbers rather than tensors: a case can be printed, stored, compared, and made again on any
device. `Case.materialise` turns it into tensors; everything a call must never read is poison.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from parity_tests import inputs

ENTRIES = ("kvcache", "varlen", "dense")
DTYPES = ("float16", "bfloat16", "float32")
Q_LAYOUTS = ("packed", "batched")
KV_LAYOUTS = ("paged", "packed", "batched")
KV_STRIDES = ("plain", "split", "fused", "sliced")
LENGTHS = ("tensor", "int", "none")
SOURCES = ("random", "llama")

FUNCTIONS = {
    "kvcache": "flash_attn_with_kvcache",
    "varlen": "flash_attn_varlen_func",
    "dense": "flash_attn_func",
}

Window = tuple[int | None, int | None]


@dataclass(frozen=True)
class Spec:
    """The part of a case that decides which kernel is compiled: few of these, many cases each."""

    entry: str = "kvcache"
    dtype: str = "bfloat16"
    heads_q: int = 4
    heads_kv: int = 2
    head_dim: int = 64
    head_dim_v: int = 64
    q_layout: str = "batched"
    kv_layout: str = "paged"
    page_size: int = 16  # of a paged cache, else 0
    kv_strides: str = "plain"
    q_strided: bool = False
    causal: bool = False
    window: Window = (-1, -1)  # None or a negative side is unbounded
    softcap: float = 0.0
    sinks: bool = False
    lse: bool = True
    out: bool = False  # the caller gives the output buffer


@dataclass(frozen=True)
class Case(Spec):
    """One call. `seqlens_q[b]` queries attend to `seqlens_k[b]` keys; the rest is padding."""

    seqlens_q: tuple[int, ...] = (1,)
    seqlens_k: tuple[int, ...] = (16,)
    lengths: str = "tensor"  # how the lengths of a cache are passed
    softmax_scale: float | None = None
    num_splits: int | None = None  # None: the function's own default
    pad_q: int = 0  # rows per sequence beyond seqused_q (which is passed when this is > 0)
    pad_k: int = 0  # slots per sequence beyond the keys in use
    tail_q: int = 0  # packed rows beyond cu_seqlens_q[-1]
    max_q_slack: int = 0  # by how much the host's max_seqlen bounds overstate
    spare_pages: int = 0  # pages that no sequence uses
    table_slack: int = 0  # table columns that no sequence uses
    shared_prefix: bool = False  # sequences share the pages of their common full-page prefix
    source: str = "random"
    seed: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        for field in ("window", "seqlens_q", "seqlens_k"):  # lists, when read from JSON
            object.__setattr__(self, field, tuple(getattr(self, field)))
        problem = illegal(self)
        if problem:
            raise ValueError(f"not a legal case: {problem}: {self}")

    @property
    def batch(self) -> int:
        """Sequences in the call."""
        return len(self.seqlens_q)

    @property
    def work(self) -> int:
        """Scores to compute, over all heads: what the running time follows."""
        pairs = zip(self.seqlens_q, self.seqlens_k, strict=True)
        return self.heads_q * sum(sq * sk for sq, sk in pairs)

    @property
    def spec(self) -> Spec:
        """The compile-time part."""
        return Spec(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Spec)})

    @property
    def label(self) -> str:
        """The name, or a short description of a generated case."""
        if self.name:
            return self.name
        window = "" if unbounded(self.window) else f" window {self.window}"
        flags = "".join(
            f" {word}"
            for word, on in (
                ("causal", self.causal),
                (f"softcap {self.softcap:g}", self.softcap > 0),
                ("sinks", self.sinks),
                ("out=", self.out),
            )
            if on
        )
        page = f"/{self.page_size}" if self.kv_layout == "paged" else ""
        return (
            f"{self.entry} {self.kv_layout}{page} {self.dtype} {self.heads_q}/{self.heads_kv}x"
            f"{self.head_dim},{self.head_dim_v} q{list(self.seqlens_q)} k{list(self.seqlens_k)}"
            f"{window}{flags} seed {self.seed}"
        )

    @property
    def function(self) -> str:
        """Name of the public function this case calls."""
        return FUNCTIONS[self.entry]

    def with_changes(self, **changes: Any) -> "Case":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def identity(self) -> str:
        """Everything but seed and name: two generated cases must differ in this."""
        return self.with_changes(seed=0, name="").to_json()

    def to_json(self) -> str:
        """One line of JSON; `from_json` gives an equal case back."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Case":
        """The case written by `to_json`."""
        return cls(**json.loads(text))

    def materialise(self, device: str, *, poison: bool = True) -> dict[str, Any]:
        """Keyword arguments of the public function.

        With poison, whatever the call must not read is NaN (slots beyond the keys in use, unused
        pages, padding queries) or garbage (page ids in unused table entries). Without it the same
        places hold zeros and page 0; what the call does read is the same bit for bit. A given
        output buffer is NaN either way, so that rows nobody writes show.
        """
        return inputs.make(self, device, poison)

    def repro_snippet(self, ver: Any = "triton", device: str = "cuda") -> str:
        """Python that runs this case again when pasted into an interpreter in the checkout."""
        default = {f.name: f.default for f in dataclasses.fields(Case)}
        fields = [
            f"    {name}={value!r},"
            for name, value in dataclasses.asdict(self).items()
            if value != default[name]
        ]
        interpret = ["import os", 'os.environ["TRITON_INTERPRET"] = "1"'] if device == "cpu" else []
        return "\n".join(
            [
                *interpret,
                "from parity_tests.cases import Case",
                "from parity_tests.runners import Prepared, run_backend",
                "case = Case(",
                *fields,
                ")",
                f'prepared = Prepared.of(case, "{device}")  # .arguments() are those of the call',
                f"print(run_backend(prepared, {ver!r}).describe())",
            ]
        )


def unbounded(window: Window) -> bool:
    """Whether neither side of the window limits anything."""
    return all(side is None or side < 0 for side in window)


def illegal(case: Case) -> str | None:
    """Why no caller may make this call, or None."""
    paged, dense = case.kv_layout == "paged", case.entry == "dense"
    equal_q, equal_k = len(set(case.seqlens_q)) == 1, len(set(case.seqlens_k)) == 1
    rules = (
        (case.entry in ENTRIES and case.dtype in DTYPES, "unknown entry or dtype"),
        (case.q_layout in Q_LAYOUTS and case.kv_layout in KV_LAYOUTS, "unknown layout"),
        (case.kv_strides in KV_STRIDES and case.lengths in LENGTHS, "unknown strides or lengths"),
        (case.source in SOURCES, "unknown source"),
        (len(case.seqlens_q) == len(case.seqlens_k) > 0, "one q and one k length per sequence"),
        (min((*case.seqlens_q, *case.seqlens_k), default=0) >= 0, "negative length"),
        (case.heads_q % case.heads_kv == 0, "heads_q must be a multiple of heads_kv"),
        (all(d % 8 == 0 and 8 <= d <= 256 for d in (case.head_dim, case.head_dim_v)), "head dim"),
        (paged == (case.page_size > 0), "page_size goes with paged keys"),
        (not (case.entry == "kvcache" and case.kv_layout == "packed"), "a cache is never packed"),
        (not (case.kv_strides == "split" and case.kv_layout == "packed"), "split needs pages"),
        (not dense or case.q_layout == case.kv_layout == "batched", "dense is batched"),
        (not dense or (equal_q and equal_k and not case.pad_k), "dense has equal lengths"),
        (case.pad_q == 0 or case.entry == "varlen", "only varlen has seqused_q"),
        (case.q_layout == "packed" or equal_q or case.pad_q > 0, "batched q of unequal lengths"),
        (case.tail_q == 0 or case.q_layout == "packed", "only packed q has a tail"),
        (case.lengths == "tensor" or (case.entry == "kvcache" and equal_k), "lengths as int"),
        (
            case.lengths != "none" or (not paged and case.pad_k == 0),
            "cache_seqlens=None means that the whole cache is in use",
        ),
        (not case.shared_prefix or paged, "only pages can be shared"),
        (
            case.source == "random"
            or (case.q_layout == case.kv_layout == "packed" and case.seqlens_q == case.seqlens_k),
            "a model's forward pass gives packed self-attention",
        ),
    )
    return next((why for fine, why in rules if not fine), None)
