"""iBOT, BEiT, CPC, DAE, CAN and CMAE: formulas in float64, masks and targets; that they learn."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from trainer_cases import narrow_config, sinkhorn

import hsv
from hsv.checkpoint import read_checkpoint
from hsv.config import Config
from hsv.export import build_encoder
from hsv.objectives import Batch, Encoded, Hybrid, Objective, Request, build_hybrid
from hsv.objectives.blocks import block_masks
from hsv.objectives.codebook import Codebook
from hsv.objectives.noise import gaussian_noise

NAMES = ("ibot", "beit", "cpc", "dae", "can", "cmae")
B, L, D, GRID = 5, 16, 12, (4, 4)


def small(name: str, output: Path | str = "unused", **run: object) -> Config:
    config = narrow_config(output, [name], **run)
    config.ibot.out_dim = 24
    return config


def hybrid_for(config: Config) -> Hybrid:
    config.input.mean, config.input.std = [0.5] * config.input.channels, [0.25] * config.input.channels
    torch.manual_seed(0)
    return build_hybrid(config, build_encoder(config))


def objective_for(config: Config) -> Objective:
    """The objective alone, for tokens of width D."""
    config.encoder.embed_dim, config.encoder.num_heads = D, 2
    return hybrid_for(config).objectives[config.objectives[0]]


def batch_for(objective: Objective, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    """Random encodings of what the objective asks for."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def encoded(request: Request) -> Encoded:
        kept = L if not hasattr(request.mask, "ratio") else L - int(L * request.mask.ratio)
        ids = torch.rand(B, L, generator=generator).argsort(1)  # place of each patch in [kept, removed]
        level = request.noise * torch.rand(B, generator=generator, dtype=torch.float64).to(dtype)
        noise = normal(B, 1, 8, 8) * level[:, None, None, None] if request.noise else None
        mask = (ids >= kept).to(dtype)
        return Encoded(normal(B, D), normal(B, kept, D), ids, mask, normal(B, L, D), noise, level)

    student = {request: encoded(request) for request in objective.requests}
    teacher = {request: encoded(request) for request in objective.teacher_requests}
    views = [request.view for request in (*student, *teacher)]
    return Batch({view: normal(B, 1, 8, 8) for view in views}, student, teacher, 0, [B])


def patches_of(images: torch.Tensor, *, normalised: bool) -> torch.Tensor:
    x = images.double().unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).reshape(B, L, 4)
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt() if normalised else x


