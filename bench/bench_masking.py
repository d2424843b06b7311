"""Random masking and gather of the kept quarter, of tokens and of images, against MAE's two argsorts and a gather."""

from collections.abc import Callable
from functools import partial
from itertools import count

import torch
from torch import Tensor

from bench.cases import DEVICE, QUICK, Case, Provider, Work
from bench.providers import compiled
from hsv_kernels import gather_patches, gather_tokens, random_masking
from hsv_kernels.ops.masking.reference import patchify

Masked = tuple[Tensor, Tensor, Tensor]  # kept rows [B, K, values], ids_restore [B, L], mask [B, L]

BATCH = 2 if QUICK else 64
SIDE, PATCH, CHANNELS = 224, 16, 3
L = (SIDE // PATCH) ** 2
K, VALUES = L // 4, PATCH * PATCH * CHANNELS


def eager_tokens(tokens: Tensor) -> Masked:
    """Kept tokens by the order of random numbers, with ids_restore and the mask that MAE's decoder and loss need."""
    B, _, D = tokens.shape
    order = torch.rand(B, L, device=tokens.device).argsort(dim=1)
    ids_restore = order.argsort(dim=1)
    mask = torch.ones_like(ids_restore, dtype=torch.float32)
    mask[:, :K] = 0
    kept = tokens.gather(1, order[:, :K, None].expand(-1, -1, D))
    return kept, ids_restore, mask.gather(1, ids_restore)


def eager_patches(images: Tensor) -> Masked:
    return eager_tokens(patchify(images, PATCH, PATCH))


def hsv(gather: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Callable[[Tensor], Masked]]:
    def make() -> Callable[[Tensor], Masked]:
        steps = count()

        def run(x: Tensor) -> Masked:
            ids_keep, *others = random_masking(len(x), L, num_keep=K, seed=0, offset=next(steps), device=x.device)
            return gather(x, ids_keep), *others

        return run

    return make


def hsv_patches(images: Tensor, ids_keep: Tensor) -> Tensor:
    return gather_patches(images, ids_keep, PATCH)


def tokens(batch: int, dtype: torch.dtype) -> tuple[Tensor]:
    return (torch.randn(batch, L, VALUES, dtype=dtype, device=DEVICE, requires_grad=True),)


def images(batch: int, dtype: torch.dtype) -> tuple[Tensor]:
    return (torch.randn(batch, CHANNELS, SIDE, SIDE, dtype=dtype, device=DEVICE, requires_grad=True),)


def masking_work(batch: int, size: int) -> dict[str, Work]:
    """Forward reads and writes what is kept; backward reads it, and writes it with zeros between; `size` bytes each."""
    kept, whole = 1.0 * size * batch * K * VALUES, 1.0 * size * batch * L * VALUES
    forward, backward = 2 * kept, kept + whole
    return {"forward": Work(bytes=forward), "backward": Work(bytes=backward), "both": Work(bytes=forward + backward)}


def masking_case(operation: str, inputs: Callable, fused: Callable, eager: Callable) -> Case:
    return Case(
        operation=operation,
        shape={"B": BATCH, "L": L, "values": VALUES},
        products="float32",
        inputs=partial(inputs, BATCH),
        providers={
            "hsv": Provider(hsv(fused), compared=False),
            "eager": Provider(lambda: eager),
            "torch.compile": Provider(compiled(eager), compared=False),
        },
        work=masking_work(BATCH, 4),
        seconds=5,
    )


CASES = [
    masking_case("random_masking + gather_tokens", tokens, gather_tokens, eager_tokens),
    masking_case("random_masking + gather_patches", images, hsv_patches, eager_patches),
]


def test_speed(case: Case, mode: str, provider: str, record: Callable[[Case, str, str], None]) -> None:
    record(case, mode, provider)
