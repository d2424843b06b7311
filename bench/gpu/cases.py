"""What `make gpu` times, in the order of what is wanted first. hsv takes its Triton kernels, or those in CUDA C++.

M = 2N rows of two views. The least work is that of one pass forward, each unordered pair of tiles once, and of one pass
backward that computes similarities again.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product

import torch
from torch import Tensor

from bench import bench_contrast as contrast
from bench import bench_cosine as cosine
from bench import bench_distillation as distillation
from bench import bench_masking as masking
from bench import bench_reconstruction as reconstruction
from bench import providers as p
from bench.bench_step import training_step
from bench.cases import DEVICE, QUICK, Case, Provider, Returned, Work
from bench.gpu import truth
from hsv_kernels import restore_tokens, use_backend
from hsv_kernels.backends import Backend
from hsv_kernels.ops.masking.reference import restore_tokens as eager_restore

BF16 = torch.bfloat16
DTYPE = {"bfloat16": BF16, "float32": torch.float32, "tf32": torch.float32}
L2_BYTES = 64 << 20  # an H200 has 50 MB, and inputs take four times this
SMALL = 8192  # rows up to which launches weigh enough to be timed without them too
KINDS = ("forward", "training")
SIZES = [64] if QUICK else [8192, 32768, 131072, 2048]
LARGEST = [] if QUICK else [1 << 20]
QUEUES = [(16, 256)] if QUICK else [(4096, 65536), (256, 65536)]
BATCHES = [2] if QUICK else [4096, 256]
DECODER_DIM = 512
VIEWS = [(2, 300)] if QUICK else [(32, 65_536), (256, 4096)]  # samples and classes
ROWS = [(8, 64)] if QUICK else [(512, 2048), (4096, 256)]


def on(backend: Backend, function: Callable[..., Returned]) -> Callable[..., Returned]:
    """`function` with hsv's operations on one backend: it raises where that cannot serve."""

    def run(*inputs: Tensor) -> Returned:
        with use_backend(backend):
            return function(*inputs)

    return run


def eager_providers(function: Callable[..., Tensor], products: str) -> dict[str, Provider]:
    """eager and torch.compile, under autocast for bfloat16."""
    low = products == "bfloat16"
    written, note = (p.autocast(function), "autocast") if low else (function, "")
    return {
        "eager": Provider(lambda: written, DTYPE[products], note),
        "torch.compile": Provider(p.compiled(written), DTYPE[products], note),
    }


def library(make: Callable[[], p.Loss], products: str, note: str = "") -> Provider:
    return Provider(lambda: p.autocast(make()) if products == "bfloat16" else make(), DTYPE[products], note)


def nt_xent_work(m: int, dim: int) -> dict[str, Work]:
    forward = Work(flops=m * m * dim, exponentials=m * m / 2)
    backward = Work(flops=4 * forward.flops, exponentials=2 * forward.exponentials)
    both = Work(forward.flops + backward.flops, forward.exponentials + backward.exponentials)
    return _graphs_too({"forward": forward, "backward": backward, "both": both})


