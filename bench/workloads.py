"""Every named benchmark row: which shapes and lengths, never tensors.

A row is frozen numbers and a seed, so that two machines, or two years, mean the same problem by one
name. `CORE` holds the rows that results and comparisons are quoted from; `GRID` holds the wider
sweep over models, batch sizes, contexts and length distributions, for looking around.

Names read ``<batch>x<keys>.<q heads>/<kv heads>x<head dim>`` and then what is special:
``p16`` page size, ``q4`` queries per sequence, ``w1024`` left window, ``full`` not causal, ``new1``
appended keys, turned by ``halves`` or ``interleaved``, ``qv`` scored values, ``kv-e4m3`` float8
keys and values, ``qkv-e4m3`` queries too. ``combine.<splits>x<batch>x<tokens>`` merges partial
results.
"""

import dataclasses
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Phase = Literal["decode", "prefill", "mixed", "step", "metadata", "combine"]
Layout = Literal["paged", "packed", "dense"]
Rotary = Literal["", "halves", "interleaved"]


@dataclass(frozen=True, slots=True)
class Heads:
    """Head counts and sizes of one rank of a model."""

    q: int
    kv: int
    dim: int
    dim_v: int = 0  # 0: the same as dim

    def __str__(self) -> str:
        v = f",{self.dim_v}" if self.dim_v else ""
        return f"{self.q}/{self.kv}x{self.dim}{v}"


@dataclass(frozen=True, slots=True)
class Workload:
    """One named benchmark input."""

    name: str
    phase: Phase
    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    heads: Heads
    page_size: int | None = None  # None: keys are not paged
    dense: bool = False  # 4-D q, k, v without cu_seqlens; all lengths are equal
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sinks: bool = False
    return_lse: bool = False
    max_seqlen_q: int = 0  # 0: the exact maximum; more: a caller that overstates it
    layers: int = 1  # attention calls that share one schedule
    new: int = 0  # of the keys, how many each sequence appends in the call
    rotary: Rotary = ""  # which pairs of dims turn together, in q and in the new keys
    latent: bool = False  # values are scored, too, and keys and values are views of one cache
    splits: int = 0  # partial results that are merged; keys have no meaning then
    dtype: str = "bfloat16"
    kv_dtype: str = ""  # empty: that of the queries
    seed: int = 0
    family: str = ""  # the rows it is read together with
    plain: str = ""  # name of the row that it is with something added

    def __post_init__(self) -> None:
        assert len(self.q_lens) == len(self.k_lens) > 0
        assert self.heads.q % self.heads.kv == 0
        assert not (self.dense and (self.page_size or len({*self.k_lens}) > 1))
        assert self.max_seqlen_q == 0 or self.max_seqlen_q >= max(self.q_lens)
        assert self.new == 0 or (self.page_size and self.new <= min(self.k_lens))
        assert self.new or not self.rotary
        assert (self.phase == "combine") == (self.splits > 0)

    @property
    def batch(self) -> int:
        return len(self.q_lens)

    @property
    def head_dim_v(self) -> int:
        return self.heads.dim_v or self.heads.dim

    @property
    def key_dtype(self) -> str:
        return self.kv_dtype or self.dtype

    @property
    def out_dtype(self) -> str:
        return "bfloat16" if self.dtype.startswith("float8") else self.dtype

    @property
    def layout(self) -> Layout:
        if self.page_size:
            return "paged"
        return "dense" if self.dense else "packed"

    @property
    def bound_q(self) -> int:
        """The ``max_seqlen_q`` that the caller states."""
        return self.max_seqlen_q or max(self.q_lens)

    @property
    def uses_cache(self) -> bool:
        """Whether it goes through flash_attn_with_kvcache."""
        return self.page_size is not None


