"""lightly.loss: losses that are modules, with lightly's state."""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from hsv_kernels.compat.contrast import queue_losses, two_view_loss, unread_by_backward
from hsv_kernels.compat.cosine import mean_negative_cosine
from hsv_kernels.compat.distillation import distilled, moved
from hsv_kernels.compat.inference import recordable
from hsv_kernels.compat.shapes import require_shape
from hsv_kernels.distributed import all_gather_rows, mean_over_ranks, world_size
from hsv_kernels.distributed.collectives import no_rows
from hsv_kernels.functional import nt_xent
from hsv_kernels.queue import KeyQueue
from hsv_kernels.rows import unit_rows

__all__ = ["DINOLoss", "IBOTPatchLoss", "NTXentLoss", "NegativeCosineSimilarity"]


class NTXentLoss(nn.Module):
    """NT-Xent (SimCLR), or InfoNCE against a bank of keys (MoCo), the mean over the anchors.

    With a bank the loss goes one way, out0 against out1 and the keys of earlier steps, and out1 enters the bank if
    autograd records out0. The bank is `memory_bank`, a `KeyQueue` in the state dict; a state dict without one, as
    lightly's are, or with one of another size loads and leaves the bank as it is. The bank follows out0 to its device.

    Args:
        temperature: number of any sign, or a 0-dim tensor or parameter.
        memory_bank_size: (keys, dim), or 0 for no bank.
        gather_distributed: negatives of all ranks; with a bank, the keys of all ranks enter it.

    Raises:
        ValueError: |temperature| < 1e-8, an impossible size of the bank, torch without torch.distributed.
        TypeError: a size of the bank that is no integer.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        if abs(temperature) < 1e-8:
            raise ValueError(f"Illegal temperature: abs({temperature}) < 1e-8")
        if gather_distributed and not torch.distributed.is_available():
            raise ValueError("gather_distributed=True needs a torch with torch.distributed; got one without")
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        size = _bank_size(memory_bank_size)
        self.memory_bank = KeyQueue(*size, normalise=False) if size else None
        self.register_load_state_dict_pre_hook(_keep_bank)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of embeddings [N, D] and [N, D], normalised inside; with a bank one row out1 serves all of out0."""
        _check_two_views(out0, out1, self.memory_bank)
        gather = self.gather_distributed and world_size() > 1
        if self.memory_bank is not None:
            return self._against_bank(out0, out1, gather)
        if gather or isinstance(self.temperature, Tensor) or not 0 < self.temperature < torch.inf:
            return two_view_loss(out0, out1, self.temperature, gather)
        dtype = torch.promote_types(out0.dtype, out1.dtype)
        return nt_xent(*(recordable(x).to(dtype) for x in (out0, out1)), float(self.temperature))

    def _against_bank(self, out0: Tensor, out1: Tensor, gather: bool) -> Tensor:
        if self.memory_bank.keys.device != out0.device:
            with torch.inference_mode(False):  # buffers made in inference mode could not be pushed to outside it
                self.memory_bank.to(out0.device)
        q, k = unit_rows(out0), unit_rows(out1)
        losses = queue_losses(q, k.expand_as(q), unread_by_backward(self.memory_bank.keys), self.temperature)
        if q.requires_grad:
            self.memory_bank.push(all_gather_rows(k.detach()) if gather else k.detach())
        return mean_over_ranks(losses.sum(), len(losses)) if gather else losses.mean()


def _bank_size(size: int | Sequence[int]) -> tuple[int, ...]:
    """(keys, dim), or () for no bank."""
    sizes = (size,) if isinstance(size, int) else tuple(size)
    if any(x < 0 for x in sizes):
        raise ValueError(f"memory_bank_size must not be negative; got {size}")
    if isinstance(size, int) and size > 0:
        raise ValueError(f"memory_bank_size must be (keys, dim) or 0, since keys need a dimension; got {size}")
    if sizes != (0,) and len(sizes) != 2:
        raise ValueError(f"memory_bank_size must be (keys, dim) or 0; got {size}")
    if not all(isinstance(x, Integral) for x in sizes):
        raise TypeError(f"memory_bank_size must be of integers; got {size}")
    return sizes if sizes[0] else ()


