"""``python -m bench models``: whole models of transformers on our attention, against its eager one.

Random weights at the head shapes of real models, few layers, a small vocabulary, in bfloat16. Each
way to generate must give the greedy tokens that eager attention gives. Where bfloat16 alone decides
between two tokens, the first one that differs may: the float32 model's logits of the two must be
closer there than bfloat16's errors are large. Logits along the same tokens may be off from the
float32 model by no more than the numerics contract has it: twice the maximum of eager attention's
own error, and 1.5 times its mean.

Each model is a process of its own, all at once: what they compile takes longer than what they run,
and nothing is timed.
"""

import argparse
import contextlib
import copy
import gc
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import environment, report

Tensor = torch.Tensor

VOCABULARY = 1024
LAYERS = ("sliding_attention", "full_attention")
MAX_MULT, MEAN_MULT = 2.0, 1.5  # of docs/numerics.md
# Prompts of one batch, padded on the left; the longest are longer than the windows.
PROMPTS = (1500, 1023, 300, 37)
NEW_TOKENS = 32
MODES = ("dynamic", "static", "paged", "graph", "paged-graph")


@dataclass(frozen=True)
class Model:
    """A configuration class of transformers, and what of a real model's it is given."""

    config: str
    heads: str  # heads_q/heads_kv x head_dim, for the table
    options: dict[str, Any]
    tiny: dict[str, Any]  # what differs where there is no GPU


def sizes(hidden: int, heads_q: int, heads_kv: int, head_dim: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads_q,
        "num_key_value_heads": heads_kv,
        "head_dim": head_dim,
    }


TINY = {**sizes(64, 4, 2, 16), "intermediate_size": 96}
MODELS = {
    "llama": Model(
        "LlamaConfig",
        "32/8x128",
        {**sizes(4096, 32, 8, 128), "intermediate_size": 14336},
        TINY,
    ),
    "qwen3": Model(
        "Qwen3Config",
        "32/8x128, norm of q and k",
        {**sizes(4096, 32, 8, 128), "intermediate_size": 12288},
        TINY,
    ),
    "gpt-oss": Model(
        "GptOssConfig",
        "64/8x64, sinks, window 128 in every second layer",
        {
            **sizes(2880, 64, 8, 64),
            "intermediate_size": 2880,
            "sliding_window": 128,
            "layer_types": LAYERS,
            # Every token goes to both experts: else rounding decides which one it meets.
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
        },
        {**TINY, "sliding_window": 5},
    ),
    "gemma3": Model(
        "Gemma3TextConfig",
        "8/4x256, window 1024 in every second layer",
        {
            **sizes(2560, 8, 4, 256),
            "intermediate_size": 10240,
            "sliding_window": 1024,
            "layer_types": LAYERS,
            "query_pre_attn_scalar": 256,
        },
        {**TINY, "sliding_window": 5, "query_pre_attn_scalar": 16},
    ),
}


@dataclass(frozen=True)
class Setting:
    """Where models run, and how much of everything."""

    device: str
    dtype: torch.dtype
    ver: str
    prompts: tuple[int, ...]
    new_tokens: int
    tiny: bool


def setting(tiny: bool) -> Setting:
    if not tiny:
        return Setting("cuda", torch.bfloat16, "triton", PROMPTS, NEW_TOKENS, tiny)
    return Setting("cpu", torch.bfloat16, "torch", (13, 9, 4), 6, tiny)


def build(name: str, where: Setting) -> Any:
    transformers = importlib.import_module("transformers")
    model = MODELS[name]
    options = model.options | (model.tiny if where.tiny else {})
    config = getattr(transformers, model.config)(
        vocab_size=VOCABULARY,
        num_hidden_layers=len(LAYERS),
        max_position_embeddings=4096,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
        **{key: list(v) if isinstance(v, tuple) else v for key, v in options.items()},
    )
    torch.manual_seed(5)
    with torch.device(where.device):
        built = transformers.AutoModelForCausalLM.from_config(
            config, dtype=where.dtype, attn_implementation="eager"
        ).eval()
        for key, parameter in built.named_parameters():
            if key.endswith("sinks"):  # they start empty
                torch.nn.init.normal_(parameter)
    return built


def left_padded(where: Setting) -> tuple[Tensor, Tensor]:
    """(batch, longest) token numbers and their mask."""
    generator = torch.Generator().manual_seed(7)
    shape = len(where.prompts), max(where.prompts)
    ids = torch.randint(1, VOCABULARY, shape, generator=generator)
    mask = torch.arange(shape[1]) >= shape[1] - torch.tensor(where.prompts)[:, None]
    return (ids * mask).to(where.device), mask.long().to(where.device)


# -------------------------------------------------------------------- ways to generate


def generated(model: Any, ids: Tensor, mask: Tensor, count: int, cache: str | None) -> Tensor:
    """(batch, count) new tokens, by `generate`."""
    found: Tensor = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=count,
        do_sample=False,
        cache_implementation=cache,
        disable_compile=True,
    )
    return found[:, ids.shape[1] :]