def cross_entropy(teacher: torch.Tensor, student: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    q = ((teacher - centre) / 0.07).softmax(-1)
    return -(q * (student / 0.1).log_softmax(-1)).sum(-1)


@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_a_head_normalised_over_the_batch_keeps_rows_apart(name: str) -> None:
    config = small(name)
    getattr(config, name).batch_norm = True
    head = objective_for(config).head
    rows = torch.ones(8, D) + 1e-3 * torch.randn(8, D, generator=torch.Generator().manual_seed(0))
    assert head(rows).std(0).mean() > 0.05  # of cosines with prototypes
    getattr(config, name).batch_norm = False
    assert objective_for(config).head(rows).std(0).mean() < 0.01


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_ibot_is_the_formula(pool: str) -> None:
    config = small("ibot")
    config.ibot.pool = pool
    ibot = objective_for(config).double()
    ibot.head, ibot.teacher_head = (nn.Linear(D, 24, bias=False, dtype=torch.float64) for _ in range(2))
    ibot.image_loss.centre.normal_(std=0.1)
    ibot.patch_loss.centre.normal_(std=0.1)
    batch = batch_for(ibot)
    masks = torch.rand(2, B, L, generator=torch.Generator().manual_seed(3)) < 0.3
    masks[0, 1] = False  # an image without masked patches counts as 0
    for request, mask in zip(ibot.masked, masks, strict=True):
        batch.student[request].mask = mask.double()
    centres = ibot.image_loss.centre.clone(), ibot.patch_loss.centre.clone()
    loss = ibot(batch)

    crops, whole = [*batch.student.values()], [*batch.teacher.values()]
    scores = [[head(x.pool(pool)) for x in xs] for head, xs in ((ibot.head, crops), (ibot.teacher_head, whole))]
    pairs = [(t, s) for t in range(2) for s in range(4) if t != s]
    cls = sum(cross_entropy(scores[1][t], scores[0][s], centres[0]).mean() for t, s in pairs) / len(pairs)
    patches = 0
    for crop in range(2):
        errors = cross_entropy(
            ibot.teacher_head(whole[crop].patches), ibot.head(crops[crop].patches), centres[1]
        )  # [B, L]
        for image in range(B):
            if masks[crop, image].any():
                patches += errors[image][masks[crop, image]].mean() / (2 * B)
    torch.testing.assert_close(loss, cls + patches)
    ibot.after_update()
    every = torch.cat([ibot.teacher_head(crop.patches)[mask] for crop, mask in zip(whole, masks, strict=True)])
    torch.testing.assert_close(ibot.patch_loss.centre, 0.9 * centres[1] + 0.1 * every.mean(0).detach())
    assert not torch.equal(ibot.image_loss.centre, ibot.patch_loss.centre)

    for request in ibot.masked:
        batch.student[request].mask = torch.zeros(B, L)
    centres = ibot.image_loss.centre.clone(), ibot.patch_loss.centre.clone()
    assert ibot(batch).isfinite()
    ibot.after_update()
    assert torch.equal(ibot.patch_loss.centre, centres[1]) and not torch.equal(ibot.image_loss.centre, centres[0])


@torch.no_grad()
def test_ibot_with_sinkhorn_is_the_formula() -> None:
    """One assignment of the large crops, and one of the masked patches of all images."""
    config = small("ibot")
    config.ibot.centring, config.ibot.teacher_temperature_epochs = "sinkhorn", 0.0
    ibot = objective_for(config).double()
    ibot.head, ibot.teacher_head = (nn.Linear(D, 24, bias=False, dtype=torch.float64) for _ in range(2))
    batch = batch_for(ibot)
    masks = torch.rand(2, B, L, generator=torch.Generator().manual_seed(3)) < 0.3
    for request, mask in zip(ibot.masked, masks, strict=True):
        batch.student[request].mask = mask.double()
    crops, whole = [*batch.student.values()], [*batch.teacher.values()]
    logs = [(ibot.head(crop.pool(ibot.config.pool)) / 0.1).log_softmax(-1) for crop in crops]
    whole_scores = torch.cat([ibot.teacher_head(crop.pool(ibot.config.pool)) for crop in whole])
    targets = sinkhorn(whole_scores, 0.07).split(B)
    pairs = [(t, s) for t in range(2) for s in range(4) if t != s]
    image = -sum((targets[t] * logs[s]).sum(-1).mean() for t, s in pairs) / len(pairs)
    masked_scores = [ibot.teacher_head(crop.patches[mask]) for crop, mask in zip(whole, masks, strict=True)]
    q = sinkhorn(torch.cat(masked_scores), 0.07)
    p = torch.cat([ibot.head(crop.patches[mask]) for crop, mask in zip(crops[:2], masks, strict=True)])
    share = torch.cat([(1 / mask.sum(1, keepdim=True)).expand_as(mask)[mask] for mask in masks]) / (2 * B)
    patches = -((q * (p / 0.1).log_softmax(-1)).sum(-1) * share).sum()
    torch.testing.assert_close(ibot(batch), image + patches, rtol=1e-5, atol=1e-7)
    assert not ibot.image_loss.centre.any() and not ibot.patch_loss.centre.any()

    for request in ibot.masked:
        batch.student[request].mask = torch.zeros(B, L)
    torch.testing.assert_close(ibot(batch), image, rtol=1e-5, atol=1e-7)


def test_ibot_masks_half_of_the_crops_by_a_tenth_to_a_half() -> None:
    ibot = objective_for(small("ibot"))
    ibot.grid = (14, 14)
    masks, token = ibot.replaced(ibot.masked[0], 2000, 0, draw=4)
    shares = masks.float().mean(1)
    masked = shares[shares > 0]
    assert token is ibot.mask_token and 0.45 < len(masked) / 2000 < 0.55
    assert masked.min() > 0.09 and masked.max() <= 0.5 and 0.28 < masked.mean() < 0.32
    parts = [ibot.replaced(ibot.masked[0], n, first, draw=4)[0] for first, n in ((0, 700), (700, 1300))]
    assert torch.equal(masks, torch.cat(parts))  # as several ranks would draw them
    others = ibot.replaced(ibot.masked[1], 2000, 0, 4)[0], ibot.replaced(ibot.masked[0], 2000, 0, 5)[0]
    assert not any(torch.equal(masks, other) for other in others)


@pytest.mark.parametrize("grid", [(14, 14), (4, 4), (2, 9), (1, 1)])
def test_block_masks_are_blocks_of_the_size_asked_for(grid: tuple[int, int]) -> None:
    size = math.prod(grid)
    counts = np.arange(300) % (size + 1)
    masks = block_masks((1, 2), np.arange(300), grid, counts)
    assert masks.shape == (300, size) and (masks.sum(1) == counts).all()
    rows = block_masks((1, 2), np.array([7, 3]), grid, counts[[7, 3]])
    assert (rows == masks[[7, 3]]).all()


def test_block_masks_lie_together_and_everywhere() -> None:
    masks = block_masks((0,), np.arange(2000), (14, 14), np.full(2000, 75)).reshape(-1, 14, 14)
    alike = (masks[:, 1:] == masks[:, :-1]).mean()
    share = 75 / 196
    assert alike > 0.85 > share**2 + (1 - share) ** 2  # of neighbours; the latter is that of scattered patches
    often = masks.mean(0)
    assert often.min() > 0.02 and abs(often - often[::-1, ::-1]).max() < 0.06


def tokens_of(images: torch.Tensor) -> torch.Tensor:
    """A tokenizer: the brightest of a patch's four pixels."""
    return images.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).argmax(-1).flatten(1)