def _keep_bank(module: NTXentLoss, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Puts the module's own bank in the place of one that is missing or does not fit, as lightly would load it."""
    mine = {} if module.memory_bank is None else dict(module.memory_bank.named_buffers())
    names = [f"{prefix}memory_bank.{name}" for name in ("keys", "cursor")]
    given = [state_dict.pop(name, None) for name in names]
    if [getattr(x, "shape", None) for x in given] != [x.shape for x in mine.values()]:
        given = mine.values()
    state_dict.update(zip(names, given, strict=False))


def _check_two_views(out0: Tensor, out1: Tensor, bank: KeyQueue | None) -> None:
    """Errors of the types that lightly's products and masks end in."""
    if out0.dim() != 2:
        raise ValueError(f"out0 must be [N, D]; got {list(out0.shape)}")
    if out1.dim() < 2:
        raise IndexError(f"out1 must be [N, D]; got {list(out1.shape)}")
    width = out0.shape[1] if bank is None else bank.keys.shape[1]
    if not len(out0) or out0.shape[1] != width or out1.shape[1:] != out0.shape[1:]:
        raise RuntimeError(
            f"out0 and out1 must be [N, {width}], N of 1 or more; got {list(out0.shape)} and {list(out1.shape)}"
        )
    if len(out1) != len(out0) and (bank is None or len(out1) != 1):
        error = IndexError if bank is None else RuntimeError
        raise error(f"out1 must have the {len(out0)} rows of out0; got {len(out1)}")


class NegativeCosineSimilarity(nn.Module):
    """The mean of −cos(x0, x1) along `dim`; both get a gradient. Shapes broadcast.

    Args:
        dim: along which vectors lie.
        eps: the least norm.
    """

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        return mean_negative_cosine(x0, x1, self.dim, self.eps)


class _Centre(nn.Module):
    """The moving average [1, K] of the teacher's logits, as the buffer `center`: the key of lightly's state dicts."""

    center: Tensor

    def __init__(self, size: int, mode: str, momentum: float) -> None:
        super().__init__()
        _check_mode(mode)
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, size))

    @property
    def value(self) -> Tensor:
        return self.center


def _check_mode(mode: str) -> None:
    if mode != "mean":
        raise ValueError(f"center_mode must be 'mean'; got {mode!r}")