# Head shapes, per GPU, of the models that the rows stand for.
LLAMA3_8B = Heads(32, 8, 128)
LLAMA3_70B_TP8 = Heads(8, 1, 128)
GPT_OSS = Heads(64, 8, 64)
GEMMA2_9B = Heads(16, 8, 256)
QWEN3_32B = Heads(64, 8, 128)
QWEN3_32B_TP4 = Heads(16, 2, 128)
QWEN3_30B_A3B = Heads(32, 4, 128)
GEMMA3_27B = Heads(32, 16, 128)
MHA_32 = Heads(32, 32, 128)
DIT = Heads(24, 24, 128)
MLA_PREFILL = Heads(16, 16, 192, 128)
# Absorbed MLA: 64 dims with positions, then the latent 512, which are keys and values at once.
MLA_DECODE = Heads(128, 1, 64, 512)
MLA_DECODE_TP8 = Heads(16, 1, 64, 512)


# ---- length distributions; the names are those of FlashAttention's scheduling benchmark


def uniform(batch: int, top: int, seed: int, low: float = 0.5) -> tuple[int, ...]:
    """Independent lengths between ``low`` × top and top."""
    rng = random.Random(seed)
    return tuple(rng.randint(max(1, int(low * top)), top) for _ in range(batch))


def longtail(batch: int, top: int, seed: int) -> tuple[int, ...]:
    """One sequence in eight is long, the rest a sixteenth to an eighth of it."""
    rng = random.Random(seed)
    lens = [top if i % 8 == 0 else rng.randint(top // 16, top // 8) for i in range(batch)]
    rng.shuffle(lens)
    return tuple(lens)


def bimodal(batch: int, top: int, seed: int) -> tuple[int, ...]:
    """Half of the sequences are long, half a thirty-second of it."""
    rng = random.Random(seed)
    lens = [top if i % 2 else max(1, top // 32) for i in range(batch)]
    rng.shuffle(lens)
    return tuple(lens)


def zipf(batch: int, top: int, exponent: float = 1.0, least: int = 16) -> tuple[int, ...]:
    """The i-th longest is top / i**exponent, sorted from the longest."""
    return tuple(max(least, int(top / (i + 1) ** exponent)) for i in range(batch))


def one_giant(batch: int, top: int, rest: int) -> tuple[int, ...]:
    return (top, *([rest] * (batch - 1)))


def lognormal(
    total: int, seed: int, mu: float = 6.5, sigma: float = 1.1, top: int = 16384
) -> tuple[int, ...]:
    """Chat-like prompt lengths until their sum is exactly ``total``."""
    rng = random.Random(seed)
    lens: list[int] = []
    while (left := total - sum(lens)) > 0:
        lens.append(min(left, top, max(1, int(rng.lognormvariate(mu, sigma)))))
    return tuple(lens)


def choice(batch: int, values: Sequence[int], seed: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.choice(values) for _ in range(batch))


# ---- how a row is written


def decode(
    k_lens: Sequence[int],
    heads: Heads,
    page_size: int = 16,
    q_len: int = 1,
    name: str = "",
    **extra: Any,
) -> Workload:
    """Every sequence has ``q_len`` new queries at the end of its paged keys."""
    label = name or f"{len(k_lens)}x{k_lens[0]}"
    label += f".{heads}.p{page_size}" + (f".q{q_len}" if q_len > 1 else "") + suffix(extra)
    return Workload(
        name=label,
        phase="decode",
        q_lens=(q_len,) * len(k_lens),
        k_lens=tuple(k_lens),
        heads=heads,
        page_size=page_size,
        **extra,
    )


def prefill(lens: Sequence[int], heads: Heads, name: str = "", **extra: Any) -> Workload:
    """Packed (or dense, or paged) sequences whose queries and keys are equally many."""
    page_size, causal = extra.get("page_size"), extra.get("causal", True)
    label = f"{name or f'{len(lens)}x{lens[0]}'}.{heads}"
    label += f".p{page_size}" if page_size else ""
    label += suffix(extra) + ("" if causal else ".full") + (".dense" if "dense" in extra else "")
    lens = tuple(lens)
    return Workload(name=label, phase="prefill", q_lens=lens, k_lens=lens, heads=heads, **extra)


def chunk(batch: int, new: int, total: int, heads: Heads, page_size: int = 64) -> Workload:
    """The last ``new`` tokens of ``total`` against a paged cache that holds them all."""
    return Workload(
        name=f"chunk.{batch}x{new}of{total}.{heads}.p{page_size}",
        phase="prefill",
        q_lens=(new,) * batch,
        k_lens=(total,) * batch,
        heads=heads,
        page_size=page_size,
        family="chunk",
    )


def beside(plain: Workload, tag: str, family: str, **added: Any) -> Workload:
    """`plain` with something added, which is compared with it."""
    name = f"{plain.name}.{tag}"
    return dataclasses.replace(plain, name=name, family=family, plain=plain.name, **added)


def combine(splits: int, batch: int, tokens: int, heads: Heads) -> Workload:
    """Merging partial results of `batch` sequences with `tokens` queries each."""
    return Workload(
        name=f"combine.{splits}x{batch}x{tokens}.{heads.q}x{heads.dim}",
        phase="combine",
        q_lens=(tokens,) * batch,
        k_lens=(tokens,) * batch,
        heads=heads,
        splits=splits,
        family="combine",
    )


def suffix(extra: dict[str, Any]) -> str:
    text = ""
    if "window" in extra:
        left, right = extra["window"]
        text += f".w{left}" if right in (-1, 0) else f".w{left}+{right}"
    if extra.get("softcap"):
        text += f".cap{extra['softcap']:g}"
    if extra.get("sinks"):
        text += ".sinks"
    if extra.get("return_lse"):
        text += ".lse"
    if extra.get("latent"):
        text += ".qv"
    if extra.get("max_seqlen_q"):
        text += f".bound{extra['max_seqlen_q']}"
    if extra.get("layers"):
        text += f".layers{extra['layers']}"
    return text


def decode_core() -> Iterator[Workload]:
    small = [(1, 1024), (8, 512), (4, 2048), (1, 8192), (32, 1024), (64, 512)]
    for batch, keys in small:
        yield decode([keys] * batch, LLAMA3_8B, family="small")
    for keys in (1024, 16384):
        yield decode([keys], LLAMA3_70B_TP8, family="small")

    yield decode([64] * 256, LLAMA3_8B, family="many short")
    yield decode([128] * 1024, LLAMA3_70B_TP8, family="many short")
    yield decode([32] * 8192, LLAMA3_70B_TP8, family="many short")

    skew = choice(32, (256, 512, 1024, 32768), seed=0)
    yield decode(skew, LLAMA3_8B, name="skew32", family="skewed")
    yield decode(one_giant(64, 65536, 512), LLAMA3_8B, name="giant64", family="skewed")
    yield decode(zipf(128, 32768), LLAMA3_8B, name="zipf128", family="skewed")

    for page_size in (1, 16, 64, 128, 256):
        yield decode([8192] * 16, LLAMA3_8B, page_size, family="large")
    yield decode([4096] * 64, GPT_OSS, family="large")
    yield decode([8192] * 32, GEMMA2_9B, 64, family="large")
    yield decode([8192] * 16, MHA_32, 64, family="large")
    yield decode([4096] * 128, LLAMA3_70B_TP8, 64, family="large")
    yield decode([131072], LLAMA3_8B, family="large")

    for heads in (24, 40, 96):
        yield decode([4096] * 16, Heads(heads, heads, 128), family="head counts")
    for dim in (80, 96, 160, 192):
        yield decode([4096] * 16, Heads(32, 8, dim), family="head dims")

    yield decode([4096] * 8, GPT_OSS, family="drafts")
    for q_len in (2, 4, 8):
        yield decode([8192] * 16, LLAMA3_8B, q_len=q_len, family="drafts")
        yield decode([4096] * 8, GPT_OSS, q_len=q_len, family="drafts")

    for left in (128, 1024, 4096):
        yield decode([32768] * 16, LLAMA3_8B, window=(left, 0), family="features")
        yield decode([32768] * 8, GPT_OSS, window=(left, 0), sinks=True, family="features")
    yield decode([8192] * 16, GEMMA2_9B, softcap=50.0, family="features")
    yield decode([8192] * 16, LLAMA3_8B, return_lse=True, family="features")

    yield decode([8192] * 16, LLAMA3_8B, max_seqlen_q=2048, family="overstated")
    yield from mixed_core()


def mixed_core() -> Iterator[Workload]:
    """Decodes and prompt chunks in one call, as a scheduler with chunked prefill makes them."""
    shapes = {
        "mixed.31x2048+2048of8192": [(31, 1, 2048), (1, 2048, 8192)],
        "mixed.4x1024of8192+64x4096": [(4, 1024, 8192), (64, 1, 4096)],
    }
    for name, groups in shapes.items():
        yield Workload(
            name=f"{name}.{LLAMA3_8B}.p16",
            phase="mixed",
            q_lens=tuple(q for n, q, _ in groups for _ in range(n)),
            k_lens=tuple(k for n, _, k in groups for _ in range(n)),
            heads=LLAMA3_8B,
            page_size=16,
            family="mixed",
        )


def step_core() -> Iterator[Workload]:
    """One decoding step of a 64-layer model: the schedule once, then every layer."""
    for batch in (1, 16):
        row = decode([8192] * batch, LLAMA3_8B, layers=64, family="step")
        yield dataclasses.replace(row, phase="step")


def metadata_core() -> Iterator[Workload]:
    """The scheduling pass alone."""
    for batch in (1, 8, 64, 256, 1024):
        row = decode(uniform(batch, 8192, seed=batch, low=0.0), LLAMA3_8B, name=f"plan.{batch}")
        yield dataclasses.replace(row, phase="metadata", family="metadata")


def prefill_core() -> Iterator[Workload]:
    yield prefill([16384], LLAMA3_8B, family="causal")
    yield prefill([4096] * 4, LLAMA3_8B, family="causal")
    yield prefill([1024] * 16, LLAMA3_8B, family="causal")
    yield prefill([16384], LLAMA3_8B, causal=False, family="full")
    yield prefill([8192] * 2, DIT, causal=False, dense=True, family="full")
    for heads in (GEMMA2_9B, GPT_OSS):
        yield prefill([16384], heads, family="head dims")
        yield prefill([16384], heads, causal=False, family="head dims")
    yield prefill([8192], MLA_PREFILL, family="head dims")

    ragged = (8192, 4096, 2048, 1024, 512, 256, 128, 100, 28)
    yield prefill(ragged, LLAMA3_8B, name="ragged9", family="ragged")
    yield prefill((8192, *[128] * 64), LLAMA3_8B, name="8192+64x128", family="ragged")
    yield prefill(lognormal(32768, seed=0), LLAMA3_8B, name="lognormal32k", family="ragged")
    yield prefill([34] * 8192, LLAMA3_8B, family="many short")

    yield prefill([8192] * 2, LLAMA3_8B, family="paged")
    for page_size in (16, 64, 128, 256):
        yield prefill([8192] * 2, LLAMA3_8B, page_size=page_size, family="paged")
    for batch in (1, 8):
        for total in (4096, 32768, 131072):
            yield chunk(batch, 1024, total, LLAMA3_8B)

    for left in (1024, 4096):
        for tokens in (16384, 65536):
            yield prefill([tokens], LLAMA3_8B, window=(left, 0), family="window")
    yield prefill([8192] * 2, GPT_OSS, window=(128, 0), sinks=True, family="window")
    yield prefill([16384], GEMMA2_9B, window=(4096, 0), softcap=50.0, family="window")

    for dim in (80, 96, 160):
        yield prefill([4096] * 4, Heads(32, 8, dim), family="odd head dims")
    yield from mixed_core()


def append_core() -> Iterator[Workload]:
    """Decode steps that store their own new key first, with and without a rotary embedding."""
    for batch, family in ((1, "small"), (16, "large"), (64, "large")):
        plain = decode([8192] * batch, LLAMA3_8B, family=family)
        yield plain
        yield beside(plain, "new1", "append", new=1)
        for rotary in ("halves", "interleaved"):
            yield beside(plain, f"new1.{rotary}", "append", new=1, rotary=rotary)


def combine_core() -> Iterator[Workload]:
    for splits in (4, 16, 32, 64, 128):
        yield combine(splits, 16, 1, LLAMA3_8B)
    yield combine(4, 1, 16384, LLAMA3_8B)


def latent_core() -> Iterator[Workload]:
    """Absorbed MLA; the largest cache has 4.8 GB."""
    for heads in (MLA_DECODE_TP8, MLA_DECODE):
        for batch in (1, 16, 128):
            for keys in (2048, 8192, 32768):
                yield decode([keys] * batch, heads, 64, latent=True, family=f"qv, {heads.q} heads")
        for q_len in (2, 4):
            yield decode([8192] * 16, heads, 64, q_len, latent=True, family="qv, drafts")


def float8_core() -> Iterator[Workload]:
    """Rows in bfloat16, then the same with float8 keys and values, or all of q, k and v."""
    shapes = [(16, 8192, "large"), (64, 512, "small"), (1, 1024, "small"), (1, 131072, "large")]
    rows = [decode([keys] * batch, LLAMA3_8B, family=family) for batch, keys, family in shapes]
    rows.append(decode([4096] * 64, GPT_OSS, family="large"))
    for plain in rows:
        yield plain
        yield beside(plain, "kv-e4m3", "float8 decode", kv_dtype="float8_e4m3fn")
    yield beside(rows[0], "kv-e5m2", "float8 decode", kv_dtype="float8_e5m2")
    for heads, family in ((LLAMA3_8B, "causal"), (GEMMA2_9B, "head dims")):
        plain = prefill([16384], heads, family=family)
        yield plain
        yield beside(plain, "qkv-e4m3", "float8 prefill", dtype="float8_e4m3fn")


# Keys a row may hold at most, so that K and V, and one copy of them, fit beside each other.
MAX_CACHE_BYTES = 60 * 2**30
MODELS = {
    "llama3-8b": LLAMA3_8B,
    "llama3-70b-tp8": LLAMA3_70B_TP8,
    "qwen3-32b": QWEN3_32B,
    "qwen3-32b-tp4": QWEN3_32B_TP4,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "gpt-oss": GPT_OSS,
    "gemma2-9b": GEMMA2_9B,
    "gemma3-27b": GEMMA3_27B,
    "mha": MHA_32,
}
# The features a model's attention layers have; gpt-oss and Gemma alternate with full layers.
FEATURES: dict[str, list[dict[str, Any]]] = {
    "gpt-oss": [{"sinks": True}, {"sinks": True, "window": (128, 0)}],
    "gemma2-9b": [{"softcap": 50.0}, {"softcap": 50.0, "window": (4096, 0)}],
}


def fits(k_lens: Iterable[int], heads: Heads) -> bool:
    return sum(k_lens) * heads.kv * (heads.dim + (heads.dim_v or heads.dim)) * 2 <= MAX_CACHE_BYTES


def decode_grid() -> Iterator[Workload]:
    contexts = (256, 1024, 4096, 8192, 32768, 131072)
    for model, heads in MODELS.items():
        for features in FEATURES.get(model, [{}]):
            for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256):
                for keys in contexts:
                    if fits([keys] * batch, heads):
                        name = f"{model}.{batch}x{keys}"
                        yield decode([keys] * batch, heads, name=name, family=model, **features)
    distributions = {
        "uniform64": uniform(64, 8192, seed=1),
        "wide64": uniform(64, 8192, seed=2, low=0.0),
        "longtail64": longtail(64, 16384, seed=3),
        "bimodal64": bimodal(64, 16384, seed=4),
        "giant64-128k": one_giant(64, 131072, 1024),
        "zipf64-1.2": zipf(64, 65536, exponent=1.2),
        "wide64-sorted": tuple(sorted(uniform(64, 8192, seed=2, low=0.0), reverse=True)),
    }
    for name, lens in distributions.items():
        for heads in (LLAMA3_8B, LLAMA3_70B_TP8):
            yield decode(lens, heads, name=name, family="distributions")
    for page_size in (1, 16, 64, 128, 256, 1072):
        yield decode([16384] * 32, LLAMA3_70B_TP8, page_size, family="page sizes")
    for q_len in (2, 4, 5, 8):
        yield decode([4096] * 32, QWEN3_32B_TP4, q_len=q_len, family="drafts")


def prefill_grid() -> Iterator[Workload]:
    for total in (16384, 32768):
        for tokens in (128, 512, 1024, 2048, 4096, 8192, 16384, 32768):
            if tokens <= total:
                for model in ("llama3-8b", "gpt-oss", "gemma2-9b"):
                    name = f"{model}.{total // tokens}x{tokens}"
                    lens = [tokens] * (total // tokens)
                    yield prefill(lens, MODELS[model], name=name, family=model)
    yield prefill([65536], LLAMA3_8B, family="long")
    for tokens in (4096, 16384, 32768, 65536):
        for batch in (1, 2):
            lens = [tokens] * batch
            yield prefill(lens, DIT, causal=False, dense=True, family="diffusion")
    for new in (512, 2048, 8192):
        for prefix in (0, 8192, 32768, 131072):
            yield chunk(1, new, prefix + new, LLAMA3_8B)
    for seed in (1, 2, 3):
        name = f"lognormal32k-{seed}"
        yield prefill(lognormal(32768, seed), LLAMA3_8B, name=name, family="ragged")
    for tokens, decodes in ((2048, 31), (8192, 255)):
        yield Workload(
            name=f"mixed.{tokens}+{decodes}x4096.{LLAMA3_8B}.p16",
            phase="mixed",
            q_lens=(tokens, *[1] * decodes),
            k_lens=(tokens, *[4096] * decodes),
            heads=LLAMA3_8B,
            page_size=16,
            family="mixed",
        )


def without_repetition(rows: Iterable[Workload]) -> tuple[Workload, ...]:
    return tuple({row.name: row for row in rows}.values())


DECODE = without_repetition(decode_core())
PREFILL = without_repetition(prefill_core())
STEP = without_repetition(step_core())
METADATA = without_repetition(metadata_core())
APPEND = without_repetition(append_core())
COMBINE = without_repetition(combine_core())
LATENT = without_repetition(latent_core())
FLOAT8 = without_repetition(float8_core())
CORE: dict[str, tuple[Workload, ...]] = {
    "decode": DECODE,
    "prefill": PREFILL,
    "step": STEP,
    "metadata": METADATA,
    "append": APPEND,
    "combine": COMBINE,
    "latent": LATENT,
    "float8": FLOAT8,
}
GRID: dict[str, tuple[Workload, ...]] = {
    "decode": without_repetition(decode_grid()),
    "prefill": without_repetition(prefill_grid()),
}


def select(kind: str, pattern: str = "", wide: bool = False) -> tuple[Workload, ...]:
    """Rows of ``kind`` whose name or family matches ``pattern``, searched as a regex."""
    rows = GRID.get(kind, ()) if wide else CORE[kind]
    return tuple(r for r in rows if re.search(pattern, r.name) or re.search(pattern, r.family))


def find(name: str) -> Workload:
    """The row of that exact name."""
    for rows in (*CORE.values(), *GRID.values()):
        for row in rows:
            if row.name == name:
                return row
    raise KeyError(name)


def shrunk(row: Workload, top: int = 64) -> Workload:
    """A row like ``row`` with lengths cut to ``top`` and few sequences, for machines without a GPU.

    The head group and every feature stay; windows shrink in proportion.
    """
    scale = min(1.0, top / max(row.k_lens))
    k_lens = tuple(max(1, math.ceil(k * scale)) for k in row.k_lens[:4])
    q_lens = tuple(
        k if q == full else min(q, k)
        for q, full, k in zip(row.q_lens, row.k_lens, k_lens, strict=False)
    )
    left, right = row.window
    return dataclasses.replace(
        row,
        q_lens=q_lens,
        k_lens=k_lens,
        max_seqlen_q=0,
        window=(left if left < 0 else max(1, math.ceil(left * scale)), right),
        page_size=min(row.page_size, 16) if row.page_size else None,
    )
