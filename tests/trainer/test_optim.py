"""Parameter groups and schedule."""

import pytest
import torch
from trainer_cases import tiny_config

from hsv.export import build_encoder
from hsv.objectives import build_hybrid
from hsv.optim import adamw, clipped_parameters, learning_rate_factor, set_learning_rate


def model_and_optimiser():
    config = tiny_config("unused", batch_size=512)
    config.input.mean, config.input.std = [0.5], [0.25]
    config.optimiser.base_lr = 1e-3
    hybrid = build_hybrid(config, build_encoder(config))
    return hybrid, adamw(hybrid, config)


def test_every_parameter_is_in_the_group_where_it_belongs():
    hybrid, optimiser = model_and_optimiser()
    names = {id(parameter): name for name, parameter in hybrid.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimiser.param_groups]
    assert sorted(name for group in groups for name in group) == sorted(names.values())
    decayed, plain, weighting = groups
    assert weighting == ["weighting.u"]
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    expected = ("encoder.vit.pos_embed", "encoder.vit.cls_token", "objectives.mae.decoder.mask_token")
    assert set(expected) <= set(plain) and "objectives.mae.decoder.pos_embed" in plain
    assert [group["weight_decay"] for group in optimiser.param_groups] == [0.05, 0, 0]
    assert [group["base_lr"] for group in optimiser.param_groups] == [2e-3, 2e-3, 1e-2]
    assert all(group["betas"] == (0.9, 0.95) for group in optimiser.param_groups)
    assert hybrid.weighting.u not in set(clipped_parameters(optimiser))


def test_a_predictor_learns_at_its_own_rate_and_a_resumed_run_may_change_it():
    config = tiny_config("unused", batch_size=512, objectives=["byol", "simsiam"])
    config.input.mean, config.input.std = [0.5], [0.25]
    config.optimiser.base_lr, config.byol.predictor_rate, config.simsiam.predictor_rate = 1e-3, 10.0, 4.0
    hybrid = build_hybrid(config, build_encoder(config))
    optimiser = adamw(hybrid, config)
    rates = {id(p): group["base_lr"] for group in optimiser.param_groups for p in group["params"]}
    assert set(rates) == {id(p) for p in hybrid.parameters() if p.requires_grad}
    for name, parameter in hybrid.named_parameters():
        if parameter.requires_grad and not name.startswith("weighting"):
            multiple = (10 if "byol" in name else 4) if ".predictor." in name else 1
            assert rates[id(parameter)] == pytest.approx(multiple * 2e-3), name
    config.byol.predictor_rate = 1.0
    changed = adamw(hybrid, config)
    assert [len(g["params"]) for g in changed.param_groups] == [len(g["params"]) for g in optimiser.param_groups]


def test_schedule_is_a_ramp_and_a_cosine():
    factors = [learning_rate_factor(step, 100, 10) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert factors[10] == 1 and factors[55] == pytest.approx(0.5)
    assert factors[10:] == sorted(factors[10:], reverse=True) and 0 < factors[-1] < 1e-3
    assert learning_rate_factor(0, 1, 0) == 1
    _, optimiser = model_and_optimiser()
    set_learning_rate(optimiser, 0.5)
    assert [group["lr"] for group in optimiser.param_groups] == [1e-3, 1e-3, 5e-3]


def test_rates_of_zero_gradient_move_nothing_but_decayed_matrices():
    hybrid, optimiser = model_and_optimiser()
    before = {name: p.detach().clone() for name, p in hybrid.named_parameters()}
    for parameter in hybrid.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    moved = {name for name, p in hybrid.named_parameters() if not torch.equal(p, before[name])}
    names = {id(parameter): name for name, parameter in hybrid.named_parameters()}
    assert moved == {names[id(p)] for p in optimiser.param_groups[0]["params"] if p.abs().sum() > 0}