class DINOLoss(nn.Module):
    """DINO's cross-entropy of each teacher's view with each other student's view, the mean over pairs and samples.

    The centre, a buffer `center` [1, 1, K], moves after the loss by the mean over all ranks' teacher logits. Across
    ranks the value is the mean over all ranks' samples.

    Args:
        output_dim: K.
        warmup_teacher_temp: temperature of epoch 0.
        teacher_temp: temperature from epoch warmup_teacher_temp_epochs on, and without an epoch.
        warmup_teacher_temp_epochs: epochs of a linear way from one to the other.
        student_temp: temperature of the student.
        center_momentum: weight of the centre's old value.
        center_mode: "mean", the only one.

    Raises:
        ValueError: another center_mode.
    """

    center: Tensor

    def __init__(
        self,
        output_dim: int = 65536,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_mode: str = "mean",
    ) -> None:
        super().__init__()
        _check_mode(center_mode)
        self.teacher_temp = teacher_temp
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.teacher_temp_schedule = torch.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs)
        self.register_buffer("center", torch.zeros(1, 1, output_dim))

    def forward(
        self,
        teacher_out: Sequence[Tensor],
        student_out: Sequence[Tensor],
        teacher_temp: float | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        """The loss of T and S views of logits [N, K], the first T of the student's being those of the teacher.

        Args:
            teacher_out: T tensors; they get no gradient.
            student_out: S tensors.
            teacher_temp: takes the place of both schedule and default.
            epoch: chooses from the schedule.

        Raises:
            ValueError: one view of each alone.
            RuntimeError: no view of one of them, or views of other shapes than each other's or the centre's.
        """
        _check_views(teacher_out, student_out, self.center.shape[-1])
        if teacher_temp is None:
            warming = epoch is not None and epoch < self.warmup_teacher_temp_epochs
            teacher_temp = self.teacher_temp_schedule[epoch] if warming else self.teacher_temp
        loss, mean = distilled(student_out, teacher_out, self.student_temp, teacher_temp, self.center)
        self.center = moved(self.center, mean, self.center_momentum, len(student_out[0]))
        return loss


def _check_views(teacher_out: Sequence[Tensor], student_out: Sequence[Tensor], width: int) -> None:
    """Views must be [N, K] of one N and the centre's K, and make a pair of two different ones."""
    counts = f"{len(teacher_out)} of the teacher and {len(student_out)} of the student"
    if not len(teacher_out) or not len(student_out):
        raise RuntimeError(f"teacher_out and student_out must hold a view each; got {counts}")
    if len(teacher_out) * len(student_out) == 1:
        raise ValueError(f"DINOLoss needs two different views, of a teacher and a student; got {counts}")
    for view in (*teacher_out, *student_out):
        require_shape("each view", view, (*student_out[0].shape[:1], width))


class IBOTPatchLoss(nn.Module):
    """iBOT's cross-entropy of masked patches: the mean over the masked patches of an image, then over images.

    The centre is the buffer `center.center` [1, K]; it moves after the loss by the mean over all ranks' masked patches,
    and in one process stays where nothing is masked. Across ranks the value is the mean over all ranks' images.

    Args:
        output_dim: K.
        teacher_temp, student_temp: temperatures.
        center_mode: "mean", the only one.
        center_momentum: weight of the centre's old value.

    Raises:
        ValueError: another center_mode.
    """

    def __init__(
        self,
        output_dim: int = 65536,
        teacher_temp: float = 0.04,
        student_temp: float = 0.1,
        center_mode: str = "mean",
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.teacher_temp = teacher_temp
        self.student_temp = student_temp
        self.center = _Centre(output_dim, center_mode, center_momentum)

    def forward(
        self, teacher_out: Tensor, student_out: Tensor, mask: Tensor, teacher_temp: float | None = None
    ) -> Tensor:
        """The loss of logits [M, K] of the M masked patches, in the order of `mask`.

        Args:
            teacher_out: [M, K]; no gradient.
            student_out: [M, K].
            mask: bool [B, H, W] with M entries True.
            teacher_temp: takes the place of the default.

        Raises:
            RuntimeError: a mask of other than M entries (on the CPU; on a GPU counting would wait for the device), or
                logits of other shapes than each other's or the centre's.
        """
        counts = mask.flatten(1).sum(1)
        rows = len(student_out)
        require_shape("student_out", student_out, (rows, self.center.value.shape[-1]))
        require_shape("teacher_out", teacher_out, student_out.shape)
        if mask.device.type == "cpu" and not torch.compiler.is_compiling() and counts.sum() != rows:
            raise RuntimeError(f"mask must be True {rows} times, once for each row of logits; got {counts.sum()}")
        if not rows and world_size() == 1:
            return no_rows(student_out, self.student_temp).to(torch.promote_types(student_out.dtype, torch.float32))
        row = torch.arange(rows, device=mask.device)
        image = torch.searchsorted(counts.cumsum(0), row, right=True).clamp_max(len(counts) - 1)
        loss, mean = distilled(
            [student_out],
            [teacher_out],
            self.student_temp,
            self.teacher_temp if teacher_temp is None else teacher_temp,
            self.center.value,
            weights=(1 / counts.clamp_min(1))[image],
            samples=len(mask),
        )
        self.center.center = moved(self.center.value, mean, self.center.momentum, rows)
        return loss