def wrong_tokens_of(images: torch.Tensor) -> torch.Tensor:
    return tokens_of(images)[:, 1:]


def test_beit_is_the_formula_with_a_tokenizer_of_the_user() -> None:
    config = small("beit")
    config.beit.tokenizer, config.beit.vocabulary = f"{__name__}:tokens_of", 4
    beit = objective_for(config).double()
    batch = batch_for(beit)
    (request,) = beit.requests
    encoded = batch.student[request]
    encoded.mask = beit.replaced(request, B, 0, 0)[0].double()
    assert (encoded.mask.sum(1) == int(0.4 * L)).all()
    targets = tokens_of(batch.images[request.view])
    log_p = beit.classifier(encoded.patches).log_softmax(-1).gather(2, targets[..., None])[..., 0]
    torch.testing.assert_close(beit(batch).double(), -(log_p * encoded.mask).sum() / encoded.mask.sum())


class ModuleTokenizer(torch.nn.Module):
    """A tokenizer with weights, whose dropout must not be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Conv2d(1, 4, 2, 2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classes(images).flatten(2).argmax(1)


module_tokenizer = ModuleTokenizer()


def test_a_tokenizer_that_is_a_module_is_frozen() -> None:
    config = small("beit")
    config.beit.tokenizer, config.beit.vocabulary = f"{__name__}:module_tokenizer", 4
    hybrid = hybrid_for(config).train()
    images = torch.randn(B, 1, 8, 8)
    assert torch.equal(hybrid.objectives["beit"].tokens(images), hybrid.objectives["beit"].tokens(images))
    assert not any(parameter.requires_grad for parameter in module_tokenizer.parameters())


def test_tokenizers_are_checked() -> None:
    config = small("beit")
    config.beit.tokenizer = f"{__name__}:nothing"
    with pytest.raises(ValueError, match=r"beit.tokenizer: got .*nothing"):
        objective_for(config)
    config.beit.tokenizer = f"{__name__}:wrong_tokens_of"
    beit = objective_for(config)
    with pytest.raises(ValueError, match=r"beit.tokenizer: got torch.int64 \[5, 15\]; allowed: int64 \[5, 16\]"):
        beit(batch_for(beit, dtype=torch.float32))
    config.beit.tokenizer = "tokens_of"
    with pytest.raises(ValueError, match=r"package\.module:function"):
        config.check()


def test_codebook_whitens_and_finds_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(6, 12, generator=generator)
    chosen = torch.randint(6, (200, 16), generator=generator)
    pixels = kinds[chosen] * torch.linspace(0.1, 3, 12) + 0.01 * torch.randn(200, 16, 12, generator=generator)
    images = pixels.reshape(200, 4, 4, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(200, 3, 8, 8)
    codebook = Codebook(24, (2, 2), 3)
    codebook.fit(iter(images), seed=0)
    again = Codebook(24, (2, 2), 3)
    again.fit(iter(images), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(codebook.parameters(), again.parameters(), strict=True))

    x = (codebook.patches(images).flatten(0, 1) - codebook.mean) @ codebook.whitening
    ids = codebook(images)
    assert torch.equal(ids.flatten(), torch.cdist(x, codebook.centres).argmin(1))
    pairs = torch.stack([ids.flatten(), chosen.flatten()], 1).unique(dim=0)
    assert len(pairs) == len(ids.unique())  # each token stands for one kind of patch
    covariance = x.T @ x / len(x)
    off = covariance - covariance.diag().diag()
    assert off.abs().max() < 1e-3 and covariance.diag().max() < 1.001


def test_codebook_is_fitted_once_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, fit = [], Codebook.fit

    def counted(self: Codebook, images: Iterable[Tensor], seed: int) -> None:
        fitted.append(len(images := list(images)))
        fit(self, iter(images), seed)

    monkeypatch.setattr(Codebook, "fit", counted)
    summary = hsv.pretrain(small("beit", tmp_path / "run", steps=2, checkpoint_every=1))
    (tmp_path / "run/checkpoints/step-00000002.pt").unlink()
    hsv.pretrain(small("beit", tmp_path / "run", steps=2), resume=True)
    assert fitted == [200]
    centres = read_checkpoint(summary.run_dir)["model"]["objectives.beit.tokenizer.centres"]
    assert centres.shape == (32, 4) and len(centres.unique(dim=0)) == 32


def test_codebook_has_no_empty_cluster_on_noise() -> None:
    images = torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    codebook = Codebook(64, (2, 2), 1)
    codebook.fit(iter(images), seed=1)
    assert len(codebook(images).unique()) == 64


def test_cpc_is_the_formula() -> None:
    cpc = objective_for(small("cpc")).double()
    batch = batch_for(cpc)
    (encoded,) = batch.student.values()
    losses = []
    for k, predictor in zip((1, 2, 3), cpc.predictors, strict=True):
        context = encoded.patches.reshape(B, 4, 4, D)[:, : 4 - k].reshape(-1, D)
        target = cpc.target(encoded.embedded).reshape(B, 4, 4, -1)[:, k:].flatten(0, 2)
        logits = F.normalize(predictor(context), dim=1) @ F.normalize(target, dim=1).T / 0.1
        losses.append(F.cross_entropy(logits, torch.arange(len(logits))))
    torch.testing.assert_close(cpc(batch), torch.stack(losses).mean())
    assert cpc.chance(B) == pytest.approx(sum(math.log(B * 4 * rows) for rows in (3, 2, 1)) / 3)


@pytest.mark.parametrize("bf16", [False, True])
def test_cpc_context_sees_no_row_that_it_predicts(bf16: bool) -> None:
    """Neither by fused attention nor by the matrix products that bfloat16 trains with on a CPU."""
    hybrid = hybrid_for(small("cpc")).train(bf16)
    (request,) = hybrid.requests
    images = torch.randn(2, 1, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        encoded = hybrid.encode({request.view: images}, draw=0)[request]
    (seen,) = torch.autograd.grad(encoded.patches[:, 4:8].sum(), images)
    assert not seen[:, :, 4:].any() and seen[:, :, :2].any() and seen[:, :, 2:4].any()


def test_dae_is_the_formula() -> None:
    dae = objective_for(small("dae")).double()
    batch = batch_for(dae)
    (request,) = dae.requests
    target = patches_of(batch.images[request.view], normalised=True)
    expected = (dae.head(batch.student[request].patches) - target).square().mean()
    torch.testing.assert_close(dae(batch), expected)


@pytest.mark.parametrize("drawn", [False, True])
def test_dae_draws_the_strength_of_the_noise_if_asked(drawn: bool) -> None:
    config = small("dae")
    config.dae.noise, config.dae.noise_drawn = 2.0, drawn
    hybrid = hybrid_for(config)
    (view,) = hybrid.views
    (encoded,) = hybrid.encode({view: torch.zeros(200, 1, 8, 8)}, draw=0).values()
    level = encoded.noise_level
    if drawn:
        assert 0 <= level.min() < 0.1 and 1.9 < level.max() <= 2
    else:
        assert (level == 2).all()
    torch.testing.assert_close(encoded.noise.std((1, 2, 3)), level, rtol=0.4, atol=0)


def mean_where(mask: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
    return (errors.double() * mask.double()).sum() / mask.double().sum()


@pytest.mark.parametrize("noise_weight", [0.3, 0.0])
def test_can_is_the_formula(noise_weight: float) -> None:
    config = small("can")
    config.can.noise_weight = noise_weight
    can = objective_for(config)
    batch = batch_for(can, dtype=torch.float32)
    z, pixels, noises = [], [], []
    for request, visible in batch.student.items():
        z.append(visible.patches.mean(1))
        level = can.level(can.frequencies(visible.noise_level)) if noise_weight else None
        pred = can.decoder(visible.patches, visible.ids_restore, level).double()
        target = patches_of(batch.images[request.view], normalised=True)
        pixels.append(mean_where(visible.mask, (pred[..., :4] - target).square().mean(-1)))
        if noise_weight:
            unit = patches_of(visible.noise / visible.noise_level.reshape(B, 1, 1, 1), normalised=False)
            noises.append(mean_where(1 - visible.mask, (pred[..., 4:] - unit).square().mean(-1)))
    z = F.normalize(can.projector(torch.cat(z)).double(), dim=1)
    logits = (z @ z.T / 0.1).fill_diagonal_(-math.inf)
    expected = 0.03 * F.cross_entropy(logits, torch.arange(2 * B).roll(B)) + (0.97 - noise_weight) * sum(pixels) / 2
    torch.testing.assert_close(can(batch).double(), expected + noise_weight * sum(noises) / 2, rtol=1e-5, atol=1e-6)


def test_cmae_is_the_formula() -> None:
    cmae = objective_for(small("cmae"))
    batch = batch_for(cmae, dtype=torch.float32)
    ((request, visible),), (whole,) = batch.student.items(), batch.teacher.values()
    pred = cmae.pixel_decoder(visible.patches, visible.ids_restore).double()
    target = patches_of(batch.images[request.view], normalised=True)
    pixels = mean_where(visible.mask, (pred - target).square().mean(-1))
    q = cmae.predictor(cmae.projector(cmae.feature_decoder(visible.patches, visible.ids_restore).mean(1)))
    k = cmae.teacher_projector(whole.patches.mean(1))
    logits = F.normalize(q.double(), dim=1) @ F.normalize(k.double(), dim=1).T / 0.07
    expected = pixels + 2 * 0.07 * F.cross_entropy(logits, torch.arange(B))
    torch.testing.assert_close(cmae(batch).double(), expected, rtol=1e-5, atol=1e-6)


def test_cmae_target_is_the_same_crop_elsewhere() -> None:
    cmae = objective_for(small("cmae"))
    (request,), (target,) = cmae.requests, cmae.teacher_requests
    one, other = request.view, target.view
    assert one.slot == other.slot and one.spec.shift == 0 < other.spec.shift
    assert all(getattr(one.spec, n) == getattr(other.spec, n) for n in ("crop_scale", "crop_ratio", "flip"))


def test_noise_is_normal_and_a_function_of_the_image() -> None:
    images = torch.empty(64, 3, 17, 19)
    noise, level = gaussian_noise(images, 0.5, False, (1, 2), 0)
    unit = noise.flatten() / 0.5
    quantiles = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    below = (unit[:, None] < quantiles).float().mean(0)
    torch.testing.assert_close(below, torch.special.ndtr(quantiles), rtol=0, atol=6e-3)  # four deviations
    assert noise.shape == images.shape and (level == 0.5).all() and len(unit.unique()) > 0.99 * len(unit)
    correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(64)
    assert correlation.abs().max() < 0.16  # five deviations
    last, _ = gaussian_noise(images[:10], 0.5, False, (1, 2), 54)
    torch.testing.assert_close(last, noise[54:], rtol=1e-5, atol=1e-6)
    assert not torch.equal(gaussian_noise(images, 0.5, False, (1, 3), 0)[0], noise)
    drawn, levels = gaussian_noise(images, 0.5, True, (1, 2), 0)
    torch.testing.assert_close(drawn, noise * 2 * levels[:, None, None, None])
    assert 0 <= levels.min() < 0.1 and 0.4 < levels.max() < 0.5


@pytest.mark.parametrize("name", ["dae", "can", "cmae"])
def test_reconstructions_show_what_was_seen_and_what_was_made_of_it(name: str) -> None:
    config = small(name)
    config.run.seed, getattr(config, name).norm_pix = 3, False
    hybrid = hybrid_for(config).eval()
    objective, images = hybrid.objectives[name], digits(B, 8)
    request = objective.requests[0]
    seen, made, mask = objective.reconstruct(hybrid.encoder, images, seed=3)
    with torch.no_grad():
        encoded = hybrid.encode(dict.fromkeys(hybrid.views, images), draw=0)[request]
        pred = patches_of(made, normalised=False), objective.predict(encoded).double()
    removed = mask.reshape(B, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3).bool()
    whole = images if encoded.noise is None else images + encoded.noise
    assert (encoded.noise is None) is (name == "cmae") and removed.any().item() is (name != "dae")
    torch.testing.assert_close(seen, whole.masked_fill(removed, 0))
    guessed = mask.bool() if removed.any() else torch.ones(B, L, dtype=torch.bool)
    torch.testing.assert_close(*(patches[guessed] for patches in pred), rtol=1e-4, atol=1e-5)
    assert torch.equal(made[~removed], whole[~removed]) or name == "dae"


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_learn(name: str) -> None:
    """The same digits, in the same views, over and over. iBOT's teacher stays, for its loss need not fall otherwise."""
    config = small(name)
    config.encoder.drop_path, config.ibot.momentum, config.ibot.centre_momentum = 0.0, 1.0, 1.0
    hybrid = hybrid_for(config)
    images = [digits(B * 4, view.spec.size or 8) for view in hybrid.views]
    hybrid.prepare(lambda: iter(images[0]))
    optimiser = torch.optim.AdamW([p for p in hybrid.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for step in range(30):
        loss, _ = hybrid(images, draw=step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        hybrid.after_update()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.93 * sum(losses[:5])


def digits(count: int, size: int) -> torch.Tensor:
    pixels = torch.tensor(load_digits().images[:count], dtype=torch.float32)[:, None] / 8 - 1
    return pixels[:, :, :size, :size].contiguous()


@pytest.mark.parametrize("name", NAMES)
def test_oblong_colour_images_in_bfloat16_and_chunks(name: str) -> None:
    config = small(name)
    config.input.channels, config.input.image_size, config.encoder.patch_size = 3, (8, 12), 4
    config.run.contrastive_chunks, config.encoder.drop_path = 2, 0.0
    hybrid = hybrid_for(config)
    images = [torch.randn(B, 3, *((view.spec.size,) * 2 if view.spec.size else (8, 12))) for view in hybrid.views]
    hybrid.prepare(lambda: iter(images[0]))
    with torch.autocast("cpu", torch.bfloat16):
        loss, logs = hybrid(images, draw=0)
    loss.backward()
    chance = hybrid.objectives[name].chance(B)
    assert loss.dtype == torch.float32 and 0.4 * chance < logs[f"loss/{name}"] < 3 * chance
    trained = {key: p.grad for key, p in hybrid.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.isfinite().all() for grad in trained.values())
