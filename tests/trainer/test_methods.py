"""The loss of each method against its formula, written out in plain PyTorch, and the state that it keeps."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from trainer_cases import narrow_config, sinkhorn, tiny_config

from hsv.config import METHODS
from hsv.data import ViewSpec
from hsv.export import build_encoder
from hsv.objectives import Hybrid, build_hybrid
from hsv.optim import adamw
from hsv.schedules import Progress

BATCH = 6


def method(name: str, **settings: object) -> Hybrid:
    """One objective, narrow, on a tiny encoder whose teacher has moved away from the student."""
    config = narrow_config("unused", [name])
    config.encoder.drop_path, config.moco.queue_size = 0.0, 10
    config.input.mean, config.input.std = [0.5], [0.25]
    for key, value in settings.items():
        setattr(getattr(config, name), key, value)
    torch.manual_seed(0)
    hybrid = build_hybrid(config, build_encoder(config))
    with torch.no_grad():
        for key, parameter in hybrid.named_parameters():
            if "teacher" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return hybrid


def images_for(hybrid: Hybrid) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sides = [view.spec.size or 8 for view in hybrid.views]
    return [torch.randn(BATCH, 1, side, side, generator=generator) for side in sides]


def pooled(hybrid: Hybrid, images: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What the heads read: student's and teacher's pooled tokens of each request."""
    (objective,) = hybrid.objectives.values()
    by_view = dict(zip(hybrid.views, images, strict=True))
    student = hybrid.encode(by_view, 0)
    teacher = next(iter(hybrid.encode_with_teachers(by_view, 0).values()), {})
    pool = objective.config.pool
    return [student[r].pool(pool) for r in objective.requests], [
        teacher[r].pool(pool) for r in objective.teacher_requests
    ]


def value(hybrid: Hybrid, images: list[Tensor]) -> float:
    return hybrid(images, 0)[1][f"loss/{next(iter(hybrid.objectives))}"].item()


def contrast(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    q, k = F.normalize(q.double(), dim=1), F.normalize(k.double(), dim=1)
    return F.cross_entropy(q @ k.T / temperature, torch.arange(len(q)))


def linear_layers(head: nn.Module) -> int:
    return sum(isinstance(layer, nn.Linear) for layer in head.modules())


@torch.no_grad()
@pytest.mark.parametrize("predictor", [True, False])
def test_moco_v3_is_the_formula(predictor: bool) -> None:
    hybrid = method("moco", predictor=predictor)
    images, moco = images_for(hybrid), hybrid.objectives["moco"]
    student, teacher = pooled(hybrid, images)
    assert linear_layers(moco.predictor) == (2 if predictor else 0)
    q0, q1 = (moco.projector(x) for x in student)
    if predictor:
        q0, q1 = moco.predictor(q0), moco.predictor(q1)
    k0, k1 = (moco.teacher_projector(x) for x in teacher)
    expected = 2 * 0.2 * (contrast(q0, k1, 0.2) + contrast(q1, k0, 0.2))
    assert value(hybrid, images) == pytest.approx(expected.item(), rel=1e-4)


@torch.no_grad()
def test_moco_v2_is_the_formula_and_its_queue_takes_the_keys() -> None:
    hybrid = method("moco", version="v2")
    images, moco = images_for(hybrid), hybrid.objectives["moco"]
    (student,), (teacher,) = pooled(hybrid, images)
    q, k = (F.normalize(x.double(), dim=1) for x in (moco.projector(student), moco.teacher_projector(teacher)))
    queue = moco.queue.keys.double()
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.2
    expected = F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long))
    assert value(hybrid, images) == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(moco.queue.keys[:BATCH].double(), k, rtol=1e-4, atol=1e-5)
    value(hybrid, images)  # 6 more keys in 10 places: the first two are overwritten
    torch.testing.assert_close(moco.queue.keys[:2].double(), k[4:], rtol=1e-4, atol=1e-5)
    hybrid.eval()
    before = moco.queue.keys.clone()
    hybrid(images, 0)
    assert torch.equal(moco.queue.keys, before)


@pytest.mark.parametrize(
    ("name", "settings", "layers"),
    [
        ("moco", {}, 3),
        ("moco", {"version": "v2"}, 2),
        ("moco", {"projector_layers": 2}, 2),
        ("moco", {"version": "v2", "projector_layers": 1}, 1),
        ("simsiam", {}, 3),
        ("simsiam", {"projector_layers": 2}, 2),
    ],
)
def test_projectors_have_the_layers_that_are_asked_for(name: str, settings: dict, layers: int) -> None:
    hybrid = method(name, **settings)
    assert linear_layers(hybrid.objectives[name].projector) == layers
    hybrid(images_for(hybrid), 0)[0].backward()


