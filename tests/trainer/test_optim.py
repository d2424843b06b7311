"""Parameter groups and schedule."""

from pathlib import Path

import pytest
import torch
from trainer_cases import narrow_config, tiny_config

from hsv.checkpoint import read_checkpoint, restore, save_checkpoint
from hsv.config import Config
from hsv.export import build_encoder
from hsv.objectives import Hybrid, build_hybrid
from hsv.optim import adamw, clipped_parameters, learning_rate_factor, set_learning_rate


def model_and_optimiser() -> tuple[Hybrid, torch.optim.Optimizer]:
    config = tiny_config("unused", batch_size=512)
    config.input.mean, config.input.std = [0.5], [0.25]
    config.optimiser.base_lr = 1e-3
    hybrid = build_hybrid(config, build_encoder(config))
    return hybrid, adamw(hybrid, config)


def test_every_parameter_is_in_the_group_where_it_belongs() -> None:
    hybrid, optimiser = model_and_optimiser()
    names = {id(parameter): name for name, parameter in hybrid.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimiser.param_groups]
    assert sorted(name for group in groups for name in group) == sorted(names.values())
    decayed, plain, weighting = groups
    assert sorted(weighting) == ["weighting.u.mae", "weighting.u.simclr"]
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    expected = ("encoder.vit.pos_embed", "encoder.vit.cls_token", "objectives.mae.decoder.mask_token")
    assert set(expected) <= set(plain) and "objectives.mae.decoder.pos_embed" in plain
    assert [group["weight_decay"] for group in optimiser.param_groups] == [0.05, 0, 0]
    assert [group["base_lr"] for group in optimiser.param_groups] == [2e-3, 2e-3, 1e-2]
    assert all(group["betas"] == (0.9, 0.95) for group in optimiser.param_groups)
    assert set(hybrid.weighting.u.values()).isdisjoint(clipped_parameters(optimiser))


def predicting(
    byol: float = 1.0, simsiam: float = 1.0, **objectives_of: list[str]
) -> tuple[Config, Hybrid, torch.optim.Optimizer]:
    """BYOL beside SimSiam, whose predictors' learning rates are scaled."""
    config = narrow_config("unused", objectives_of.get("objectives", ["byol", "simsiam"]), batch_size=512)
    config.input.mean, config.input.std = [0.5], [0.25]
    config.optimiser.base_lr, config.weighting.kind = 1e-3, "fixed"
    config.byol.predictor_lr_scale, config.simsiam.predictor_lr_scale = byol, simsiam
    hybrid = build_hybrid(config, build_encoder(config))
    return config, hybrid, adamw(hybrid, config)


def test_predictors_learn_at_a_scaled_rate() -> None:
    _, hybrid, optimiser = predicting(10.0, 4.0)
    rates = {id(p): group["base_lr"] for group in optimiser.param_groups for p in group["params"]}
    trained = {name: p for name, p in hybrid.named_parameters() if p.requires_grad}
    assert set(rates) == {id(p) for p in trained.values()} and any(".predictor." in name for name in trained)
    for name, parameter in trained.items():
        scale = (10 if "byol" in name else 4) if ".predictor." in name else 1
        assert rates[id(parameter)] == pytest.approx(scale * 2e-3), name


@pytest.mark.parametrize("changes", [{"byol": 10.0}, {"objectives": ["simsiam", "byol"]}, {}])
def test_moments_are_found_again_by_name(tmp_path: Path, changes: dict) -> None:
    """Whatever the groups and their order."""
    config, hybrid, optimiser = predicting(3.0, 3.0)
    for index, parameter in enumerate(p for group in optimiser.param_groups for p in group["params"]):
        parameter.grad = torch.full_like(parameter, index + 1.0)
    optimiser.step()
    save_checkpoint(tmp_path, 1, hybrid, optimiser, config, keep=1)
    expected = {name: optimiser.state[p]["exp_avg"] for name, p in hybrid.named_parameters() if p.requires_grad}
    _, other, resumed = predicting(**{"byol": 3.0, "simsiam": 3.0, **changes})
    assert restore(read_checkpoint(tmp_path), other, resumed) == 1
    found = {name: resumed.state[p]["exp_avg"] for name, p in other.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    resumed.step()


def test_a_parameter_that_was_frozen_begins_without_moments(tmp_path: Path) -> None:
    config, hybrid, _ = predicting()
    frozen = hybrid.encoder.vit.patch_embed.proj.weight
    frozen.requires_grad_(False)
    optimiser = adamw(hybrid, config)
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    save_checkpoint(tmp_path, 1, hybrid, optimiser, config, keep=1)
    frozen.requires_grad_(True)
    resumed = adamw(hybrid, config)
    restore(read_checkpoint(tmp_path), hybrid, resumed)
    assert frozen not in resumed.state and hybrid.encoder.vit.cls_token in resumed.state


def test_schedule_is_a_ramp_and_a_cosine() -> None:
    factors = [learning_rate_factor(step, 100, 10) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert factors[10] == 1 and factors[55] == pytest.approx(0.5)
    assert factors[10:] == sorted(factors[10:], reverse=True) and 0 < factors[-1] < 1e-3
    assert learning_rate_factor(0, 1, 0) == 1
    _, optimiser = model_and_optimiser()
    set_learning_rate(optimiser, 0.5)
    assert [group["lr"] for group in optimiser.param_groups] == [1e-3, 1e-3, 5e-3]


def test_rates_of_zero_gradient_move_nothing_but_decayed_matrices() -> None:
    hybrid, optimiser = model_and_optimiser()
    before = {name: p.detach().clone() for name, p in hybrid.named_parameters()}
    for parameter in hybrid.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    moved = {name for name, p in hybrid.named_parameters() if not torch.equal(p, before[name])}
    names = {id(parameter): name for name, parameter in hybrid.named_parameters()}
    assert moved == {names[id(p)] for p in optimiser.param_groups[0]["params"] if p.abs().sum() > 0}
