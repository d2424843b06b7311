"""What the CPU kernels are held to, on two cores with AVX-512: times faster than another in the same rounds."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """hsv at least `times` as fast as `against`, and `times_huge` with huge pages for all providers."""

    operation: str
    shape: dict[str, int]
    products: str
    mode: str
    against: str
    times: float
    times_huge: float | None = None


def _targets() -> Iterator[Target]:
    def nt_xent(
        n: int, mode: str, eager: tuple, compiled: tuple, lightly: float | None, products: str = "float32"
    ) -> Iterator[Target]:
        yield Target("nt_xent", {"N": n}, products, mode, "eager", *eager)
        yield Target("nt_xent", {"N": n}, products, mode, "torch.compile", *compiled)
        if lightly:
            yield Target("nt_xent", {"N": n}, products, mode, "lightly", lightly)

    yield from nt_xent(4096, "both", (7.5, 5), (4.3, 3.8), 13)
    yield from nt_xent(4096, "forward", (12, 5.5), (6.5, 4.5), 27)
    yield from nt_xent(4096, "both", (11,), (4.2,), None, "bfloat16")
    for n in (256, 512, 1024):
        yield from nt_xent(n, "both", (3.2,), (2.4,), 5.5)
    for operation, shape, eager, compiled in (
        ("similarity_logsumexp", {"n": 256, "queue": 65536}, 6, 3),
        ("random_masking + gather_tokens", {"B": 64, "L": 196, "values": 768}, 4, 3.5),
        ("masked_mse", {"B": 64, "px": 224}, 20, 8),
    ):
        yield Target(operation, shape, "float32", "both", "eager", eager)
        yield Target(operation, shape, "float32", "both", "torch.compile", compiled)

    dino = {"N": 32, "crops": 10, "K": 65536}
    for against, times in (("eager", 8), ("torch.compile", 2.5), ("rewritten, compiled", 1.8)):
        yield Target("distillation_loss", dino, "float32", "both", against, times)


TARGETS = list(_targets())
EXTRA_MIB = 20  # at most, for nt_xent at N = 4,096, forward and backward
FRACTION = 0.88  # of the arithmetic limit at least, the exponentials counted, for the same