@pytest.mark.parametrize("frozen", [False, True])
def test_moco_leaves_the_patch_embedding_as_it_is_if_asked(frozen: bool) -> None:
    hybrid = method("moco", freeze_patch_embed=frozen)
    hybrid(images_for(hybrid), 0)[0].backward()
    projection = hybrid.encoder.vit.patch_embed.proj.weight
    assert (projection.grad is None) is frozen
    config = tiny_config("unused")
    optimised = {id(p) for group in adamw(hybrid, config).param_groups for p in group["params"]}
    assert (id(projection) in optimised) is not frozen


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_heads_of_dino_have_the_layers_that_are_asked_for(layers: int) -> None:
    hybrid = method("dino", head_layers=layers)
    assert linear_layers(hybrid.objectives["dino"].head) == layers
    hybrid(images_for(hybrid), 0)[0].backward()


@torch.no_grad()
def test_byol_is_the_formula() -> None:
    hybrid = method("byol")
    images, byol = images_for(hybrid), hybrid.objectives["byol"]
    student, teacher = pooled(hybrid, images)
    p0, p1 = (byol.predictor(byol.projector(x)).double() for x in student)
    z0, z1 = (byol.teacher_projector(x).double() for x in teacher)
    expected = 2 - F.cosine_similarity(p0, z1).mean() - F.cosine_similarity(p1, z0).mean()
    assert value(hybrid, images) == pytest.approx(expected.item(), rel=1e-4)


