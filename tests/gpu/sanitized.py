"""Runs every kernel in CUDA C++ at ragged sizes, under compute-sanitizer: python -m tests.gpu.sanitized [--planted]

--planted reads out of bounds instead, to see that the sanitizer looks at these kernels at all.
"""

import sys
from itertools import product

import torch
from torch import Tensor

from hsv_kernels import gather_patches, gather_tokens, masked_mse, random_masking, restore_tokens

FINISHED = "every CUDA kernel ran"


def read_out_of_bounds() -> None:
    tokens = torch.randn(1, 4, 32, device="cuda")
    gather_tokens(tokens, torch.tensor([[1 << 30]], device="cuda"), backend="cuda")


def run_all() -> None:
    """One patch to several blocks of them; channels side by side and alone; rows that allow wide accesses or do not."""
    shapes = ((1, 1), (3, 5), (2, 17))
    for (batch, rows), channels, dim, dtype in product(shapes, (1, 3), (33, 64), (torch.float32, torch.bfloat16)):
        patches, side = rows * 3, 8 if dim == 64 else 5
        keep = min(4, patches)
        ids, restore, mask = random_masking(batch, patches, num_keep=keep, seed=1, device="cuda", backend="cuda")

        images = normal(batch, channels, side * rows, side * 3, dtype=dtype)
        both_ways(gather_patches(images, ids, side, backend="cuda"))
        both_ways(gather_tokens(normal(batch, patches, dim, dtype=dtype), ids, backend="cuda"))
        tokens, token = normal(batch, keep, dim, dtype=dtype), normal(dim, dtype=dtype)
        both_ways(restore_tokens(tokens, restore, token, backend="cuda"))
        pred = normal(batch, patches, side * side * channels, dtype=dtype)
        both_ways(masked_mse(pred, images.detach(), mask, side, backend="cuda"))


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device="cuda", requires_grad=True)


def both_ways(value: Tensor) -> None:
    """Backward from a gradient in memory, and from the single number that a sum hands out."""
    value.backward(torch.randn_like(value), retain_graph=True)
    value.sum().backward()


if __name__ == "__main__":
    if "--planted" in sys.argv:
        read_out_of_bounds()
    else:
        run_all()
    torch.cuda.synchronize()
    print(FINISHED)
