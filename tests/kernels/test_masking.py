"""Masking, gather and restore on every backend of this machine."""

import itertools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from hsv_kernels import gather_patches, gather_tokens, random_masking, restore_tokens
from hsv_kernels.ops.masking import function, reference
from tests.kernels.cases import LAYOUTS, assert_accurate, device_of, poisoned_allocations, usable_backends

BACKENDS = usable_backends("masking")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

large = pytest.mark.large
compiled = pytest.mark.compiled


def philox(seed: int, counter: np.ndarray) -> np.ndarray:
    """Philox-4x32-10 over counters [..., 4] of uint32, all four words, in NumPy."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    word, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> shift) ^ c1 ^ k0, b & word, (a >> shift) ^ c3 ^ k1, a & word
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & word, (k1 + np.uint64(0xBB67AE85)) & word
    return np.stack([c0, c1, c2, c3], -1).astype(np.uint32)


def masks_by_definition(batch: int, L: int, K: int, seed: int, offset: int, first: int) -> tuple[Tensor, ...]:
    """ids_keep, ids_restore and mask from sorted pairs (key, l)."""
    ids_keep, ids_restore, mask = [], [], []
    for b in range(batch):
        counter = np.array([[l, first + b, offset & 0xFFFFFFFF, offset >> 32] for l in range(L)], dtype=np.uint32)
        keys = philox(seed, counter)[:, 0]
        kept = sorted(sorted(range(L), key=lambda l: (keys[l], l))[:K])
        removed = [l for l in range(L) if l not in set(kept)]
        ids_keep.append(kept)
        ids_restore.append(np.argsort(kept + removed).tolist())
        mask.append([float(l in set(removed)) for l in range(L)])
    return torch.tensor(ids_keep), torch.tensor(ids_restore), torch.tensor(mask)


@pytest.mark.parametrize(
    ("seed", "counter", "words"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_matches_published_vectors(seed: int, counter: tuple[int, ...], words: tuple[int, ...]) -> None:
    assert tuple(philox(seed, np.array(counter, dtype=np.uint32))) == words
    pair = tuple(torch.tensor(x) for x in (seed & 0xFFFFFFFF, seed >> 32))
    assert reference.philox(pair, tuple(torch.tensor(x) for x in counter)).item() == words[0]


MASKS = [
    # batch, L, K, seed, offset, first_index
    (1, 1, 1, 0, 0, 0),
    (3, 196, 49, 0, 0, 0),
    (2, 197, 1, 1, 7, 5),
    (2, 197, 197, 2**63 - 1, 2**56 - 1, 2**32 - 2),
    (5, 64, 16, 0x123456789ABCDEF, 2**33 + 3, 1000),
    pytest.param(2, 1023, 255, 12345, 1, 0, marks=large),
    (1, 1024, 700, 2**32, 2**32, 2**31),
    pytest.param(1, 5000, 2500, 3, 4, 5, marks=large),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "L", "K", "seed", "offset", "first"), MASKS)
@pytest.mark.parametrize("as_tensors", [False, True])
def test_masks_are_those_of_the_definition(
    backend: str, batch: int, L: int, K: int, seed: int, offset: int, first: int, as_tensors: bool
) -> None:
    device = device_of(backend)
    counters = [torch.tensor(x, device=device) if as_tensors else x for x in (seed, offset)]
    with poisoned_allocations():
        got = random_masking(
            *(batch, L),
            num_keep=K,
            seed=counters[0],
            offset=counters[1],
            first_index=first,
            device=device,
            backend=backend,
        )
    for found, expected in zip(got, masks_by_definition(batch, L, K, seed, offset, first), strict=True):
        assert found.dtype == expected.dtype and not found.requires_grad and found.is_contiguous()
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_many_seeds_have_the_bits_of_the_definition(backend: str) -> None:
    device = device_of(backend)
    for seed in range(50):
        draw = {"num_keep": 49, "seed": seed, "offset": 2**32 * (seed % 3) + seed, "device": device}
        found, expected = (random_masking(3, 196, **draw, backend=name) for name in (backend, "reference"))
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_do_not_follow_the_default_dtype(backend: str) -> None:
    draw = {"num_keep": 2, "seed": 0, "device": device_of(backend), "backend": backend}
    expected = random_masking(2, 7, **draw)
    torch.set_default_dtype(torch.float64)
    try:
        found = random_masking(2, 7, **draw)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found[2].dtype == torch.float32
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_index_continues_a_batch(backend: str) -> None:
    draw = {"mask_ratio": 0.75, "seed": 11, "offset": 3, "device": device_of(backend), "backend": backend}
    whole = random_masking(6, 50, **draw)
    parts = [random_masking(3, 50, first_index=first, **draw) for first in (0, 3)]
    for a, b in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(a, torch.cat(b))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_keys_are_ranked_by_position(backend: str) -> None:
    """With this seed patches 2,683 and 3,281 have one key, the 3,601st smallest of 4,096."""
    removed = []
    for keep in (3600, 3601, 3602):
        got = random_masking(1, 4096, num_keep=keep, seed=24, device=device_of(backend), backend=backend)
        removed.append(tuple(got[2][0, [2683, 3281]].tolist()))
        assert got[0].shape == (1, keep) and got[2].sum() == 4096 - keep
    assert removed == [(1, 1), (0, 1), (0, 0)]


def test_masks_are_uniform() -> None:
    """Each patch is kept as often as chance says, and so is each pair of neighbours."""
    _, _, mask = random_masking(20_000, 16, num_keep=4, seed=1)
    kept = 1 - mask
    expected, deviation = 5000, (20_000 * 0.25 * 0.75) ** 0.5
    assert (kept.sum(0) - expected).abs().max() < 4.5 * deviation
    pairs = (kept * kept.roll(1, 1)).sum(0)
    share = 4 / 16 * 3 / 15
    assert (pairs - 20_000 * share).abs().max() < 4.5 * (20_000 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize(
    ("L", "ratio", "keep"), [(100, 0.9, 10), (196, 0.75, 49), (10, 0.99, 1), (7, 0.0, 7), (64, 0.75, 16), (3, 0.5, 1)]
)
def test_ratio_keeps_exact_counts(L: int, ratio: float, keep: int) -> None:
    ids_keep, _, mask = random_masking(2, L, mask_ratio=ratio, seed=0)
    assert ids_keep.shape == (2, keep) and mask.sum(1).tolist() == [L - keep] * 2


def test_seed_is_drawn_from_the_generator() -> None:
    torch.manual_seed(5)
    first, second = (random_masking(2, 64, num_keep=8)[0] for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(random_masking(2, 64, num_keep=8)[0], first)
    assert not torch.equal(first, second)


IMAGES = [
    # C, H, W, p, q, share kept
    (3, 32, 48, 16, 8, 0.25),
    (1, 6, 10, 3, 5, 0.5),
    (5, 12, 8, 4, 2, 1.0),
    (3, 5, 7, 5, 7, 1.0),
    (3, 4, 6, 1, 1, 0.4),
    (257, 2, 3, 1, 3, 0.5),
    (2, 8, 16, 4, 8, 0.5),
    (4, 8, 16, 4, 8, 0.5),
]


def patches_by_slices(images: Tensor, ids: Tensor, p: int, q: int) -> Tensor:
    """[B, K, p·q·C], one slice after the other."""
    columns = images.shape[3] // q
    rows = []
    for image, chosen in zip(images, ids.tolist(), strict=True):
        corners = [(l // columns * p, l % columns * q) for l in chosen]
        rows.append(torch.stack([image[:, y : y + p, x : x + q].permute(1, 2, 0).flatten() for y, x in corners]))
    return torch.stack(rows)


def shuffled_ids(batch: int, L: int, K: int) -> Tensor:
    """[B, K] without duplicates and in no order."""
    return torch.rand(batch, L).argsort(1)[:, :K]


def values(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype)


def serves(backend: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and backend not in ("reference", "cpu"):
        pytest.skip(f"{backend} does not compute in float64")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("C", "H", "W", "p", "q", "share"), IMAGES)
def test_gather_patches(backend: str, dtype: torch.dtype, C: int, H: int, W: int, p: int, q: int, share: float) -> None:
    serves(backend, dtype)
    device = device_of(backend)
    L = (H // p) * (W // q)
    ids = shuffled_ids(2, L, max(1, int(L * share))).to(device)
    for layout in (*LAYOUTS.values(), lambda x: x.to(memory_format=torch.channels_last)):
        images = layout(values(2, C, H, W, dtype=dtype, device=device)).requires_grad_()
        expected = patches_by_slices(images, ids, p, q)
        with poisoned_allocations():
            got = gather_patches(images, LAYOUTS["strided"](ids), (p, q), backend=backend)
            incoming = LAYOUTS["strided"](torch.randn_like(got))
            (found,) = torch.autograd.grad(got, images, incoming)
        assert torch.equal(got, expected) and got.dtype == dtype and got.is_contiguous()
        assert torch.equal(found, torch.autograd.grad(expected, images, incoming)[0]) and found.dtype == dtype


TOKENS = [
    # B, L, K, D
    (1, 1, 1, 1),
    (2, 197, 1, 3),
    (2, 19, 7, 257),
    (3, 13, 13, 8),
    (2, 40, 11, 64),
    pytest.param(1, 1023, 255, 5, marks=large),
    pytest.param(2, 197, 49, 130, marks=large),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "L", "K", "D"), TOKENS)
def test_gather_tokens(backend: str, dtype: torch.dtype, B: int, L: int, K: int, D: int) -> None:
    serves(backend, dtype)
    device = device_of(backend)
    ids = shuffled_ids(B, L, K).to(device)
    for layout in LAYOUTS.values():
        tokens = layout(values(B, L, D, dtype=dtype, device=device)).requires_grad_()
        expected = torch.stack([row[chosen] for row, chosen in zip(tokens, ids, strict=True)])
        with poisoned_allocations():
            got = gather_tokens(tokens, LAYOUTS["strided"](ids), backend=backend)
            incoming = layout(torch.randn_like(got))
            (found,) = torch.autograd.grad(got, tokens, incoming)
        assert torch.equal(got, expected) and got.dtype == dtype
        assert torch.equal(found, torch.autograd.grad(expected, tokens, incoming)[0]) and found.dtype == dtype


def restore_by_cat(tokens: Tensor, ids_restore: Tensor, mask_token: Tensor) -> Tensor:
    """MAE's own: concatenate, then unshuffle."""
    B, K, D = tokens.shape
    fill = mask_token.reshape(1, 1, D).repeat(B, ids_restore.shape[1] - K, 1)
    joined = torch.cat([tokens, fill], 1)
    return torch.stack([row[order] for row, order in zip(joined, ids_restore, strict=True)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtypes",
    [
        *((dtype, dtype) for dtype in DTYPES),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize(("B", "L", "K", "D"), TOKENS)
def test_restore_tokens(backend: str, dtypes: tuple[torch.dtype, ...], B: int, L: int, K: int, D: int) -> None:
    serves(backend, torch.promote_types(*dtypes))
    device = device_of(backend)
    ids = shuffled_ids(B, L, L).to(device)
    for layout in LAYOUTS.values():
        tokens = layout(values(B, K, D, dtype=dtypes[0], device=device)).requires_grad_()
        mask_token = layout(values(1, 1, D, dtype=dtypes[1], device=device)).requires_grad_()
        expected = restore_by_cat(tokens, ids, mask_token)
        with poisoned_allocations():
            got = restore_tokens(tokens, LAYOUTS["strided"](ids), mask_token, backend=backend)
            incoming = layout(torch.randn_like(got))
            found = torch.autograd.grad(got, (tokens, mask_token), incoming)
        assert torch.equal(got, expected) and got.dtype == expected.dtype
        assert torch.equal(found[0], torch.autograd.grad(expected, tokens, incoming, retain_graph=True)[0])
        masked = incoming[ids >= K]
        wide = torch.float64 if got.dtype == torch.float64 else torch.float32
        plain, truth = (masked.to(dtype).sum(0).reshape(1, 1, D) for dtype in (wide, torch.float64))
        assert [x.dtype for x in found] == list(dtypes)
        assert_accurate(found[1], plain, truth, dtypes[1], D)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_random_masking_restore_what_they_gathered(backend: str) -> None:
    device = device_of(backend)
    ids_keep, ids_restore, mask = random_masking(2, 30, num_keep=9, seed=3, device=device, backend=backend)
    tokens = values(2, 30, 5, dtype=torch.float32, device=device)
    kept = gather_tokens(tokens, ids_keep, backend=backend)
    restored = restore_tokens(kept, ids_restore, torch.full((5,), 9.0, device=device), backend=backend)
    assert torch.equal(restored, torch.where(mask[..., None] == 1, torch.tensor(9.0, device=device), tokens))


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "gather_patches": lambda x, token, keep, restore, **how: gather_patches(x, keep, (3, 2), **how),
    "gather_tokens": lambda x, token, keep, restore, **how: gather_tokens(x.flatten(2), keep % 6, **how),
    "restore_tokens": lambda x, token, keep, restore, **how: restore_tokens(x.flatten(2), restore, token, **how),
}


def arguments(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """images [2, 2, 6, 4] or tokens [2, 6, 4], mask token [4], ids_keep [2, 2], ids_restore [2, 9]."""
    x = values(*((2, 2, 6, 4) if name == "gather_patches" else (2, 6, 4)), dtype=dtype, device=device)
    token = values(4, dtype=dtype, device=device)
    return (
        x.requires_grad_(),
        token.requires_grad_(),
        shuffled_ids(2, 4, 2).to(device),
        shuffled_ids(2, 9, 9).to(device),
    )


each = pytest.mark.parametrize(("name", "backend"), list(itertools.product(OPERATIONS, BACKENDS)))


@each
def test_gradients_of_both_orders(name: str, backend: str) -> None:
    serves(backend, torch.float64)
    x, token, keep, restore = arguments(name, device_of(backend), torch.float64)
    inputs = (x, token) if name == "restore_tokens" else (x,)

    def call(x: Tensor, token: Tensor = token) -> Tensor:
        return OPERATIONS[name](x, token, keep, restore, backend=backend)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@each
def test_gradients_repeat_and_compose(name: str, backend: str) -> None:
    """Twice through one graph, a stride-0 gradient, torch.func.grad, and a gradient that is used in a loss."""
    x, token, keep, restore = arguments(name, device_of(backend))
    out = OPERATIONS[name](x, token, keep, restore, backend=backend)
    inputs = (x, token) if name == "restore_tokens" else (x,)
    first, second = (torch.autograd.grad(out.sum(), inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    by_function = torch.func.grad(lambda x: OPERATIONS[name](x, token, keep, restore, backend=backend).sum())(x)
    assert torch.equal(by_function, first[0])

    (gradient,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
    gradient.sum().backward()
    plain = x.detach().clone().requires_grad_()
    out = OPERATIONS[name](plain, token, keep, restore, backend="reference")
    (gradient,) = torch.autograd.grad(out.pow(3).sum(), plain, create_graph=True)
    gradient.sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)


@each
def test_only_wanted_gradients_are_computed(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, token, keep, restore = arguments(name, device_of(backend))
    assert not OPERATIONS[name](x.detach(), token.detach(), keep, restore, backend=backend).requires_grad
    if name == "restore_tokens":
        for unwanted, inputs in (
            ("_masked_sum", (x, token.detach())),
            ("_visible_tokens", (x.detach(), token)),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(function, unwanted, lambda *_: pytest.fail("computed for nobody"))
                restore_tokens(inputs[0], restore, inputs[1], backend=backend).sum().backward()


@each
def test_nan_passes_and_stays_where_it_is(name: str, backend: str) -> None:
    x, token, keep, restore = arguments(name, device_of(backend))
    with torch.no_grad():
        x[0] = float("nan")
    out = OPERATIONS[name](x, token, keep, restore, backend=backend)
    truth = OPERATIONS[name](x, token, keep, restore, backend="reference")
    assert torch.equal(out.isnan(), truth.isnan()) and out.isnan().any() and not out.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_gradients_of_visible_rows_leave_the_mask_token_alone(backend: str) -> None:
    x, token, _, restore = arguments("restore_tokens", device_of(backend))
    out = restore_tokens(x, restore, token, backend=backend)
    incoming = torch.ones_like(out).masked_fill((restore < 6)[..., None], float("nan"))
    out.backward(incoming)
    assert x.grad.isnan().all() and torch.equal(token.grad, torch.full_like(token, 6.0))


@pytest.mark.parametrize("backend", BACKENDS)
@large
def test_gradient_of_the_mask_token_repeats_to_the_bit(backend: str) -> None:
    device = device_of(backend)
    token = torch.zeros(33, device=device, requires_grad=True)
    tokens, ids = values(130, 3, 33, dtype=torch.float32, device=device), shuffled_ids(130, 12, 12).to(device)
    incoming = values(130, 12, 33, dtype=torch.float32, device=device)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            out = restore_tokens(tokens, ids, token, backend=backend)
            found += torch.autograd.grad(out, token, incoming)
    finally:
        torch.set_num_threads(threads)
    assert backend == "reference" or all(torch.equal(found[0], other) for other in found)


@each
def test_operators_obey_the_rules_of_torch_library(name: str, backend: str) -> None:
    x, token, keep, restore = arguments(name, device_of(backend))
    ops = torch.ops.hsv_kernels
    if name == "gather_patches":
        torch.library.opcheck(ops.gather_patches.default, (x, keep, 3, 2, backend))
        torch.library.opcheck(ops.scatter_patches.default, (torch.randn(2, 2, 12), keep, 2, 6, 4, 3, 2, backend))
    elif name == "gather_tokens":
        torch.library.opcheck(ops.gather_tokens.default, (x, keep, backend))
        torch.library.opcheck(ops.scatter_tokens.default, (torch.randn(2, 2, 4), keep, 6, backend))
    else:
        torch.library.opcheck(ops.restore_tokens.default, (x, restore, token, backend))
        grad = torch.randn(2, 9, 4)
        torch.library.opcheck(ops.visible_tokens.default, (grad, restore, 6, torch.bfloat16, backend))
        torch.library.opcheck(ops.masked_sum.default, (grad, restore, 6, backend))
        seed = torch.tensor(3)
        torch.library.opcheck(ops.random_masking.default, (seed, seed, 2, 9, 4, 0, backend))


@each
def test_vmap_raises(name: str, backend: str) -> None:
    x, token, keep, restore = arguments(name, device_of(backend))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda x: OPERATIONS[name](x, token, keep, restore, backend=backend))(x[None])


def mae_step(images: Tensor, token: Tensor, seed: Tensor | int | None, step: Tensor | int) -> Tensor:
    """Every public function of the operation, from images that require grad to restored tokens."""
    ids_keep, ids_restore, mask = random_masking(2, 4, num_keep=2, seed=seed, offset=step)
    visible = gather_patches(images, ids_keep, (3, 2))
    both = gather_tokens(visible, ids_keep.argsort(1))
    return restore_tokens(visible + both, ids_restore, token) * (1 + mask[..., None])


@pytest.mark.slow
def test_compiles_whole() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(mae_step, fullgraph=True)
    images = torch.randn(2, 2, 6, 4, requires_grad=True)
    token = torch.randn(12, requires_grad=True)
    for seed, step in ((torch.tensor(2**62 + 1), torch.tensor(5)), (torch.tensor(9), torch.tensor(2**40)), (7, 8)):
        results = []
        for call in (mae_step, compiled):
            out = call(images, token, seed, step)
            results.append((out, *torch.autograd.grad(out.square().sum(), (images, token))))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)
    assert compiled(images, token, None, 0).shape == (2, 4, 12)


@compiled
@pytest.mark.parametrize(("C", "H", "W", "p", "q"), [(1, 32, 48, 8, 8), (3, 48, 32, 16, 8), (5, 24, 40, 4, 8)])
def test_visible_patches_embed_as_in_the_full_model(C: int, H: int, W: int, p: int, q: int) -> None:
    """Gathered pixels, embedded, equal timm's embedding of all patches, plus position, indexed by ids_keep."""
    embed = pytest.importorskip("timm.layers").PatchEmbed(
        img_size=(H, W), patch_size=(p, q), in_chans=C, embed_dim=24, strict_img_size=True
    )
    images, L = torch.randn(3, C, H, W), (H // p) * (W // q)
    position = torch.randn(1, L, 24)
    ids_keep, _, _ = random_masking(3, L, mask_ratio=0.75, seed=2)
    for backend in usable_backends("masking"):
        if device_of(backend).type != "cpu":
            continue
        weight = embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
        pixels = gather_patches(images, ids_keep, (p, q), backend=backend)
        visible = torch.nn.functional.linear(pixels, weight, embed.proj.bias)
        visible = visible + gather_tokens(position.expand(3, -1, -1), ids_keep, backend=backend)
        every = (embed(images) + position).gather(1, ids_keep[..., None].expand(-1, -1, 24))
        torch.testing.assert_close(visible, every, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ids", [[[0, 6]], [[-1, 2]], [[3, 3]]])
def test_ids_are_verified_on_request(backend: str, ids: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    device = device_of(backend)
    wrong, tokens = torch.tensor(ids, device=device), torch.randn(1, 6, 2, device=device)
    monkeypatch.setenv("HSV_CHECK", "1")
    with pytest.raises(ValueError, match="ids_keep must"):
        gather_tokens(tokens, wrong, backend=backend)
    with pytest.raises(ValueError, match="ids_keep must"):
        gather_patches(torch.randn(1, 1, 2, 3, device=device), wrong, 1, backend=backend)
    with pytest.raises(ValueError, match="ids_restore must"):
        restore_tokens(tokens[:, :1], wrong, torch.zeros(2, device=device), backend=backend)


@compiled
@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled kernels")
def test_compiled_cpu_kernels_never_leave_the_tensor() -> None:
    """Without HSV_CHECK too: numbers out of range raise, and so do duplicates where they would lose a gradient."""
    tokens = torch.randn(2, 6, 3, requires_grad=True)
    for wrong in ([[0, 1], [6, 2]], [[0, 1], [-1, 2]], [[2**40, 0], [0, 1]]):
        with pytest.raises(ValueError, match=r"ids_keep must lie in \[0, 6\)"):
            gather_tokens(tokens, torch.tensor(wrong), backend="cpu")
    out = gather_tokens(tokens, torch.tensor([[0, 1], [3, 3]]), backend="cpu")
    with pytest.raises(ValueError, match="hold no number twice"):
        out.sum().backward()
    out = restore_tokens(tokens, torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 6, 6]]), torch.zeros(3))
    with pytest.raises(ValueError, match="permutation"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch": 0}, "batch"),
        ({"num_patches": 0}, "num_patches"),
        ({}, "num_keep or mask_ratio"),
        ({"num_keep": 3, "mask_ratio": 0.5}, "num_keep or mask_ratio"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"mask_ratio": -0.1}, "mask_ratio"),
        ({"mask_ratio": float("nan")}, "mask_ratio"),
        ({"num_keep": 0}, "num_keep"),
        ({"num_keep": 10}, "num_keep"),
        ({"batch": 2.0, "num_keep": 3}, "batch must be an integer; got 2.0"),
        ({"num_patches": "9", "num_keep": 3}, "num_patches must be an integer"),
        ({"num_keep": 2.5}, "num_keep must be an integer; got 2.5"),
        ({"num_keep": 3, "seed": 1.5}, "seed must be an integer; got 1.5"),
        ({"num_keep": 3, "offset": 0.5}, "offset must be an integer; got 0.5"),
        ({"num_keep": 3, "first_index": 0.5}, "first_index must be an integer; got 0.5"),
        ({"num_keep": 3, "seed": -1}, "seed"),
        ({"num_keep": 3, "seed": 2**63}, "seed"),
        ({"num_keep": 3, "seed": torch.zeros(1, dtype=torch.int64)}, "seed"),
        ({"num_keep": 3, "seed": torch.tensor(1.0)}, "seed"),
        ({"num_keep": 3, "offset": 2**56}, "offset"),
        ({"num_keep": 3, "first_index": 2**32 - 1}, "first_index"),
    ],
)
def test_random_masking_names_what_is_wrong(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_masking(**{"batch": 2, "num_patches": 9, **given})


def test_gathers_name_what_is_wrong() -> None:
    images, tokens, ids = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 3), torch.zeros(2, 1, dtype=torch.int64)
    token = torch.zeros(3)
    for call, message in [
        (lambda: gather_patches(images, ids, 3), "patch_size"),
        (lambda: gather_patches(images, ids, 4.0), "patch_size must be an integer; got 4.0"),
        (lambda: gather_patches(images, ids, (4, 4, 4)), r"patch_size must be one number or \(p, q\)"),
        (lambda: gather_patches(images.long(), ids, 4), "images"),
        (lambda: gather_patches(images, ids.int(), 4), "ids_keep"),
        (lambda: gather_patches(images, ids.expand(2, 5), 4), "ids_keep"),
        (lambda: gather_tokens(tokens, ids[:1]), "ids_keep"),
        (lambda: gather_tokens(tokens[0], ids), "tokens"),
        (lambda: gather_tokens(tokens, ids.to("meta")), "device"),
        (lambda: restore_tokens(tokens, ids, token), "ids_restore"),
        (lambda: restore_tokens(tokens, torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2)), "mask_token"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def whole_pass(seed: int) -> list[Tensor]:
    """Masks, tokens and gradients of one small model, large enough for a team of threads."""
    images = torch.linspace(-1, 1, 16 * 3 * 64 * 64).reshape(16, 3, 64, 64).requires_grad_()
    token = torch.ones(48, requires_grad=True)
    ids_keep, ids_restore, mask = random_masking(16, 256, num_keep=64, seed=seed)
    out = restore_tokens(gather_patches(images, ids_keep, 4), ids_restore, token)
    return [ids_keep, ids_restore, mask, out.detach(), *torch.autograd.grad(out.square().sum(), (images, token))]


@compiled
def test_right_in_two_threads_at_once() -> None:
    expected = [whole_pass(seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda i: whole_pass(i % 2), range(40)))
    for i, results in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(results, expected[i % 2], strict=True))


@compiled
def test_right_in_a_forked_worker() -> None:
    expected = whole_pass(5)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    # Masks alone: autograd itself does not support fork.
    worker = context.Process(
        target=lambda: sender.send([x.numpy() for x in random_masking(16, 256, num_keep=64, seed=5)])
    )
    worker.start()
    assert receiver.poll(60), "the worker hangs"
    found = receiver.recv()
    worker.join(60)
    assert worker.exitcode == 0
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(found, expected[:3], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_gradients_of_the_mask_token_are_rounded_once(backend: str, dtype: torch.dtype) -> None:
    """From subnormal numbers to beyond the largest; eight equal rows, so that the sum itself is exact."""
    device = device_of(backend)
    row = torch.tensor([0.0, 6e-8, 3e-5, 65504.0, 3e38, float("inf"), -1.5, 7.0]).to(dtype)
    token = torch.zeros(8, dtype=dtype, device=device, requires_grad=True)
    ids = torch.arange(9, device=device)[None]
    out = restore_tokens(torch.zeros(1, 1, 8, dtype=dtype, device=device), ids, token, backend=backend)
    out.backward(row.to(device).expand(1, 9, 8))
    assert torch.equal(token.grad.cpu(), (8 * row.float()).to(dtype))


def test_saved_memory_is_the_ids_alone() -> None:
    x = torch.randn(2, 30, 16, requires_grad=True)
    token = torch.randn(16, requires_grad=True)
    ids_keep, ids_restore, _ = random_masking(2, 30, num_keep=7, seed=0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        restore_tokens(gather_tokens(x, ids_keep), ids_restore, token)
    assert sum(tensor.nbytes for tensor in saved) == ids_keep.nbytes + ids_restore.nbytes
