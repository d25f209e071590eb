"""How many launches a call makes on the GPU: the nodes of its CUDA graph, as the driver counts."""

import ctypes
from typing import Any

import torch

from bench.timing import Call


def graph_nodes(graph: int, driver: Any) -> int:
    """Kernels, memsets and copies in a captured graph, given by its address."""
    count = ctypes.c_size_t()
    status = driver.cuGraphGetNodes(ctypes.c_void_p(graph), None, ctypes.byref(count))
    assert status == 0, f"cuGraphGetNodes: {status}"
    return count.value


def launches(call: Call) -> int | None:
    """Of a call that ran before; None where there is no CUDA driver to ask."""
    if not torch.cuda.is_available() or torch.version.hip:
        return None
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        call()
    return graph_nodes(graph.raw_cuda_graph(), ctypes.CDLL("libcuda.so.1"))
