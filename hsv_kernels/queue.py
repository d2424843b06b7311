"""A ring buffer of keys that are trained against long after their batch (MoCo; He et al., 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsv_kernels.checks import FLOATS, check_integer
from hsv_kernels.rows import unit_rows

__all__ = ["KeyQueue"]


class KeyQueue(nn.Module):
    """The last `size` keys that were pushed, [size, dim], as buffers that are saved with the model.

        loss = info_nce(q, k, queue.keys)
        queue.push(k)

    The rows begin as random unit rows of torch's generator and are negatives from the first step on, as in MoCo. A push
    may come between the forward and the backward of `info_nce`: it changes no gradient.

    Under torch.distributed every rank must push the same rows, those of all ranks (`distributed.all_gather_rows`), and
    begin with the same ones: DDP sends rank 0's buffers to all; elsewhere seed alike.

    Args:
        size: rows kept.
        dim: of a row.
        normalise: push unit rows x / max(‖x‖, 1e-12); False pushes rows as they are.
        dtype: of the rows: float32, float64, bfloat16 (half the memory and traffic, products in bfloat16) or float16.
        device: where the buffers begin.

    Attributes:
        keys: [size, dim].
        cursor: int64, rows pushed so far; the next one goes to row cursor mod size.

    Raises:
        ValueError: size or dim below 1, another dtype.
    """

    keys: Tensor
    cursor: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        normalise: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            check_integer(name, value)
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if dtype not in FLOATS:
            raise ValueError(f"dtype must be float32, float64, bfloat16 or float16; got {dtype}")
        self.normalise = normalise
        self.register_buffer("keys", F.normalize(torch.randn(size, dim, device=device)).to(dtype))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64, device=device))

    @property
    def filled(self) -> int:
        """Rows that were pushed and are still there, 0 … size; on a GPU this waits for the device."""
        return min(int(self.cursor), len(self.keys))

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Writes the rows over the oldest ones, in place and without waiting for the device.

        Args:
            keys: [B, dim] of any floating dtype, B ≥ 0; of more than `size` rows the last ones stay.

        Raises:
            ValueError: rows of another width, dtype or device.
        """
        size, dim = self.keys.shape
        if not isinstance(keys, Tensor) or keys.dim() != 2 or keys.shape[1] != dim or not keys.is_floating_point():
            given = f"{keys.dtype} {list(keys.shape)}" if isinstance(keys, Tensor) else type(keys).__name__
            raise ValueError(f"keys must be floating rows [B, {dim}]; got {given}")
        if keys.device != self.keys.device:
            raise ValueError(f"keys must be on {self.keys.device}, where the queue is; got {keys.device}")
        last, dtype = keys[-size:], self.keys.dtype
        self.cursor += len(keys)
        rows = self.cursor + torch.arange(-len(last), 0, device=keys.device)
        self.keys.index_copy_(0, rows.remainder_(size), unit_rows(last, dtype) if self.normalise else last.to(dtype))

    def extra_repr(self) -> str:
        size, dim = self.keys.shape
        return f"size={size}, dim={dim}, normalise={self.normalise}, dtype={self.keys.dtype}"
