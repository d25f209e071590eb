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
from typing import Any

import pytest
import torch

import triton_fa
from tests.portability.compiler import Step, planning_for
from tests.portability.targets import TARGETS

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
}


def variant(step: Step) -> tuple[Any, ...]:
    """What Triton compiles a launch for: types, alignments and values it is specialised on."""
    kernel = getattr(step.kernel, "_kernel", step.kernel)  # inside of the Hopper kernel's wrapper
    found: list[Any] = [step.kernel.__name__, sorted(step.options.items())]
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
        batch = rng.randint(1, model["max_batch"])
        most = rng.choice(model["max_seqlens_q"])
        tokens = rng.choice((batch, batch * rng.randint(1, most), rng.randint(1, batch * most)))
        width = rng.randint(1, 64)
        yield {"batch": batch, "most": most, "tokens": min(tokens, 1 << 16), "width": width}


def missed(name: str, rng: random.Random) -> list[str]:
    """The calls that would compile something after a warm-up."""
    model = dict(MODELS[name])
    heads, dim = name.split()[0].split("x")
    num_heads_q, num_heads_kv = map(int, heads.split("/"))
    head_dim, page_size = int(dim), model["page_size"]
    sinks = torch.zeros(num_heads_q, dtype=torch.bfloat16) if model.get("sinks") else None
    settings = {n: model[n] for n in ("window_size", "return_softmax_lse") if n in model}
    with planning_for(TARGETS[sys.argv[1]]) as seen:
        triton_fa.warmup(num_heads_q, num_heads_kv, head_dim, device="cpu", **model)
        known = set(map(variant, seen))
        misses = []
        for call in calls(rng, model):
            seen.clear()
            batch, most = call["batch"], call["most"]
            pages = (batch * call["width"], page_size, num_heads_kv, head_dim)
            lengths = torch.ones(batch, dtype=torch.int32)
            cu_seqlens_q = torch.zeros(batch + 1, dtype=torch.int32)
            metadata = None
            if rng.random() < 0.5:
                metadata = triton_fa.get_scheduler_metadata(
                    *(batch, most, call["width"] * page_size, num_heads_q, num_heads_kv, head_dim),
                    *(lengths, torch.bfloat16, head_dim, cu_seqlens_q),
                    page_size=page_size,
                    causal=True,
                    window_size=model.get("window_size", (-1, -1)),
                    ver="triton",
                )
            triton_fa.flash_attn_with_kvcache(
                torch.empty(call["tokens"], num_heads_q, head_dim, dtype=torch.bfloat16),
                torch.empty(pages, dtype=torch.bfloat16),
                torch.empty(pages, dtype=torch.bfloat16),
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
