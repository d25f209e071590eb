"""What a chip does at most, as measured, and how near a row came to it."""

from dataclasses import dataclass

from bench.measure import Measurement


@dataclass(frozen=True, slots=True)
class Roof:
    """The rates above which no row is expected, and where these numbers come from."""

    tb_per_s: float
    tflop_per_s: float
    source: str

    def fraction(self, measurement: Measurement, us: float | None) -> float | None:
        """The larger of the two rates' shares; above 1 the row beat the constant."""
        terabytes, teraflops = measurement.terabytes(us), measurement.teraflops(us)
        if not terabytes or not teraflops:
            return None
        return max(terabytes / self.tb_per_s, teraflops / self.tflop_per_s)


# By the name that torch.cuda.get_device_name() gives.
ROOFS = {
    "NVIDIA H200": Roof(
        4.3,
        700,
        "floors of docs/log.md: bytes of K and V, and tensor cores alone at the power limit",
    ),
}
