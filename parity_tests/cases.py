"""A parity case: plain numbers and a seed, from which the arguments of one public call are made.

Numbers rather than tensors: a case can be printed, stored, compared, and made again on any
device. `Case.materialise` turns it into tensors; everything a call must never read is poison.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from parity_tests import inputs
from parity_tests.legality import FLOAT8, illegal

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
    append: str = ""  # how new keys are given: equally many of each sequence, or packed
    rotary_dim: int = 0  # 0: no rotation
    rotary_interleaved: bool = True
    leftpad: bool = False  # keys in use begin at `leftpads`
    batch_idx: bool = False  # sequences use rows of the cache or of the table in another order
    attention_chunk: int = 0  # 0: none
    kv_dtype: str = ""  # of keys and values, where it is not dtype
    descales: str = ""  # which of q, k and v have factors, by their letters
    descale_strides: str = "plain"
    qv: bool = False  # scores are of values besides
    only_qv: str = ""  # of values alone: q and k are not given, or are given and never read

    @property
    def of_keys(self) -> str:
        """Dtype of keys and values."""
        return self.kv_dtype or self.dtype

    @property
    def out_dtype(self) -> str:
        """Dtype of the result."""
        return "bfloat16" if self.dtype in FLOAT8 else self.dtype


@dataclass(frozen=True)
class Case(Spec):
    """One call. `seqlens_q[b]` queries attend to `seqlens_k[b]` keys; the rest is padding.

    Of a cache `seqlens_k` are the keys in it before the call, `keys` what is attended to.
    """

    seqlens_q: tuple[int, ...] = (1,)
    seqlens_k: tuple[int, ...] = (16,)
    seqlens_new: tuple[int, ...] = ()  # keys to append to each sequence
    leftpads: tuple[int, ...] = ()
    rotary_seqlens: tuple[int, ...] = ()  # positions to rotate at; none: seqlens_k
    rotary_rows: int = 0  # of the tables of cosines and sines; 0: as many as anything needs
    lengths: str = "tensor"  # how the lengths of a cache are passed
    softmax_scale: float | None = None
    num_splits: int | None = None  # None: the function's own default
    pad_q: int = 0  # rows per sequence beyond seqused_q (which is passed when this is > 0)
    pad_k: int = 0  # slots per sequence beyond the keys in use
    tail_q: int = 0  # packed rows beyond cu_seqlens_q[-1]
    tail_new: int = 0  # packed rows beyond cu_seqlens_k_new[-1]
    overflow: int = 0  # new keys of the longest sequence that the cache has no room for
    max_q_slack: int = 0  # by how much the host's max_seqlen bounds overstate
    spare_pages: int = 0  # pages that no sequence uses
    table_slack: int = 0  # table columns that no sequence uses
    spare_rows: int = 0  # rows of the cache or of the table that no sequence uses
    shared_prefix: bool = False  # sequences share the pages of their common full-page prefix
    source: str = "random"
    seed: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # read from JSON
                object.__setattr__(self, field.name, tuple(value))
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
        pairs = zip(self.seqlens_q, self.keys, strict=True)
        return self.heads_q * sum(sq * sk for sq, sk in pairs)

    @property
    def new(self) -> tuple[int, ...]:
        """Keys to append to each sequence, also where none are."""
        return self.seqlens_new or (0,) * self.batch

    @property
    def capacity(self) -> int:
        """Keys that one sequence has room for in the cache or the table."""
        totals = (n + new for n, new in zip(self.seqlens_k, self.new, strict=True))
        most = max(*self.seqlens_k, max(totals) - self.overflow)
        if self.kv_layout != "paged":
            return most + self.pad_k
        pages = -(-most // self.page_size) + -(-self.pad_k // self.page_size) + self.table_slack
        return max(1, pages) * self.page_size

    @property
    def ends(self) -> tuple[int, ...]:
        """Keys in the cache of each sequence after the call, left padding included."""
        totals = zip(self.seqlens_k, self.new, strict=True)
        return tuple(min(n + new, self.capacity) for n, new in totals)

    @property
    def keys(self) -> tuple[int, ...]:
        """Keys that the queries of each sequence attend to."""
        leftpads = self.leftpads or (0,) * self.batch
        return tuple(max(0, end - pad) for end, pad in zip(self.ends, leftpads, strict=True))

    @property
    def rotary_starts(self) -> tuple[int, ...]:
        """The position of each sequence's first new key and first query."""
        return self.rotary_seqlens or self.seqlens_k

    @property
    def rotary_end(self) -> int:
        """Behind the last position that is rotated at."""
        spans = zip(self.rotary_starts, self.new, self.seqlens_q, strict=True)
        return max(start + max(new, seqlen_q) for start, new, seqlen_q in spans)

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
                (f"append {self.append} {list(self.seqlens_new)}", bool(self.append)),
                (f"rotary {self.rotary_dim}", self.rotary_dim > 0),
                (f"leftpad {list(self.leftpads)}", self.leftpad),
                ("batch_idx", self.batch_idx),
                (f"chunk {self.attention_chunk}", self.attention_chunk > 0),
                (f"cache {self.kv_dtype}", bool(self.kv_dtype)),
                (f"descales {self.descales} {self.descale_strides}", bool(self.descales)),
                (f"qv {self.only_qv and 'only, ' + self.only_qv}".rstrip(), self.qv),
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

        With poison, whatever the call must not read is NaN (slots outside of the keys in use,
        unused pages and rows, padding queries and new keys, angles of other positions) or garbage
        (page ids in unused table entries). Without it the same places hold zeros and page 0; what
        the call does read is the same bit for bit. A given output buffer is NaN either way, so that
        rows nobody writes show.
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