def replayed(model: Any, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    """(batch, count) new tokens: the prompt eagerly, then replays of one captured step.

    All layers have a static cache of full length, also those with a window: the sliding one of
    transformers counts its tokens on the host, which no graph can follow.
    """
    caches = importlib.import_module("transformers.cache_utils")
    prompt = ids.shape[1]
    layers = [caches.StaticLayer(prompt + count) for _ in range(model.config.num_hidden_layers)]
    cache = caches.Cache(layers=layers)
    mask = torch.nn.functional.pad(mask, (0, count), value=1)  # causality hides what is to come
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        ids,
        attention_mask=mask[:, :prompt],
        position_ids=positions[:, :prompt],
        past_key_values=cache,
        logits_to_keep=1,
    ).logits
    token = logits[:, -1].argmax(-1, keepdim=True)
    position = positions[:, prompt : prompt + 1].clone()
    first, first_position = token.clone(), position.clone()

    def step() -> None:
        logits = model(
            token, attention_mask=mask, position_ids=position, past_key_values=cache
        ).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        position.add_(1)

    def rewind() -> None:
        """Steps before the first replay leave keys that the replays overwrite."""
        token.copy_(first)
        position.copy_(first_position)
        for layer in layers:
            layer.cumulative_length.fill_(prompt)

    run: Callable[[], object] = step
    if ids.is_cuda:
        timing = importlib.import_module("bench.timing")
        run = timing.capture([step]).replay
        rewind()
    tokens = [first]
    for _ in range(count - 1):
        run()
        tokens.append(token.clone())
    return torch.cat(tokens, 1)


