"""The first call of this process: ``python -m bench.fresh LABEL ROW DEVICE`` prints its seconds.

torch's import, the CUDA context and the input tensors come before the clock starts. Importing the
backend, making the schedule, compiling or loading kernels and the call itself are what it measures.
"""

import importlib
import json
import sys
import time
from contextlib import AbstractContextManager, nullcontext

import torch

from bench.compilations import Compilation, compilations
from bench.inputs import make_inputs
from bench.workloads import find


def wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def first_call(label: str, name: str, device: str) -> dict[str, object]:
    inputs = make_inputs(find(name), torch.device(device))
    wait(inputs.q)
    # Watching imports Triton, which is not a cost of other backends.
    watched: AbstractContextManager[list[Compilation]] = nullcontext([])
    if label.startswith("triton"):
        watched = compilations()
    begin = time.perf_counter()
    with watched as compiled:
        package = importlib.import_module("triton_fa")
        variants = importlib.import_module("bench.variants")
        try:
            with package.strict():
                variants.bind(variants.VARIANTS[label], inputs).call(inputs)
        except package.TritonFAError as error:
            return {"skipped": str(error)}
        wait(inputs.q)
    seconds = time.perf_counter() - begin
    return {"first_call_s": seconds, "compiled": compiled}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(first_call(*sys.argv[1:])) + "\n")
