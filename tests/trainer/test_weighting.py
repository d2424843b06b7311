"""Weights of several losses: fixed, learned, and from gradient norms."""

from pathlib import Path

import pytest
import torch
from trainer_cases import narrow_config, tiny_config

import hsv
from hsv.checkpoint import read_checkpoint
from hsv.config import WeightingConfig
from hsv.export import build_encoder
from hsv.objectives import OBJECTIVES, Objective, build_hybrid
from hsv.objectives.weighting import Weighting
from hsv.optim import adamw, learning_rate_factor, set_learning_rate

SIGNED_OR_DISTILLED = ("byol", "simsiam", "dino", "ibot")


@pytest.mark.parametrize("losses", [(0.3, 0.5), (0.05, 1.0), (9.0, 0.7)])
def test_learned_weights_reach_the_inverse_of_constant_losses(losses: tuple[float, float]) -> None:
    config = tiny_config("unused")
    module = torch.nn.Module()
    module.weighting = Weighting(dict.fromkeys("ab", Objective()), WeightingConfig())
    optimiser = adamw(module, config)
    for step in range(500):
        set_learning_rate(optimiser, learning_rate_factor(step, 500, 50))
        optimiser.zero_grad()
        module.weighting(torch.tensor(losses)).backward()
        optimiser.step()
    expected = (1 / torch.tensor(losses)).clamp(0.25, 4)
    torch.testing.assert_close(module.weighting.weights(), expected, rtol=0.1, atol=0)


def test_fixed_weights_and_the_weight_of_one() -> None:
    losses = torch.tensor([2.0, 3.0])
    fixed = Weighting(dict.fromkeys("ab", Objective()), WeightingConfig(kind="fixed", fixed={"b": 0.5}))
    assert fixed(losses).item() == 3.5 and not list(fixed.parameters())
    alone = Weighting({"a": Objective()}, WeightingConfig(fixed={"a": 7.0}))
    assert alone(losses[:1]).item() == 2.0 and not list(alone.parameters())


def test_a_loss_without_gradient_does_not_move_the_weights_of_the_others() -> None:
    weighting = Weighting(dict.fromkeys("abc", Objective()), WeightingConfig(kind="gradient_norm"))
    x = torch.ones(3, requires_grad=True)
    logs = weighting.measure([x.sum(), 0 * x.sum(), 2 * x.sum()], [x])
    torch.testing.assert_close(weighting.weights(), torch.tensor([2**0.5, 1.0, 0.5**0.5]))
    assert all(value.isfinite() for value in logs.values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_uncertainty_is_refused_for_losses_that_collapse_can_satisfy(name: str) -> None:
    def kind(asked: str) -> str:
        config = narrow_config("unused", [name, "mae" if name != "mae" else "simclr"])
        config.weighting.kind, config.input.mean, config.input.std = asked, [0.5], [0.25]
        return build_hybrid(config, build_encoder(config)).weighting.kind

    if name in SIGNED_OR_DISTILLED:
        with pytest.raises(ValueError, match=f"got 'uncertainty' with {name}, .*allowed: 'gradient_norm' or 'fixed'"):
            kind("uncertainty")
        assert kind("auto") == "gradient_norm"
    else:
        assert kind("auto") == kind("uncertainty") == "uncertainty"


@pytest.mark.parametrize(
    ("lengths", "weights"),
    [((1.0, 4.0), (2.0, 0.5)), ((1.0, 1e4), (4.0, 0.25)), ((3.0, 3.0, 3.0), (1.0, 1.0, 1.0))],
)
def test_gradient_norms_come_together_within_the_bounds(lengths: tuple[float, ...], weights: tuple[float, ...]) -> None:
    weighting = Weighting(dict.fromkeys("abc"[: len(lengths)], Objective()), WeightingConfig(kind="gradient_norm"))
    assert weighting.weights().tolist() == [1.0] * len(lengths)  # before the first measurement
    directions = torch.nn.functional.normalize(torch.randn(len(lengths), 9), dim=1)
    x = torch.zeros(9, requires_grad=True)
    losses = [length * (direction @ x) for length, direction in zip(lengths, directions, strict=True)]
    logs = weighting.measure(losses, [x])
    torch.testing.assert_close(weighting.weights(), torch.tensor(weights))
    torch.testing.assert_close(torch.stack([*logs.values()][: len(lengths)]), torch.tensor(lengths))
    torch.testing.assert_close(logs["gradient_cosine/a·b"], directions[0] @ directions[1])


def test_a_run_measures_gradients_and_saves_what_it_found(tmp_path: Path) -> None:
    config = narrow_config(tmp_path / "run", ["simclr", "dino", "mae"], steps=5)
    config.weighting.measure_every = 2
    hsv.pretrain(config)
    rows = hsv.monitor.read_metrics(tmp_path / "run/metrics.jsonl")
    measured = [row for row in rows if "gradient/dino" in row]
    assert [row["step"] for row in measured] == [1, 2, 4]
    cosines = [value for row in measured for key, value in row.items() if key.startswith("gradient_cosine/")]
    assert len(cosines) == 9 and all(-1 <= cosine <= 1 for cosine in cosines)
    assert all(0.25 <= row[f"weight/{name}"] <= 4 for row in rows for name in config.objectives)
    norms = torch.tensor([[row[f"gradient/{name}"] for name in config.objectives] for row in measured])
    expected = (norms[0].log() / 2 + norms[1].log() / 2) / 2 + norms[2].log() / 2
    model = read_checkpoint(tmp_path / "run")["model"]
    saved = torch.stack([model[f"weighting.log_norm_{name}"] for name in config.objectives])
    torch.testing.assert_close(saved, expected)


@pytest.mark.parametrize("kind", ["uncertainty", "gradient_norm"])
def test_weights_stay_with_their_objectives_in_another_order(tmp_path: Path, kind: str) -> None:
    config = narrow_config(tmp_path, ["simclr", "mae"], steps=6)
    config.weighting.kind, config.weighting.lr, config.weighting.measure_every = kind, 0.3, 6
    before = hsv.pretrain(config).metrics
    config.objectives.reverse()
    config.run.steps = 7
    after = hsv.pretrain(config, resume=True).metrics
    assert before["weight/simclr"] != pytest.approx(before["weight/mae"], rel=0.1)
    for name in config.objectives:
        assert after[f"weight/{name}"] == pytest.approx(before[f"weight/{name}"], rel=0.1)
