"""Several processes on one machine give the loss, the gradient, the state and the weights of one."""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import Tensor
from trainer_cases import tiny_config

import hsv
from hsv.checkpoint import read_checkpoint
from hsv.export import build_encoder
from hsv.objectives import Hybrid, build_hybrid
from hsv.objectives.hybrid import OBJECTIVES
from hsv.schedules import Progress

#: Images of each of two or three ranks in each step: uneven batches, with ranks of a single image and of none.
STEPS = {2: ((7, 1), (0, 6)), 3: ((4, 0, 3), (1, 5, 2))}
#: How far gradients may be off, in shares of their norms. What a step's rounding moves the next one amplifies.
TOLERANCES = (1e-4, 2e-3)
#: Settings that differ from the tiny ones, by the name of the case; each objective has a case of its own name.
CASES: dict[str, tuple[str, dict[str, object]]] = {
    **{name: (name, {}) for name in OBJECTIVES},
    "simclr ring": ("simclr", {"negatives": "ring"}),
    "moco ring": ("moco", {"negatives": "ring"}),
    "moco v2": ("moco", {"version": "v2"}),
    "cpc ring": ("cpc", {"negatives": "ring"}),
    "can ring": ("can", {"negatives": "ring"}),
    "cmae ring": ("cmae", {"negatives": "ring"}),
    "dino sinkhorn": ("dino", {"centring": "sinkhorn"}),
    "moco as in its preset": ("moco", {"pool": "mean", "predictor": False, "projector_layers": 2}),
    "dino as in its preset": ("dino", {"pool": "mean", "centring": "sinkhorn", "batch_norm": True}),
    "ibot as in its preset": ("ibot", {"pool": "mean", "centring": "sinkhorn", "batch_norm": True}),
    "dae of drawn noise": ("dae", {"noise_drawn": True}),
    "byol and mae": ("byol+mae", {}),
}

#: `auto` must find the ranks on a machine without a GPU; on one with a GPU two ranks cannot share it.
DEVICE = "cpu" if torch.accelerator.is_available() else "auto"


def hybrid_for(case: str) -> Hybrid:
    """A tiny model of one objective or several, in training but without drop-path."""
    names, settings = CASES[case]
    config = tiny_config("unused")
    config.objectives, config.encoder.drop_path = names.split("+"), 0.0
    config.input.mean, config.input.std = [0.5], [0.25]
    narrow = {"hidden_dim": 16, "bottleneck_dim": 8, "out_dim": 12, "queue_size": 16, "num_locals": 1, "prototypes": 6}
    narrow |= {"decoder_dim": 32, "decoder_depth": 1, "feature_depth": 1, "vocabulary": 8}
    sections = [*(getattr(config, name) for name in config.objectives), config.run]
    assert all(any(hasattr(section, setting) for section in sections) for setting in settings)
    for setting, value in {**narrow, **settings}.items():
        for section in sections:
            if hasattr(section, setting):
                setattr(section, setting, value)
    torch.manual_seed(0)
    hybrid = build_hybrid(config, build_encoder(config))
    hybrid.prepare(lambda: iter(torch.randn(4, 1, 8, 8)))
    return hybrid


def train(case: str, world: int, rank: int | None) -> tuple[list[Tensor], list[dict[str, Tensor]], dict[str, Tensor]]:
    """Losses and averaged gradients of each step on one rank's images, or those of all, and the state afterwards."""
    hybrid = hybrid_for(case)
    losses, gradients = [], []
    for step, counts in enumerate(STEPS[world]):
        hybrid.start_step(Progress(step, len(STEPS[world]), 1))
        rows = slice(None) if rank is None else slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        views = [view[rows] for view in images(hybrid, sum(counts), step)]
        loss, _ = hybrid(views, step, None if rank is None else counts)
        hybrid.zero_grad()
        loss.backward()
        found = {name: p.grad for name, p in hybrid.named_parameters() if p.grad is not None}
        if rank is not None:
            for gradient in found.values():  # as DDP does
                dist.all_reduce(gradient)
                gradient /= len(counts)
        losses.append(loss.detach())
        gradients.append({name: gradient.clone() for name, gradient in found.items()})
        hybrid.before_update()
        torch.optim.SGD(hybrid.parameters(), 0.05).step()
        hybrid.after_update()
    return losses, gradients, hybrid.state_dict()


def images(hybrid: Hybrid, count: int, step: int) -> list[Tensor]:
    """Every view of the whole batch."""
    sides = [view.spec.size or hybrid.encoder.image_size[0] for view in hybrid.views]
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(count, 1, side, side, generator=generator) for side in sides]


@pytest.fixture(scope="module", params=STEPS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two or three processes found, by case; started once, as that takes the longest."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timedelta(minutes=1), world, rank)
    found = {case: train(case, world, rank) for case in CASES}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("case", CASES)
def test_an_objective_over_ranks_is_that_of_one_process(ranks: list[dict], case: str) -> None:
    losses, gradients, state = train(case, len(ranks), None)
    for result in ranks:
        found_losses, found_gradients, found_state = result[case]
        torch.testing.assert_close(found_losses, losses, rtol=1e-4, atol=1e-5)
        for found, expected, tolerance in zip(found_gradients, gradients, TOLERANCES, strict=True):
            assert found.keys() == expected.keys()
            whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
            for name, gradient in expected.items():
                error = (found[name] - gradient).norm()
                assert error <= tolerance * gradient.norm() + 1e-5 * whole, f"{name}: off by {error}"
        for name, value in state.items():
            torch.testing.assert_close(found_state[name], value, rtol=2e-3, atol=1e-4, msg=_named(name))
    for name, value in ranks[0][case][2].items():
        assert all(torch.equal(value, other[case][2][name]) for other in ranks[1:]), name


def _named(name: str) -> Callable[[str], str]:
    return lambda text: f"{name}: {text}"


def test_torchrun_trains_as_one_process_does(tmp_path: Path) -> None:
    """Two ranks of 32 images each take the steps of one of 64: same images, negatives, statistics and masks.

    Files that cannot be decoded leave the ranks with batches of different sizes.
    """
    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (65, 8, 8), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f"images/{number}.png")
    (tmp_path / "images/broken.png").write_bytes(b"not a picture")
    for name in ("one", "two"):
        config = tiny_config(tmp_path / name, steps=4, precision="fp32", device=DEVICE)
        config.data, config.input.mean, config.input.std = str(tmp_path / "images"), [0.5], [0.25]
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
    assert "all_gather" not in done.stderr and "reduce_scatter" not in done.stderr  # no names that torch warns of
    assert done.stdout.count("4 of 4 steps") == 1 and "left out    1 broken" in done.stdout
    one, two = (read_checkpoint(tmp_path / name)["model"] for name in ("one", "two"))
    for key in one:
        if key.endswith("qkv.bias"):
            # The bias of the keys adds the same to all scores of a row: its gradient is the rounding of 0, of which
            # AdamW makes whole steps.
            for model in (one, two):
                model[key].chunk(3)[1].zero_()
        torch.testing.assert_close(one[key], two[key], rtol=2e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
