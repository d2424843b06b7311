"""The regression of BYOL and SimSiam."""

from torch import Tensor

from hsv_kernels.backends import Backend, resolve
from hsv_kernels.checks import REDUCTIONS, check_choice, check_rows, check_scalar
from hsv_kernels.ops.cosine import function as cosine

__all__ = ["negative_cosine"]


def negative_cosine(
    p: Tensor,
    z: Tensor,
    *,
    reduction: str = "mean",
    eps: float = 1e-8,
    backend: Backend | None = None,
) -> Tensor:
    """Negative cosine of predictions and targets, the loss of SimSiam (Chen & He, 2021) and BYOL (Grill et al., 2020).

        loss_i = −⟨p_i, z_i⟩ / (max(‖p_i‖, eps) · max(‖z_i‖, eps))

    SimSiam averages it over both orders of the views; BYOL's regression is 2 + 2 · loss. Both tensors get a gradient:
    the stop-gradient is the caller's `z.detach()`. Below eps a norm is the constant eps, in value and in gradient; a
    row p_i = 0 has loss 0 and the gradient −z_i / (eps · ‖z_i‖). Values are those of torch's cosine_similarity; its
    gradient differs for rows of 0 < ‖row‖ < eps, where it is not that of the value.

    Args:
        p, z: [N, D] of one dtype, float32, float64, bfloat16 or float16, and of any strides.
        reduction: "mean" over the rows, "sum", or "none" for [N] values.
        eps: the least norm, positive.
        backend: "auto", "reference", "cpu" or "triton"; None follows `use_backend`.

    Returns:
        float64 for float64 rows, float32 otherwise.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an empty batch, an eps out of range.
        BackendError: a named backend that cannot serve the call.
    """
    check_rows("p", p, "z", z)
    if isinstance(eps, Tensor):
        raise ValueError(f"eps must be a number; got a tensor of shape {list(eps.shape)}")
    check_scalar("eps", eps, p, positive=True)
    check_choice("reduction", reduction, REDUCTIONS)
    return cosine.negative_cosine(p, z, float(eps), reduction, backend=resolve("cosine", p, backend))
