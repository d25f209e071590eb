"""Warm-up reaches every kernel variant that later calls of an engine's form compile.

Calls are planned for chips that are not here, and nothing is launched: what a launch would compile
is known from its arguments. jit functions are made for the interpreter where tests run, so this
happens in a process of its own: ``python -m tests.test_warm CHIP SEED`` prints what was missed.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import triton_fa
from tests.portability.compiler import Step, planning_for
from tests.portability.targets import TARGETS
from triton_fa.kernels.hopper_plans import View

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
CALLS = 80  # of each model
MODELS: dict[str, dict[str, Any]] = {
    "64/8x64": {"page_size": 64, "max_seqlens_q": (1, 8, 600), "max_batch": 40},
    "32/8x128": {"page_size": 16, "max_seqlens_q": (1, 1500), "max_batch": 300},
    "2/2x128": {"page_size": 256, "max_seqlens_q": (3000,), "max_batch": 9},
    "5/1x96": {"page_size": 32, "max_seqlens_q": (1, 7), "max_batch": 33},
    "8/2x80 window": {
        "page_size": 16,
        "max_seqlens_q": (1, 300),
        "max_batch": 20,
        "sinks": True,
        "window_size": (255, 0),
        "return_softmax_lse": True,
    },
    "128/1x64 latent": {
        "head_dim_v": 512,
        "qv": True,
        "page_size": 64,
        "max_seqlens_q": (1, 7),
        "max_batch": 40,
    },
    "24/1x64 latent": {
        "head_dim_v": 512,
        "qv": True,
        "page_size": 16,
        "max_seqlens_q": (6, 100),
        "max_batch": 8,
    },
    "8/2x128 float8 cache": {
        "kv_dtype": torch.float8_e4m3fn,
        "descales": True,
        "page_size": 32,
        "max_seqlens_q": (1, 300),
        "max_batch": 20,
    },
    "6/2x64 float8": {
        "dtype": torch.float8_e4m3fn,
        "descales": True,
        "page_size": 16,
        "max_seqlens_q": (1, 1200),
        "max_batch": 9,
    },
    "4/4x128 float8 cache, no factors": {
        "kv_dtype": torch.float8_e5m2,
        "page_size": 16,
        "max_seqlens_q": (1,),
        "max_batch": 20,
    },
}


def variant(step: Step) -> tuple[Any, ...]:
    """What Triton compiles a launch for: types, alignments and values it is specialised on."""
    kernel = getattr(step.kernel, "_kernel", step.kernel)  # inside of the Hopper kernel's wrapper
    views = [v and (v.dtype, v.block) for v in getattr(step.kernel, "_views", ())]
    found: list[Any] = [step.kernel.__name__, sorted(step.options.items()), ("views", *views)]
    for param in kernel.params:
        value = step.values.get(param.name)
        if value is None or param.is_constexpr:
            found.append((param.name, repr(value)))
        elif isinstance(value, torch.Tensor):
            found.append((param.name, str(value.dtype), value.data_ptr() % 16 == 0))
        elif isinstance(value, int):
            wide = abs(value) >= 2**31
            special = () if param.do_not_specialize else (value == 1, value % 16 == 0)
            found.append((param.name, wide, *special))
    return tuple(map(str, found))


def calls(rng: random.Random, model: dict[str, Any]) -> Iterator[dict[str, int]]:
    """Calls as engines make them: any batch, bound, number of tokens and width of the table."""
    for _ in range(CALLS):
        batch = rng.randint(1, rng.choice((4, model["max_batch"])))
        most = rng.choice(model["max_seqlens_q"])
        few, each = rng.randint(1, most), rng.randint(1, most)
        tokens = rng.choice((few, batch, batch * each, rng.randint(1, batch * most)))
        width = rng.randint(1, 64)
        yield {"batch": batch, "most": most, "tokens": min(tokens, 1 << 16), "width": width}


def arguments(rng: random.Random, name: str, call: dict[str, int]) -> dict[str, Any]:
    """The tensors of a call."""
    model = MODELS[name]
    num_heads_q, num_heads_kv, dim, dim_v = shape(name)
    dtype = model.get("dtype", torch.bfloat16)
    kv_dtype = model.get("kv_dtype", dtype)
    pages = (call["batch"] * call["width"], model["page_size"], num_heads_kv)
    k_cache = torch.empty(*pages, dim, dtype=kv_dtype)
    v_cache = torch.empty(*pages, dim_v, dtype=kv_dtype)
    given: dict[str, Any] = {}
    if model.get("qv"):
        both = torch.empty(*pages, dim_v + dim, dtype=kv_dtype)
        v_cache, k_cache = both.split([dim_v, dim], -1)
        given["qv"] = torch.empty(call["tokens"], num_heads_q, dim_v, dtype=dtype)
    if model.get("descales"):
        shapes = (call["batch"], num_heads_kv)
        for which in ("k", "v", *(["q"] if dtype.itemsize == 1 else [])):
            contiguous = rng.random() < 0.5
            given[f"{which}_descale"] = torch.ones(shapes if contiguous else ()).expand(shapes)
    return given | {
        "q": torch.empty(call["tokens"], num_heads_q, dim, dtype=dtype),
        "k_cache": k_cache,
        "v_cache": v_cache,
    }


def shape(name: str) -> tuple[int, int, int, int]:
    """(num_heads_q, num_heads_kv, head_dim, head_dim_v) of a model."""
    heads, dim = name.split()[0].split("x")
    num_heads_q, num_heads_kv = map(int, heads.split("/"))
    return num_heads_q, num_heads_kv, int(dim), MODELS[name].get("head_dim_v", int(dim))


def missed(name: str, rng: random.Random) -> list[str]:
    """The calls that would compile something after a warm-up."""
    model = dict(MODELS[name])
    num_heads_q, num_heads_kv, head_dim, head_dim_v = shape(name)
    page_size = model["page_size"]
    sinks = torch.zeros(num_heads_q, dtype=torch.bfloat16) if model.get("sinks") else None
    settings = {n: model[n] for n in ("window_size", "return_softmax_lse") if n in model}
    with planning_for(TARGETS[sys.argv[1]]) as seen:
        triton_fa.warmup(num_heads_q, num_heads_kv, head_dim, device="cpu", **model)
        known = set(map(variant, seen))
        misses = []
        for call in calls(rng, model):
            seen.clear()
            batch, most = call["batch"], call["most"]
            lengths = torch.ones(batch, dtype=torch.int32)
            cu_seqlens_q = torch.zeros(batch + 1, dtype=torch.int32)
            metadata = None
            if rng.random() < 0.5 and not model.get("qv"):
                metadata = triton_fa.get_scheduler_metadata(
                    *(batch, most, call["width"] * page_size, num_heads_q, num_heads_kv, head_dim),
                    *(lengths, model.get("dtype", torch.bfloat16), head_dim_v, cu_seqlens_q),
                    page_size=page_size,
                    causal=True,
                    window_size=model.get("window_size", (-1, -1)),
                    ver="triton",
                )
            triton_fa.flash_attn_with_kvcache(
                **arguments(rng, name, call),
                cache_seqlens=lengths,
                page_table=torch.zeros(batch, call["width"], dtype=torch.int32),
                cu_seqlens_q=cu_seqlens_q,
                max_seqlen_q=most,
                causal=True,
                sinks=sinks,
                scheduler_metadata=metadata,
                ver="triton",
                **settings,
            )
            for step in seen:
                if variant(step) not in known:
                    like = [k for k in known if k[0] == step.kernel.__name__]
                    own = set(variant(step))
                    differs = min((sorted(own - set(k)) for k in like), key=len, default=["new"])
                    misses.append(f"{name} {step.kernel.__name__} {call}: {differs}")
    return misses


def test_boxes_of_descriptors_make_variants() -> None:
    def found(block: tuple[int, ...]) -> tuple[Any, ...]:
        view = View(0, (1,), (1,), block, torch.bfloat16)
        kernel = SimpleNamespace(__name__="kernel", params=[], _views=(None, view))
        return variant(Step(kernel, {}, {}))

    assert found((64, 128)) == found((64, 128)) != found((32, 128))


@pytest.mark.parametrize(("chip", "seed"), [("sm_90", 0), ("gfx942", 1)])
def test_warmup_reaches_every_variant(chip: str, seed: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_warm", chip, str(seed)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT), "TRITON_FA_HOPPER": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


if __name__ == "__main__":
    rng = random.Random(int(sys.argv[2]))
    json.dump([text for name in MODELS for text in missed(name, rng)], sys.stdout, indent=1)
