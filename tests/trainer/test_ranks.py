"""Two processes on one machine give the gradient, the statistics and the weights of one."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from trainer_cases import tiny_config

import hsv
from hsv.checkpoint import read_checkpoint
from hsv.models.heads import SyncBatchNorm
from hsv_kernels import functional
from hsv_kernels.distributed import all_gather_rows, all_reduce_sum, nt_xent, rank_mean

WIDTH = 6


SIZES = ((4, 4), (5, 2), (3, 0))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of two processes computed, by the name of the check; started once, as that takes the longest."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in (0, 1)]


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {sizes: contrast(rank, sizes) for sizes in SIZES}
    results |= {"batch norm": normalised(rank, (5, 3)), "gather": gathered(rank)}
    torch.save(results, f"{folder}/result{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def rows(sizes: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(sum(sizes), WIDTH, generator=generator) for _ in range(2))
    return x0, x1, torch.randn(WIDTH, WIDTH, generator=generator)


def contrast(rank: int, sizes: tuple[int, int]) -> tuple[float, torch.Tensor]:
    x0, x1, weight = rows(sizes)
    mine = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
    weight.requires_grad_()
    loss = nt_xent(x0[mine] @ weight, x1[mine] @ weight, 0.2, backend="reference")
    loss.backward()
    return loss.item(), weight.grad


@pytest.mark.parametrize("sizes", SIZES)
def test_contrast_across_ranks(ranks, sizes):
    x0, x1, weight = rows(sizes)
    weight.requires_grad_()
    loss = functional.nt_xent(x0 @ weight, x1 @ weight, 0.2, backend="reference")
    loss.backward()
    results = [result[sizes] for result in ranks]
    for value, _ in results:
        assert value == pytest.approx(loss.item(), rel=1e-6)
    averaged = (results[0][1] + results[1][1]) / 2  # as DDP does
    torch.testing.assert_close(averaged, weight.grad, rtol=1e-5, atol=1e-7)


def normalised(rank: int, sizes: tuple[int, int]) -> dict[str, torch.Tensor]:
    x, upstream, _ = rows(sizes)
    mine = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
    layer = SyncBatchNorm(WIDTH)
    x = x[mine].clone().requires_grad_()
    y = layer(x)
    (y * upstream[mine]).sum().backward()
    return {
        "y": y.detach(),
        "x": x.grad,
        "weight": layer.weight.grad,
        "mean": layer.running_mean,
        "var": layer.running_var,
    }


def test_batch_norm_across_ranks_is_that_of_all_rows(ranks):
    x, upstream, _ = rows((5, 3))
    layer = torch.nn.BatchNorm1d(WIDTH)
    x.requires_grad_()
    y = layer(x)
    (y * upstream).sum().backward()
    a, b = (result["batch norm"] for result in ranks)
    torch.testing.assert_close(torch.cat([a["y"], b["y"]]), y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([a["x"], b["x"]]), x.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(a["weight"] + b["weight"], layer.weight.grad, rtol=1e-5, atol=1e-6)
    for result in (a, b):
        torch.testing.assert_close(result["mean"], layer.running_mean)
        torch.testing.assert_close(result["var"], layer.running_var)


def gathered(rank: int) -> tuple[torch.Tensor, ...]:
    x = torch.full((2 + rank, 1), float(rank + 1), requires_grad=True)
    every = all_gather_rows(x)
    (every * torch.arange(5.0)[:, None] * (rank + 1)).sum().backward()
    return (
        every.detach(),
        x.grad,
        all_reduce_sum(torch.tensor(rank + 1.0)),
        rank_mean(torch.tensor(rank + 1.0), 1 + 2 * rank),
    )


def test_gather_and_mean(ranks):
    (a, grad_a, sum_a, mean_a), (b, grad_b, sum_b, mean_b) = (result["gather"] for result in ranks)
    assert torch.equal(a, b) and a.flatten().tolist() == [1, 1, 2, 2, 2]
    assert grad_a.flatten().tolist() == [0, 3] and grad_b.flatten().tolist() == [6, 9, 12]
    assert sum_a == sum_b == 3
    assert (mean_a + mean_b) / 2 == pytest.approx((1 * 1 + 2 * 3) / 4)


def test_one_process_pays_nothing():
    x = torch.randn(3, 2, requires_grad=True)
    assert all_reduce_sum(x) is x and all_gather_rows(x) is x and rank_mean(x, 3) is x


def test_torchrun_trains_as_one_process_does(tmp_path):
    """Two ranks of 32 images each take the steps of one of 64: same images, negatives, statistics and masks."""
    for name in ("one", "two"):
        config = tiny_config(tmp_path / name, steps=4, precision="fp32", device="cpu")
        config.encoder.drop_path = 0.0
        config.simclr.view = config.mae.own_view  # colours are drawn anew on each rank
        config.save(tmp_path / f"{name}.yaml")
    hsv.pretrain(hsv.load_config(tmp_path / "one.yaml"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "hsv"]
    command += ["pretrain", "--config", str(tmp_path / "two.yaml")]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 of 4 steps") == 1
    one, two = (read_checkpoint(tmp_path / name)["model"] for name in ("one", "two"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=2e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
