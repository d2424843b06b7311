"""Two and three processes on one machine give the values and, averaged as DDP does, the gradients of one process."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from hsv.models.heads import SyncBatchNorm
from hsv_kernels import KeyQueue, distributed, functional

WIDTH, ROWS = 6, 12
#: Rows of each rank: even, uneven, a rank without rows, a single image.
SIZES = [(4, 4), (5, 2), (0, 3), (1, 0), (3, 3, 3), (4, 1, 2), (3, 0, 2), (0, 0, 1)]


class Case:
    """Data of all ranks, the rows of one of them, and the parameters that the losses depend on."""

    def __init__(self, sizes: tuple[int, ...], rank: int | None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.sizes, self.rank = sizes, rank
        x = torch.randn(4, ROWS, WIDTH, generator=generator, dtype=torch.float64)
        self.weight = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
        self.temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        start = 0 if rank is None else sum(sizes[:rank])
        self.rows = slice(start, start + (sum(sizes) if rank is None else sizes[rank]))
        self.x0, self.x1, self.target, self.other = x[:, self.rows]

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The rows of all ranks by rank; those at hand, if these are one rank's."""
        return x.split(self.sizes) if self.rank is None else (x,)


def contrast(case: Case, negatives: str, backend: str = "reference") -> Tensor:
    z0, z1 = case.x0 @ case.weight, case.x1 @ case.weight
    if negatives == "local" and case.rank is None:
        pairs = zip(case.split(z0), case.split(z1), strict=True)
        losses = (functional.nt_xent(a, b, case.temperature, reduction="sum") for a, b in pairs if len(a))
        return sum(losses) / (2 * sum(case.sizes))
    counts = case.sizes if backend == "cpu" else None  # as known, and as exchanged
    return distributed.nt_xent(z0, z1, case.temperature, negatives=negatives, counts=counts, backend=backend)


def hard(case: Case, negatives: str) -> Tensor:
    """Logits up to ±1000, of which half of the positives are the least."""
    z0 = case.x0 @ case.weight
    return distributed.nt_xent(z0, torch.where(case.x1 > 0, -z0, z0), case.temperature / 300, negatives=negatives)


def single(case: Case, negatives: str) -> Tensor:
    """float32 on the kernels of the machine."""
    z0, z1 = ((x @ case.weight).float() for x in (case.x0, case.x1))
    return distributed.nt_xent(z0, z1, 0.2, negatives=negatives).double()


def reconstruction(case: Case) -> Tensor:
    pred = (case.x0 @ case.weight)[:, None, :4].expand(-1, 4, -1)  # [B, 4 patches, 4 pixels]
    images = case.x1[:, None, :4, None].expand(-1, 1, 4, 4).contiguous()
    mask = (case.target[:, :4] > 0.3).double()
    return distributed.masked_mse(pred.contiguous(), images, mask, 2)


def queries(case: Case, negatives: str, key_gradient: bool) -> Tensor:
    """MoCo v3's two orders of two views."""
    q, k = case.x0 @ case.weight, case.x1 @ case.weight.cos()
    options = {"temperature": case.temperature, "negatives": negatives, "key_gradient": key_gradient}
    if negatives == "local" and case.rank is None:
        pairs = zip(case.split(q), case.split(k), strict=True)
        losses = (
            functional.info_nce(a, b.detach(), temperature=case.temperature, reduction="sum")
            for a, b in pairs
            if len(a)
        )
        return sum(losses) / sum(case.sizes)
    return distributed.info_nce(q, k, **options)


def queued(case: Case) -> Tensor:
    """A queue that every rank fills with the keys of all, before this step's queries meet it and after."""
    torch.manual_seed(0)
    queue = KeyQueue(7, WIDTH, dtype=torch.float64)
    queue.push(distributed.all_gather_rows(case.target))
    loss = distributed.info_nce(case.x0 @ case.weight, case.x1, queue.keys, temperature=case.temperature, backend="cpu")
    queue.push(distributed.all_gather_rows(case.x1))
    return loss + queue.keys.cumsum(0).cos().sum() + queue.cursor