def nt_xent_case(products: str, dim: int, m: int) -> Case:
    return Case(
        operation="nt_xent",
        shape={"M": m, "D": dim},
        products=products,
        inputs=partial(contrast.two_views, m // 2, dim=dim),
        providers={
            "hsv": Provider(lambda: on("triton", contrast.hsv_nt_xent), DTYPE[products]),
            **eager_providers(p.eager_nt_xent, products),
            "lightly": library(p.lightly_nt_xent, products),
            "linear_cross_entropy": library(p.chunked_nt_xent, products, "column i of row i is taken off afterwards"),
        },
        kinds=(*KINDS, "graph") if m <= SMALL else KINDS,
        work=nt_xent_work(m, dim),
        truth=truth.nt_xent,
    )


@contextmanager
def tiles_up_to(dim: int) -> Iterator[None]:
    """The gradient by tiles for rows of at most `dim` values, by the vendor's matrix product for wider ones."""
    from hsv_kernels.ops.contrast import triton_square_matmul

    before, triton_square_matmul.LARGEST_TILED_DIM = triton_square_matmul.LARGEST_TILED_DIM, dim
    try:
        yield
    finally:
        triton_square_matmul.LARGEST_TILED_DIM = before


def crossing_case(dim: int, m: int) -> Case:
    """Where chunks of rows through the vendor's matrix product overtake tiles."""
    make = lambda: on("triton", contrast.hsv_nt_xent)  # noqa: E731
    return Case(
        operation="nt_xent, ways of its gradient",
        shape={"M": m, "D": dim},
        products="bfloat16",
        inputs=partial(contrast.two_views, m // 2, dim=dim),
        providers={
            "hsv": Provider(make, BF16),
            "hsv, tiles": Provider(make, BF16, around=partial(tiles_up_to, dim)),
            "hsv, matrix product": Provider(make, BF16, around=partial(tiles_up_to, 0)),
        },
        kinds=("training",),
        work=nt_xent_work(m, dim),
        truth=truth.nt_xent,
    )


def largest_nt_xent_case(dim: int, m: int) -> Case:
    """More rows than float64 can follow in the time; tests/gpu compares some of them."""
    return Case(
        operation="nt_xent",
        shape={"M": m, "D": dim},
        products="bfloat16",
        inputs=partial(contrast.two_views, m // 2, dim=dim),
        providers={"hsv": Provider(lambda: on("triton", contrast.hsv_nt_xent), BF16, compared=False)},
        kinds=("training",),
        work=nt_xent_work(m, dim),
        seconds=20,
        rounds=(2, 5),
    )


def queue_case(n: int, m: int) -> Case:
    forward = Work(flops=2 * n * m * contrast.DIM, exponentials=n * m)
    both = Work(2 * forward.flops, forward.exponentials)  # Σ_j p_ij k_j comes out of the pass that gives the loss
    return Case(
        operation="similarity_logsumexp",
        shape={"n": n, "queue": m},
        products="bfloat16",
        inputs=partial(contrast.query_and_queue, n, m),
        providers={
            "hsv": Provider(lambda: on("triton", contrast.hsv_queue), BF16),
            **eager_providers(p.eager_queue, "bfloat16"),
        },
        kinds=(*KINDS, "graph"),
        work=_graphs_too({"forward": forward, "both": both}),
        truth=truth.queue,
    )


def masking_case(batch: int) -> Case:
    work = masking.masking_work(batch, 2)
    fused = masking.hsv(masking.hsv_patches)
    return Case(
        operation="random_masking + gather_patches",
        shape={"B": batch, "px": masking.SIDE},
        products="bfloat16",
        inputs=partial(masking.images, batch),
        providers={
            "hsv": Provider(lambda: on("triton", fused()), BF16),
            "hsv, CUDA C++": Provider(lambda: on("cuda", fused()), BF16),
            "eager": Provider(lambda: masking.eager_patches, BF16, compared=False),
            "torch.compile": Provider(p.compiled(masking.eager_patches), BF16, compared=False),
        },
        kinds=(*KINDS, "graph"),
        work=_graphs_too(work),
        sets=_sets(work["forward"].bytes),
        truth=truth.gather_patches,
    )


def visible_tokens(batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A quarter of the tokens of each image, ids_restore, and the mask token."""
    tokens = torch.randn(batch, masking.K, DECODER_DIM, dtype=dtype, device=DEVICE, requires_grad=True)
    ids_restore = torch.rand(batch, masking.L, device=DEVICE).argsort(1)
    return tokens, ids_restore, torch.randn(DECODER_DIM, dtype=dtype, device=DEVICE, requires_grad=True)


def restore_case(batch: int) -> Case:
    size = 2 * DECODER_DIM * batch * (masking.K + masking.L)  # kept rows and all of them, one side read, one written
    work = {"forward": Work(bytes=size), "backward": Work(bytes=size), "both": Work(bytes=2 * size)}
    return Case(
        operation="restore_tokens",
        shape={"B": batch, "D": DECODER_DIM},
        products="bfloat16",
        inputs=partial(visible_tokens, batch),
        providers={
            "hsv": Provider(lambda: on("triton", restore_tokens), BF16),
            "hsv, CUDA C++": Provider(lambda: on("cuda", restore_tokens), BF16),
            "eager": Provider(lambda: eager_restore, BF16),
            "torch.compile": Provider(p.compiled(eager_restore), BF16),
        },
        kinds=(*KINDS, "graph"),
        work=_graphs_too(work),
        sets=_sets(size),
        truth=truth.restore_tokens,
    )


def reconstruction_case(batch: int) -> Case:
    work = reconstruction.reconstruction_work(batch, 2)
    return Case(
        operation="masked_mse",
        shape={"B": batch, "px": reconstruction.SIDE},
        products="bfloat16",
        inputs=partial(reconstruction.inputs, batch),
        providers={
            "hsv": Provider(lambda: on("triton", reconstruction.hsv), BF16),
            "hsv, CUDA C++": Provider(lambda: on("cuda", reconstruction.hsv), BF16),
            "eager": Provider(lambda: reconstruction.eager, BF16),
            "torch.compile": Provider(p.compiled(reconstruction.eager), BF16),
        },
        kinds=(*KINDS, "graph"),
        work=_graphs_too(work),
        sets=_sets(work["forward"].bytes),
        truth=truth.masked_mse,
    )


def distillation_case(n: int, classes: int) -> Case:
    work = distillation.views_work(n, classes, 2)
    return Case(
        operation="distillation_loss",
        shape={"N": n, "crops": distillation.CROPS, "K": classes},
        products="bfloat16",
        inputs=partial(distillation.inputs, n, classes),
        providers={
            "hsv": Provider(lambda: on("triton", distillation.hsv), BF16),
            "eager": Provider(lambda: distillation.eager, BF16),
            "torch.compile": Provider(p.compiled(distillation.eager), BF16),
        },
        kinds=(*KINDS, "graph"),
        work=_graphs_too(work),
        sets=_sets(work["forward"].bytes),
        truth=truth.distillation_loss,
    )


def sinkhorn_case(n: int, classes: int) -> Case:
    """Columns three times and rows twice, each a pass over the logits."""
    views = distillation.GLOBAL
    size = 2 * n * classes * views
    return Case(
        operation="sinkhorn_centre",
        shape={"N": n, "views": views, "K": classes},
        products="bfloat16",
        inputs=lambda dtype: distillation.sinkhorn_inputs(views, n, classes, dtype=dtype),
        providers={
            "hsv": Provider(lambda: on("triton", distillation.hsv_sinkhorn), BF16),
            "eager": Provider(lambda: distillation.eager_sinkhorn, BF16),
            "torch.compile": Provider(p.compiled(distillation.eager_sinkhorn), BF16),
        },
        kinds=("forward",),
        work={"forward": Work(bytes=5 * size)},
        sets=_sets(size),
    )


def cosine_case(n: int, dim: int) -> Case:
    size = 2 * n * dim
    work = {"forward": Work(bytes=2 * size), "backward": Work(bytes=3 * size), "both": Work(bytes=5 * size)}
    return Case(
        operation="negative_cosine",
        shape={"N": n, "D": dim},
        products="bfloat16",
        inputs=partial(cosine.inputs, n, dim),
        providers={
            "hsv": Provider(lambda: on("triton", cosine.hsv), BF16),
            "eager": Provider(lambda: cosine.eager, BF16),
            "torch.compile": Provider(p.compiled(cosine.eager), BF16),
        },
        kinds=(*KINDS, "graph"),
        work=_graphs_too(work),
        sets=_sets(2 * size),
        truth=truth.negative_cosine,
    )


def step_case(objectives: tuple[str, ...], batch: int) -> Case:
    model = "vit-tiny/16" if QUICK else "vit-small/16"
    step = partial(training_step, model, batch=batch, objectives=objectives)
    return Case(
        operation=f"training step of {model}: {' + '.join(objectives)}",
        shape={"B": batch, "px": 224},
        products="bfloat16",
        inputs=lambda dtype: (),
        providers={
            "hsv": Provider(lambda: step("triton"), compared=False),
            "eager": Provider(lambda: step("reference"), note="the operations' references"),
        },
        kinds=("step",),
        seconds=40,
        rounds=(5, 31),
    )


def _graphs_too(work: dict[str, Work]) -> dict[str, Work]:
    return work | {f"{mode}, graph": work[mode] for mode in ("forward", "both")}


def _sets(touched: float) -> int:
    """Sets of inputs that together are several times the cache, eight at most."""
    return 1 if QUICK else min(8, math.ceil(4 * L2_BYTES / touched))


def contrast_cases(full: bool) -> list[Case]:
    dims = [16] if QUICK else [128, 256]
    cases = [nt_xent_case("bfloat16", dim, m) for dim, m in product(dims, SIZES)]
    cases += [queue_case(*sizes) for sizes in QUEUES]
    cases += [largest_nt_xent_case(128, m) for m in LARGEST]
    if full:
        cases += [nt_xent_case("bfloat16", dim, m) for dim, m in product((64, 512, 1024), SIZES)]
        cases += [crossing_case(dim, m) for dim, m in product((128, 256, 512, 1024), SIZES)]
        cases += [nt_xent_case(*what) for what in product(("float32", "tf32"), (128, 64, 256, 512, 1024), SIZES)]
    return cases


def memory_bound_cases(full: bool) -> list[Case]:
    cases = [case(batch) for batch in BATCHES for case in (masking_case, restore_case, reconstruction_case)]
    cases += [case(*sizes) for sizes in VIEWS for case in (distillation_case, sinkhorn_case)]
    return cases + [cosine_case(*sizes) for sizes in ROWS]


def end_to_end_cases(full: bool) -> list[Case]:
    every = (("simclr", "mae"), ("simclr",), ("mae",))
    return [step_case(objectives, 2 if QUICK else 256) for objectives in every]


PARTS: dict[str, Callable[[bool], list[Case]]] = {
    "contrast": contrast_cases,
    "memory-bound": memory_bound_cases,
    "end-to-end": end_to_end_cases,
}
