"""Runs every kernel in CUDA C++ at ragged sizes, under compute-sanitizer: python -m tests.gpu.sanitized [--planted]

--planted reads out of bounds instead, to see that the sanitizer looks at these kernels at all.
"""

import sys
from itertools import product

import torch

from hsv_kernels import gather_patches, gather_tokens, masked_mse, random_masking, restore_tokens
from hsv_kernels.backends import OPERATIONS, BackendError

FINISHED = "every CUDA kernel ran"


def read_out_of_bounds() -> None:
    tokens = torch.randn(1, 4, 32, device="cuda")
    gather_tokens(tokens, torch.tensor([[1 << 30]], device="cuda"), backend="cuda")


def run_all() -> None:
    for (batch, rows), keep, dtype in product(((1, 1), (3, 5), (2, 17)), (1, 4), (torch.float32, torch.bfloat16)):
        patches = rows * 3
        ids, restore, mask = random_masking(
            batch, patches, num_keep=min(keep, patches), seed=1, device="cuda", backend="cuda"
        )
        images = torch.randn(batch, 3, 4 * rows, 4 * 3, dtype=dtype, device="cuda", requires_grad=True)
        tokens = torch.randn(batch, patches, 33, dtype=dtype, device="cuda", requires_grad=True)
        gather_patches(images, ids, 4, backend="cuda").sum().backward()
        kept = gather_tokens(tokens, ids, backend="cuda")
        kept.sum().backward()
        try:
            restore_tokens(
                kept.detach().requires_grad_(), restore, tokens[0, 0].detach(), backend="cuda"
            ).sum().backward()
        except BackendError as error:
            print(error)
        if "cuda" in OPERATIONS["reconstruction"]:
            pred = torch.randn(batch, patches, 48, dtype=dtype, device="cuda", requires_grad=True)
            masked_mse(pred, images.detach(), mask, 4, backend="cuda").backward()


if __name__ == "__main__":
    if "--planted" in sys.argv:
        read_out_of_bounds()
    else:
        run_all()
    torch.cuda.synchronize()
    print(FINISHED)