def batched(model: Any, where: Setting, ids: Tensor, graphs: bool) -> Tensor:
    """(requests, count) new tokens of continuous batching, prompts in pieces beside decoding."""
    transformers = importlib.import_module("transformers")
    rows = zip(ids.cpu(), where.prompts, strict=True)
    requests = [row[-length:].tolist() for row, length in rows]
    done = model.generate_batch(
        inputs=requests,
        generation_config=transformers.GenerationConfig(
            max_new_tokens=where.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=transformers.ContinuousBatchingConfig(
            num_blocks=128,
            block_size=16 if where.tiny else 64,
            max_batch_tokens=16 if where.tiny else 512,
            use_cuda_graph=graphs,
            use_async_batching=False,
        ),
        progress_bar=False,
    )
    results = {tuple(result.prompt_ids): result.generated_tokens for result in done.values()}
    return torch.tensor([results[tuple(request)] for request in requests], device=ids.device)


def run_mode(mode: str, model: Any, where: Setting, ids: Tensor, mask: Tensor) -> Tensor:
    if mode.startswith("paged"):
        model.set_attn_implementation("paged|triton_fa")
        return batched(model, where, ids, graphs=mode.endswith("graph"))
    model.set_attn_implementation("triton_fa")
    if mode == "graph":
        return replayed(model, ids, mask, where.new_tokens)
    return generated(model, ids, mask, where.new_tokens, "static" if mode == "static" else None)


# -------------------------------------------------------------------- judging


def followed(model: Any, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """(batch, count, vocabulary) float32 logits before each of `tokens`, in one pass."""
    count = tokens.shape[1]
    whole = torch.cat((ids, tokens[:, :-1]), 1)
    seen = torch.nn.functional.pad(mask, (0, count - 1), value=1)
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    logits: Tensor = model(
        whole,
        attention_mask=seen,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=count,
    ).logits
    return logits.float()


def errors(found: Tensor, exact: Tensor) -> tuple[float, float]:
    difference = (found - exact).abs()
    return difference.max().item(), difference.mean().item()


def compare(tokens: Tensor, wanted: Tensor, exact: Tensor, allowed: float) -> dict[str, Any]:
    """Where the rows of `tokens` first differ from `wanted`, and whether each is a tie.

    Behind the first difference a row goes its own way.
    """
    differences = []
    same = 0
    for row, (ours, theirs) in enumerate(zip(tokens.tolist(), wanted.tolist(), strict=True)):
        pairs = zip(ours, theirs, strict=True)
        position = next((i for i, (a, b) in enumerate(pairs) if a != b), len(theirs))
        same += position
        if position < len(theirs):
            logits = exact[row, position]
            gap = (logits[ours[position]] - logits[theirs[position]]).abs().item()
            differences.append({"row": row, "position": position, "logits_gap": gap})
    return {
        "tokens_compared": same + len(differences),
        "tokens_equal": same,
        "first_differences": differences,
        "correct": all(found["logits_gap"] <= allowed for found in differences),
    }


@torch.no_grad()
def judge(name: str, modes: tuple[str, ...], where: Setting) -> dict[str, Any]:
    """Everything about one model."""
    register = importlib.import_module("triton_fa.integrations.transformers").register
    register(ver=where.ver)
    model = build(name, where)
    ids, mask = left_padded(where)
    wanted = generated(model, ids, mask, where.new_tokens, None)
    eager = followed(model, ids, mask, wanted)
    exact_model = copy.deepcopy(model).float()
    exact = followed(exact_model, ids, mask, wanted)
    del exact_model
    gc.collect()
    if where.device == "cuda":
        torch.cuda.empty_cache()
    model.set_attn_implementation("triton_fa")
    ours = followed(model, ids, mask, wanted)
    of_ours, of_eager = errors(ours, exact), errors(eager, exact)
    top = exact.topk(2).values
    row: dict[str, Any] = {
        "name": name,
        "heads": MODELS[name].heads,
        "prompts": where.prompts,
        "logits_max_error": of_ours[0],
        "logits_max_error_eager": of_eager[0],
        "logits_mean_error": of_ours[1],
        "logits_mean_error_eager": of_eager[1],
        "logits_gap_median": (top[..., 0] - top[..., 1]).median().item(),
        "logits_correct": of_ours[0] <= MAX_MULT * of_eager[0]
        and of_ours[1] <= MEAN_MULT * of_eager[1],
        "modes": {},
    }
    # Two logits that are off by these in opposite directions change places.
    allowed = of_ours[0] + of_eager[0]
    for mode in modes:
        try:
            tokens = run_mode(mode, model, where, ids, mask)
            row["modes"][mode] = compare(tokens, wanted, exact, allowed)
        except Exception as error:  # noqa: BLE001 - one way must not hide the others
            row["modes"][mode] = {"failed": f"{type(error).__name__}: {error}"[:500]}
            if "CUDA error" in str(error):  # nothing more can run in this process
                break
    return row


# -------------------------------------------------------------------- the command


def passed(row: dict[str, Any], modes: tuple[str, ...]) -> bool:
    found = row.get("modes", {})
    return bool(row.get("logits_correct")) and all(
        found.get(mode, {}).get("correct") for mode in modes
    )


def table(rows: list[dict[str, Any]], modes: tuple[str, ...]) -> str:
    """For each way to generate: tokens equal / compared, and the widest gap of a difference."""

    def cell(found: dict[str, Any] | None) -> str:
        if not found or "failed" in found:
            return "FAILED"
        gap = max((d["logits_gap"] for d in found["first_differences"]), default=None)
        text = f"{found['tokens_equal']}/{found['tokens_compared']}"
        text += "" if gap is None else f" gap {gap:.3f}"
        return text if found["correct"] else f"{text} WRONG"

    lines = []
    remarks = []
    for row in rows:
        if "failed" in row:
            lines.append([row["name"], row["failed"][-60:], *[""] * (len(modes) + 1)])
            continue
        error = f"{row['logits_max_error']:.3f} of {row['logits_max_error_eager']:.3f}"
        error += "" if row["logits_correct"] else " WRONG"
        found = [row["modes"].get(mode) for mode in modes]
        gap = f"{row['logits_gap_median']:.3f}"
        lines.append([row["name"], error, gap, *map(cell, found)])
        remarks += [
            f"! {row['name']}, {mode}: {found['failed']}"
            for mode, found in row["modes"].items()
            if "failed" in found
        ]
    header = ["model", "logits error, of eager's", "median gap", *modes]
    return "\n".join([report.table(header, lines), *remarks])


def in_processes(names: list[str], arguments: list[str]) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for name in names:
            path = Path(folder, f"{name}.json")
            command = [sys.executable, "-m", "bench", "models", *arguments]
            command += ["--model", name, "--part", str(path)]
            started.append((name, path, subprocess.Popen(command)))
        for name, path, process in started:
            status = process.wait()
            with contextlib.suppress(OSError, ValueError):
                yield json.loads(path.read_text())
                continue
            yield {"name": name, "failed": f"exit status {status}"}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench models", description=__doc__)
    parser.add_argument("--model", action="append", choices=list(MODELS))
    parser.add_argument("--mode", action="append", choices=MODES)
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU")
    parser.add_argument("--commit", default="", help="recorded where git cannot tell")
    parser.add_argument("--output", type=Path, help="write the result file here")
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if not options.tiny and not torch.cuda.is_available():
        sys.stderr.write("no CUDA device: nothing was run; --tiny runs on the CPU\n")
        return 3
    names = options.model or list(MODELS)
    # Without a GPU the captured step runs eagerly; transformers captures its own.
    modes = tuple(options.mode or (MODES[:-1] if options.tiny else MODES))
    if options.part:
        row = judge(names[0], modes, setting(options.tiny))
        options.part.write_text(json.dumps(row))
        return 0
    passed_on = ["--tiny"] if options.tiny else []
    for mode in modes:
        passed_on += ["--mode", mode]
    rows = list(in_processes(names, passed_on))
    where = environment.describe(options.commit)
    where["transformers"] = environment.version("transformers")
    if options.output:
        content = {"environment": where, "rows": rows, "rows_asked": len(names)}
        options.output.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    sys.stdout.write(table(rows, modes) + "\n")
    return 0 if all(passed(row, modes) for row in rows) else 1