def cosine(case: Case) -> Tensor:
    return distributed.negative_cosine(case.x0 @ case.weight, case.x1)


def centred(case: Case) -> Tensor:
    """DINO's loss, and its centre in the value."""
    students = torch.stack([case.x0, case.x1, case.target]) @ case.weight
    loss, mean = distributed.distillation_loss(
        students, torch.stack([case.x1, case.other]), centre=case.weight[0].detach()
    )
    return loss + mean.cos().sum()


def weighted(case: Case, samples: bool) -> Tensor:
    """iBOT's: rows that count for a part of an image, on some ranks of fewer images than rows."""
    weights = case.other[:, 0].abs()
    images = len(weights) + sum(case.sizes[: case.rank]) if samples else None
    if samples and case.rank is None:
        images = sum(size + sum(case.sizes[:rank]) for rank, size in enumerate(case.sizes))
    return distributed.distillation_loss(case.x0 @ case.weight, case.x1, weights=weights, samples=images)[0]


def swapped(case: Case) -> Tensor:
    """SwAV: the assignments of one view, balanced over all ranks, are the targets of the other."""
    centre = distributed.sinkhorn_centre(case.x1, 0.05)
    loss, _ = distributed.distillation_loss(case.x0 @ case.weight, case.x1, teacher_temperature=0.05, centre=centre)
    return loss + (centre - centre.mean()).cos().sum()


def head(case: Case, affine: bool) -> Tensor:
    """A projector with batch normalisation over all ranks, whose weights are used twice."""
    norm = SyncBatchNorm(WIDTH, affine=affine)
    z0, z1 = ((torch.relu(norm(x @ case.weight)) @ case.weight.float()) for x in (case.x0, case.x1))
    return distributed.nt_xent(z0, z1, 0.5).double()


CHECKS: dict[str, Callable[[Case], Tensor]] = {
    **{f"nt_xent {name}": partial(contrast, negatives=name) for name in ("gather", "ring", "local")},
    **{f"nt_xent {name} cpu": partial(contrast, negatives=name, backend="cpu") for name in ("gather", "ring")},
    **{f"nt_xent {name} hard": partial(hard, negatives=name) for name in ("gather", "ring")},
    **{f"nt_xent {name} float32": partial(single, negatives=name) for name in ("gather", "ring")},
    **{
        f"info_nce {name}": partial(queries, negatives=name, key_gradient=False) for name in ("gather", "ring", "local")
    },
    **{f"info_nce {name} both": partial(queries, negatives=name, key_gradient=True) for name in ("gather", "ring")},
    "info_nce queue": queued,
    "negative_cosine": cosine,
    "distillation_loss": centred,
    "distillation_loss weights": partial(weighted, samples=False),
    "distillation_loss images": partial(weighted, samples=True),
    "sinkhorn_centre": swapped,
    "masked_mse": reconstruction,
    "head": partial(head, affine=True),
    "head without affine": partial(head, affine=False),
}


def gradients(check: Callable[[Case], Tensor], case: Case) -> tuple[Tensor, ...]:
    """Value, and gradients of the parameters: 0 where a loss does not depend on them."""
    loss = check(case)
    parameters = (case.weight, case.temperature)
    return loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each process found, by check and sizes. Three are started once, and two of them meet again."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, (str(folder),), nprocs=3)
    return [torch.load(folder / f"{rank}.pt") for rank in range(3)]


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    found = {}
    for world in (3, 2):
        if rank >= world:
            continue
        file = f"file://{folder}/rendezvous{world}"
        dist.init_process_group("gloo", file, timedelta(minutes=1), world, rank)
        for sizes in SIZES:
            if len(sizes) == world:
                for name, check in CHECKS.items():
                    if not skipped(name, sizes):
                        found[name, sizes] = gradients(check, Case(sizes, rank))
        found |= {
            (f.__name__, world): f(rank, world)
            for f in (batch_norm, statistics, gathered, saved_bytes, reduced, halves)
        }
        dist.barrier()
        dist.destroy_process_group()
    torch.save(found, f"{folder}/{rank}.pt")


