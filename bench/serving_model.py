"""A language model of matrix products and the public functions, over one paged cache."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

Tensor = torch.Tensor
# q, k, v of one layer, (tokens, heads, head_dim), to its result like q.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    layers: int
    hidden: int
    inner: int
    heads_q: int
    heads_kv: int
    head_dim: int
    vocabulary: int
    dtype: torch.dtype

    @property
    def split(self) -> tuple[int, int, int]:
        """Columns of q, k and v."""
        kv = self.heads_kv * self.head_dim
        return self.heads_q * self.head_dim, kv, kv


class Model:
    """Random weights: RMS norms, rotary embedding, gated SiLU, as in Llama."""

    def __init__(self, shape: Shape, longest: int, device: str) -> None:
        self.shape = shape
        generator = torch.Generator(device).manual_seed(3)

        def weight(rows: int, columns: int) -> Tensor:
            drawn = torch.randn(rows, columns, generator=generator, device=device)
            return drawn.mul_(rows**-0.5).to(shape.dtype)

        wide = shape.heads_q * shape.head_dim
        self.embedding = weight(shape.vocabulary, shape.hidden) * shape.vocabulary**0.5
        self.head = weight(shape.hidden, shape.vocabulary)
        self.layers: list[tuple[Tensor, ...]] = [
            (
                weight(shape.hidden, sum(shape.split)),
                weight(wide, shape.hidden),
                weight(shape.hidden, 2 * shape.inner),
                weight(shape.inner, shape.hidden),
            )
            for _ in range(shape.layers)
        ]
        half = shape.head_dim // 2
        frequencies = 500000.0 ** -(torch.arange(half, device=device) / half)
        angles = torch.arange(longest, device=device)[:, None] * frequencies
        self.cos, self.sin = (f(angles).to(shape.dtype) for f in (torch.cos, torch.sin))

    def wider(self) -> "Model":
        """The same weights in float32, or in float64 if they are in float32."""
        dtype = torch.float64 if self.shape.dtype == torch.float32 else torch.float32
        model = copy.copy(self)
        model.shape = replace(self.shape, dtype=dtype)
        model.embedding, model.head = self.embedding.to(dtype), self.head.to(dtype)
        model.layers = [tuple(x.to(dtype) for x in layer) for layer in self.layers]
        model.cos, model.sin = self.cos.to(dtype), self.sin.to(dtype)
        return model

    def forward(self, tokens: Tensor, positions: Tensor, last: Tensor, attend: Attend) -> Tensor:
        """Logits behind the tokens number `last`: (rows, vocabulary).

        Args:
            tokens: (total,) int64.
            positions: (total,) int64.
            last: (rows,) int64 places among the tokens.
            attend: Stores keys and values, and attends.
        """
        x = self.embedding[tokens]
        cos, sin = (table[positions][:, None] for table in (self.cos, self.sin))
        for number, (into, out, up, down) in enumerate(self.layers):
            q, k, v = (
                part.unflatten(-1, (-1, self.shape.head_dim))
                for part in (self._norm(x) @ into).split(self.shape.split, -1)
            )
            result = attend(number, rotated(q, cos, sin), rotated(k, cos, sin), v)
            x = x + result.flatten(1) @ out
            gate, value = (self._norm(x) @ up).chunk(2, -1)
            x = x + (torch.nn.functional.silu(gate) * value) @ down
        return self._norm(x[last]) @ self.head

    def _norm(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, (self.shape.hidden,))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of halves."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