def test_simsiam_is_the_formula_and_stops_the_gradient() -> None:
    hybrid = method("simsiam")
    images, simsiam = images_for(hybrid), hybrid.objectives["simsiam"]
    (x0, x1), _ = pooled(hybrid, images)
    z0, z1 = simsiam.projector(x0), simsiam.projector(x1)
    p0, p1 = simsiam.predictor(z0), simsiam.predictor(z1)
    cosines = F.cosine_similarity(p0, z1.detach()).mean() + F.cosine_similarity(p1, z0.detach()).mean()
    weight = simsiam.projector[0].weight
    (expected,) = torch.autograd.grad(-cosines / 2, weight)
    loss, _ = hybrid(images, 0)
    (found,) = torch.autograd.grad(loss, weight)
    assert loss.item() == pytest.approx(-cosines.item() / 2, rel=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def cross_entropy(q: Tensor, scores: Tensor, temperature: float) -> Tensor:
    return -(q * (scores.double() / temperature).log_softmax(-1)).sum(-1).mean()


@torch.no_grad()
def test_dino_is_the_formula_and_its_centre_follows_the_teacher() -> None:
    hybrid = method("dino")
    images, dino = images_for(hybrid), hybrid.objectives["dino"]
    hybrid.start_step(Progress(30, 1000, 10))  # 30 of 100 steps of warm-up
    dino.distillation.centre.normal_(std=0.1)
    centre = dino.distillation.centre.clone()
    student, teacher = pooled(hybrid, images)
    scores, targets = [dino.head(x) for x in student], [dino.teacher_head(x).double() for x in teacher]
    temperature = 0.04 + 0.3 * 0.03
    q = [((t - centre) / temperature).softmax(-1) for t in targets]
    losses = [cross_entropy(q[t], s, 0.1) for t in (0, 1) for i, s in enumerate(scores) if i != t]
    assert len(losses) == 6  # each of two large crops against the other and two small ones
    assert value(hybrid, images) == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert torch.equal(dino.distillation.centre, centre)  # until the step is done
    value(hybrid, images)
    dino.after_update()
    expected = 0.9 * centre + 0.1 * torch.cat(targets).mean(0).float()
    torch.testing.assert_close(dino.distillation.centre, expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_dino_with_sinkhorn_is_the_formula() -> None:
    hybrid = method("dino", centring="sinkhorn", teacher_temperature_epochs=0.0, num_locals=0)
    images, dino = images_for(hybrid), hybrid.objectives["dino"]
    student, teacher = pooled(hybrid, images)
    # One Sinkhorn–Knopp over the rows of both large crops.
    q = sinkhorn(torch.cat([dino.teacher_head(x) for x in teacher]), 0.07).split(BATCH)
    losses = [cross_entropy(q[t], dino.head(student[1 - t]), 0.1) for t in (0, 1)]
    assert value(hybrid, images) == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert not dino.distillation.centre.any()


@torch.no_grad()
def test_swav_is_the_formula() -> None:
    hybrid = method("swav")
    images, swav = images_for(hybrid), hybrid.objectives["swav"]
    student, _ = pooled(hybrid, images)
    z = F.normalize(swav.projector(torch.cat(student)), dim=1)
    scores = (z @ swav.prototypes.weight.T).split(BATCH)
    losses = [cross_entropy(sinkhorn(scores[g], 0.05), s, 0.1) for g in (0, 1) for i, s in enumerate(scores) if i != g]
    assert value(hybrid, images) == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


@pytest.mark.parametrize(("name", "weight"), [("dino", "head.5.weight"), ("swav", "prototypes.weight")])
def test_prototypes_wait_for_the_first_epoch(name: str, weight: str) -> None:
    hybrid = method(name)
    prototypes = hybrid.objectives[name].get_parameter(weight)
    for step, learns in ((0, False), (9, False), (10, True)):
        hybrid.start_step(Progress(step, 1000, 10))
        hybrid(images_for(hybrid), 0)[0].backward()
        hybrid.before_update()
        assert (prototypes.grad is not None) is learns
        hybrid.zero_grad()


def test_prototypes_of_swav_stay_on_the_sphere() -> None:
    hybrid = method("swav")
    prototypes = hybrid.objectives["swav"].prototypes.weight
    with torch.no_grad():
        prototypes.mul_(3)
    hybrid.after_update()
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(16))


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_is_near_float32(name: str) -> None:
    hybrid = method(name)
    images = images_for(hybrid)
    exact = value(hybrid, images)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = method(name)(images, 0)
    loss.backward()
    assert loss.item() == pytest.approx(exact / (hybrid.objectives[name].chance(BATCH) or 1), rel=0.1, abs=0.05)


@pytest.mark.parametrize(("name", "settings"), [("moco", {}), ("moco", {"version": "v2"}), ("byol", {}), ("dino", {})])
def test_teachers_follow_by_the_momentum_of_the_step(name: str, settings: dict) -> None:
    hybrid = method(name, momentum=0.9, **settings)
    objective, (teacher,) = hybrid.objectives[name], hybrid.teachers.values()
    hybrid.start_step(Progress(50, 100, 10))
    momentum = 0.9 if settings else 0.95  # half of a cosine from 0.9 to 1; v2 keeps it
    followers = [(teacher, hybrid.encoder), *objective.teacher_heads()]
    expected = [
        torch.lerp(b, a, momentum) for t, s in followers for a, b in zip(t.parameters(), s.parameters(), strict=True)
    ]
    hybrid.after_update()
    found = [a for t, _ in followers for a in t.parameters()]
    assert len(followers) == 2 and not any(parameter.requires_grad for parameter in found)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert hybrid.exported("teacher") is teacher and hybrid.exported("student") is hybrid.encoder


@torch.no_grad()
def test_a_teacher_drops_no_path_from_the_first_step_on() -> None:
    config = tiny_config("unused")
    config.objectives, config.encoder.drop_path = ["byol"], 0.9
    config.input.mean, config.input.std = [0.5], [0.25]
    hybrid = build_hybrid(config, build_encoder(config))
    images = dict(zip(hybrid.views, images_for(hybrid), strict=True))
    (first,), (again,) = (hybrid.encode_with_teachers(images, 0).values() for _ in range(2))
    for request, encoded in first.items():
        assert torch.equal(encoded.cls, again[request].cls)


@pytest.mark.parametrize("name", ["moco", "byol", "simsiam", "cmae"])
def test_a_batch_that_is_left_with_one_image_goes_on(name: str) -> None:
    hybrid = method(name)
    loss, _ = hybrid([view[:1] for view in images_for(hybrid)], 0)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in hybrid.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("simclr", {"view": ViewSpec(size=7)}, r"simclr: got views of 7 pixels; allowed: multiples of the patch"),
        ("mae", {"own_view": ViewSpec(size=12)}, r"mae: got masked views of 12 pixels"),
        ("ibot", {"global_view": ViewSpec(size=4)}, r"ibot: got masked views of 4 pixels"),
        ("cpc", {"view": ViewSpec(size=4)}, r"cpc: got masked views of 4 pixels"),
        ("ibot", {"mask_ratio": 0.05, "mask_ratio_spread": 0.0}, r"ibot\.mask_ratio: got 0\.8 of 16 patches at most"),
    ],
)
def test_views_and_masks_that_cannot_be(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(name, **settings)


@pytest.mark.parametrize(("name", "side", "message"), [("simclr", 9, "input.image_size"), ("mae", 2, "1 patch")])
def test_images_that_patches_do_not_make(name: str, side: int, message: str) -> None:
    config = tiny_config("unused")
    config.objectives, config.input.image_size = [name], side
    config.input.mean, config.input.std = [0.5], [0.25]
    with pytest.raises(ValueError, match=message):
        build_hybrid(config, build_encoder(config))


def test_objectives_of_one_momentum_share_a_teacher() -> None:
    config = tiny_config("unused")
    config.objectives = ["byol", "dino", "moco"]
    config.input.mean, config.input.std = [0.5], [0.25]
    for name in config.objectives:
        getattr(config, name).hidden_dim = getattr(config, name).out_dim = 16
    hybrid = build_hybrid(config, build_encoder(config))
    assert list(hybrid.teachers) == ["0_996", "0_99"]


def test_small_crops_have_whole_patches() -> None:
    assert [view.spec.size for view in method("dino").views] == [None, None, 4, 4]  # 3/7 of 8 pixels, patches of 2
    config = tiny_config("unused")
    config.objectives, config.input.mean, config.input.std = ["dino"], [0.5], [0.25]
    config.dino.local_view = type(config.dino.local_view)(size=5)
    with pytest.raises(ValueError, match="size of small crops: got 5"):
        build_hybrid(config, build_encoder(config))