def skipped(name: str, sizes: tuple[int, ...]) -> bool:
    """One process refuses the batch statistics of one row."""
    return name.startswith("head") and sum(sizes) == 1


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", CHECKS)
def test_ranks_give_what_one_process_does(ranks: list[dict], name: str, sizes: tuple[int, ...]) -> None:
    if skipped(name, sizes):
        return
    value, *expected = gradients(CHECKS[name], Case(sizes, None))
    found = [result[name, sizes] for result in ranks[: len(sizes)]]
    exact = "float32" not in name and "head" not in name
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if exact else {"rtol": 1e-4, "atol": 1e-5}
    for result in found:
        torch.testing.assert_close(result[0], value, **tolerance)
    for number, gradient in enumerate(expected, 1):
        averaged = sum(result[number] for result in found) / len(sizes)  # as DDP does
        torch.testing.assert_close(averaged, gradient, **tolerance)


def batch_norm(rank: int, world: int) -> dict[str, Tensor]:
    """One row over all ranks, the other ranks empty."""
    layer = SyncBatchNorm(WIDTH)
    nn.init.constant_(layer.bias, 0.5)
    x = torch.randn(1 if rank == 1 else 0, WIDTH, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    return {"y": y.detach(), "x": x.grad, "mean": layer.running_mean, "row": distributed.all_gather_rows(x.detach())}


@pytest.mark.parametrize("world", [2, 3])
def test_batch_norm_of_a_single_row(ranks: list[dict], world: int) -> None:
    for rank, result in enumerate(ranks[:world]):
        found = result["batch_norm", world]
        assert found["y"].eq(0.5).all() and len(found["y"]) == (rank == 1)
        assert found["x"].eq(0).all()
        torch.testing.assert_close(found["mean"], 0.1 * found["row"][0])


def statistics(rank: int, world: int) -> tuple[Tensor, Tensor]:
    """Running mean and variance after uneven batches."""
    layer = SyncBatchNorm(WIDTH)
    layer(Case((5, 2, 1)[:world], rank).x0)
    return layer.running_mean, layer.running_var


@pytest.mark.parametrize("world", [2, 3])
def test_running_statistics_are_those_of_all_rows(ranks: list[dict], world: int) -> None:
    layer = nn.BatchNorm1d(WIDTH)
    layer(Case((5, 2, 1)[:world], None).x0.float())
    for result in ranks[:world]:
        mean, variance = result["statistics", world]
        torch.testing.assert_close(mean, layer.running_mean)
        torch.testing.assert_close(variance, layer.running_var)


def gathered(rank: int, world: int) -> tuple[Tensor, ...]:
    """Rank r holds r + 1 rows of r + 1, and weights row j by j · (r + 1)."""
    x = torch.full((rank + 1, 1), float(rank + 1), requires_grad=True)
    every = distributed.all_gather_rows(x)
    (every * torch.arange(float(len(every)))[:, None] * (rank + 1)).sum().backward()
    mine = torch.tensor(rank + 1.0)
    return every.detach(), x.grad, distributed.all_reduce_sum(mine), distributed.rank_mean(mine, rank)


@pytest.mark.parametrize("world", [2, 3])
def test_gather_sum_and_mean(ranks: list[dict], world: int) -> None:
    every, gradients, sums, means = zip(*(result["gathered", world] for result in ranks[:world]), strict=True)
    expected = [rank + 1 for rank in range(world) for _ in range(rank + 1)]
    assert all(rows.flatten().tolist() == expected for rows in every)
    total = sum(range(1, world + 1))
    assert torch.cat(gradients).flatten().tolist() == [total * row for row in range(len(expected))]
    assert all(x == total for x in sums)
    mean = sum(rank * (rank + 1) for rank in range(world)) / sum(range(world))
    assert all(x == pytest.approx(mean) for x in means)


def test_one_process_pays_nothing() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert distributed.all_reduce_sum(x) is x and distributed.all_gather_rows(x) is x
    assert distributed.rank_mean(x, 3) is x


def saved_bytes(rank: int, world: int) -> dict[tuple[str, int], int]:
    """Bytes that rank 0 keeps for backward while the other ranks have 8 rows, and 64."""
    found = {}
    for negatives in ("ring", "gather"):
        for others in (8, 64):
            storages: dict[int, int] = {}

            def pack(x: Tensor, storages: dict[int, int] = storages) -> Tensor:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            z = torch.randn(8 if rank == 0 else others, 32, requires_grad=True)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                loss = distributed.nt_xent(z, z + 1, 0.2, negatives=negatives)
            found[negatives, others] = sum(storages.values())
            loss.backward()
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_ring_keeps_nothing_of_other_ranks(ranks: list[dict], world: int) -> None:
    found = ranks[0]["saved_bytes", world]
    assert found["ring", 8] == found["ring", 64]
    assert found["gather", 64] - found["gather", 8] >= (world - 1) * 2 * 56 * 32 * 4


def reduced(rank: int, world: int) -> Tensor:
    x = torch.tensor([-torch.inf, float(rank), 1000.0 if rank else -torch.inf, -torch.inf if rank else 3.0])
    return distributed.logsumexp_over_ranks(x)


@pytest.mark.parametrize("world", [2, 3])
def test_logsumexp_over_ranks(ranks: list[dict], world: int) -> None:
    numbers = torch.arange(float(world))
    expected = torch.stack(
        [
            torch.tensor(-torch.inf),
            numbers.logsumexp(0),
            torch.full((world - 1,), 1000.0).logsumexp(0),
            torch.tensor(3.0),
        ]
    )
    for result in ranks[:world]:
        torch.testing.assert_close(result["reduced", world], expected)


def halves(rank: int, world: int) -> list[Tensor]:
    """Losses of bfloat16 rows that rank 1 has and the others lack."""
    x = torch.randn(2, 3 if rank == 1 else 0, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    contrastive = [
        loss(*x, negatives=negatives)
        for loss in (distributed.nt_xent, distributed.info_nce)
        for negatives in ("gather", "ring", "local")
    ]
    return [*contrastive, distributed.negative_cosine(*x)]


@pytest.mark.parametrize("world", [2, 3])
def test_losses_of_half_rows_are_float32_and_equal_on_all_ranks(ranks: list[dict], world: int) -> None:
    expected = ranks[1]["halves", world]
    for result in ranks[:world]:
        found = result["halves", world]
        assert all(x.dtype == torch.float32 and x == y for x, y in zip(found, expected, strict=True))


def test_no_rows_anywhere() -> None:
    student, teacher = torch.zeros(1, 0, 5, requires_grad=True), torch.zeros(1, 0, 5)
    centre = distributed.sinkhorn_centre(teacher, 0.05)
    loss, mean = distributed.distillation_loss(student, teacher, centre=centre, weights=torch.zeros(0), samples=4)
    loss.backward()
    assert loss == 0 and mean.eq(0).all() and student.grad.shape == student.shape


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="negatives must be one of gather, ring, local; got 'all'"):
        distributed.nt_xent(torch.ones(2, 3), torch.ones(2, 3), negatives="all")


@pytest.mark.parametrize(
    ("helper", "name", "older"),
    [
        ("_gather_blocks", "all_gather_single", "all_gather_into_tensor"),
        ("_sum_blocks", "reduce_scatter_single", "reduce_scatter_tensor"),
    ],
)
def test_collectives_go_by_the_names_that_torch_has(
    helper: Callable, name: str, older: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    for each in (name, older):
        monkeypatch.setattr(dist, each, lambda *_, each=each: called.append(each), raising=False)
    call = partial(getattr(distributed.collectives, helper), torch.empty(2), torch.empty(2))
    call()
    monkeypatch.delattr(dist, name)
    call()
    assert called == [name, older]
