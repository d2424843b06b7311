"""pytorch-metric-learning's contrastive losses (pytorch_metric_learning.losses).

from hsv_kernels.compat.pytorch_metric_learning import NTXentLoss, SupConLoss
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsv_kernels.compat.contrast import inverse
from hsv_kernels.compat.measures import AvgNonZeroReducer, CosineSimilarity, MeanReducer
from hsv_kernels.compat.pairs import class_numbers, logsumexp_by_anchor, matching_pairs, pair_logits
from hsv_kernels.compat.shapes import require_shape
from hsv_kernels.functional import similarity_logsumexp
from hsv_kernels.rows import unit_rows

__all__ = ["NTXentLoss", "SupConLoss"]


#: The library's reducers that are here, by name.
REDUCERS = {reducer.__name__: reducer() for reducer in (MeanReducer, AvgNonZeroReducer)}


class _PairLoss(nn.Module):
    """What both losses share: which rows are whose, which pairs count, distance and reducer.

    Args:
        temperature: number of any sign, or a 0-dim tensor or parameter.
        distance: None is `get_default_distance()`; CosineSimilarity() normalises rows, and
            DotProductSimilarity(normalize_embeddings=False) takes them as they are.
        reducer: None is `get_default_reducer()`; MeanReducer() or AvgNonZeroReducer().
        embedding_regularizer, collect_stats: their defaults alone.
        embedding_reg_weight: without effect, for there is no regulariser.

    All of these are attributes, read in each call.

    Raises:
        NotImplementedError: another distance or reducer, a regulariser, statistics; here or, of attributes that were
            set since, in the call.
    """

    def __init__(
        self,
        temperature: float,
        *,
        distance: nn.Module | None = None,
        reducer: nn.Module | None = None,
        embedding_regularizer: nn.Module | None = None,
        embedding_reg_weight: float = 1,
        collect_stats: bool | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.distance = self.get_default_distance() if distance is None else distance
        self.set_reducer(reducer)
        self.embedding_regularizer = embedding_regularizer
        self.embedding_reg_weight = embedding_reg_weight
        self.collect_stats = bool(collect_stats)
        self._check_attributes()

    def get_default_distance(self) -> nn.Module:
        return CosineSimilarity()

    def get_default_reducer(self) -> nn.Module:
        return MeanReducer()

    def set_reducer(self, reducer: nn.Module | None) -> None:
        """Takes a copy of the reducer, or the default one."""
        self.reducer = self.get_default_reducer() if reducer is None else copy.deepcopy(reducer)

    def _check_attributes(self) -> None:
        _normalises(self.distance)
        name = type(self.reducer).__name__
        if name not in REDUCERS:
            raise NotImplementedError(f"reducer must be None or one of {', '.join(REDUCERS)}; got {name}")
        if self.embedding_regularizer is not None:
            raise NotImplementedError(
                f"embedding_regularizer must be None: add its loss to this one; got {self.embedding_regularizer!r}"
            )
        if self.collect_stats:
            raise NotImplementedError("collect_stats must be None or False: nothing is recorded here; got True")

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of anchors against references.

        Args:
            embeddings: [N, D] anchors.
            labels: [N]; equal labels make positive pairs, others negative ones.
            indices_tuple: (anchors, positives, anchors, negatives), or triplets (anchors, positives, negatives), in
                place of the labels' pairs; integers [P] or [M] each, negative ones counted from the end.
            ref_emb: [M, D] references; None is the anchors themselves, without each one's pair with itself.
            ref_labels: [M]; None, or the very tensor `labels`, says that row i of ref_emb is anchor i: no pair of it.

        Returns:
            A scalar; 0 with a zero gradient where there is no positive or no negative pair.

        Raises:
            ValueError: neither labels nor indices_tuple, labels that do not fit, embeddings that are no matrix, an
                indices_tuple of other than three or four.
            IndexError: labels for fewer rows of ref_emb than there are anchors, indices that are out of range or come
                without their partners.
            RuntimeError: ref_emb of another width.
        """
        self._check_attributes()
        _check_labels("embeddings", embeddings, labels)
        if labels is None and indices_tuple is None:
            raise ValueError("labels and indices_tuple must not both be None")
        keys = embeddings if ref_emb is None else ref_emb
        key_labels = labels if ref_emb is None else ref_labels
        _check_labels("ref_emb", keys, key_labels)
        if embeddings.dim() != 2 or keys.dim() != 2:
            raise ValueError(f"embeddings must be [N, D]; got {list(embeddings.shape)} and {list(keys.shape)}")
        require_shape("ref_emb", keys, (len(keys), embeddings.shape[1]))
        normalise = _normalises(self.distance)
        q = unit_rows(embeddings) if normalise else embeddings
        k = q if keys is embeddings else (unit_rows(keys) if normalise else keys).to(q.dtype)
        if indices_tuple is not None:
            losses = self._of_pairs(q, k, *_four(indices_tuple, q, k))
        else:
            same = key_labels is None or key_labels is labels
            if same and len(k) < len(q):
                raise IndexError(f"ref_emb without ref_labels needs the {len(q)} rows of embeddings; got {len(k)}")
            k = k[: len(q)] if same and len(k) > len(q) else k
            q_labels, k_labels = (x.to(q.device) for x in (labels, labels if same else key_labels))
            losses = self._of_labels(q, k, *class_numbers(q_labels, k_labels), same)
        if losses is None:
            return (embeddings * 0).sum()
        return REDUCERS[type(self.reducer).__name__].reduced(losses, embeddings)

    def _of_labels(self, q: Tensor, k: Tensor, q_labels: Tensor, k_labels: Tensor, same: bool) -> Tensor | None:
        """Losses of all pairs that labels make, None for none; `same` leaves pair (i, i) out."""
        raise NotImplementedError

    def _of_pairs(self, q: Tensor, k: Tensor, a1: Tensor, p: Tensor, a2: Tensor, n: Tensor) -> Tensor | None:
        """Losses of the named pairs, None for none."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class NTXentLoss(_PairLoss):
    """NT-Xent for any positive pairs: each pair against its anchor's negatives, the mean over pairs.

        loss_ap = log(exp S_ap + Σ_{n ∈ N(a)} exp S_an) − S_ap

    With labels, memory grows with rows and positive pairs; with an indices_tuple, with the pairs that it names. The
    anchors' sums are computed once and shared by their positives. See `_PairLoss` for the arguments beside these.

    Args:
        temperature: 0.07.
    """

    def __init__(self, temperature: float = 0.07, **kwargs: object) -> None:
        super().__init__(temperature, **kwargs)

    def _of_labels(self, q: Tensor, k: Tensor, q_labels: Tensor, k_labels: Tensor, same: bool) -> Tensor | None:
        a, p = matching_pairs(q_labels, k_labels, 0 if same else None)
        if _too_few(len(a), len(q) * (len(k) - same) - len(a)):
            return None
        keys = None if k is q else k
        lse = similarity_logsumexp(q, keys, scale=inverse(self.temperature), q_labels=q_labels, k_labels=k_labels)
        return F.softplus(lse[a] - pair_logits(q, k, a, p, inverse(self.temperature)), threshold=40)

    def _of_pairs(self, q: Tensor, k: Tensor, a1: Tensor, p: Tensor, a2: Tensor, n: Tensor) -> Tensor | None:
        if _too_few(len(a1), len(a2)):
            return None
        lse = logsumexp_by_anchor(pair_logits(q, k, a2, n, inverse(self.temperature)), a2, len(q))
        return F.softplus(lse[a1] - pair_logits(q, k, a1, p, inverse(self.temperature)), threshold=40)


class SupConLoss(_PairLoss):
    """Supervised contrast (Khosla et al., 2020): the mean over an anchor's positives, then over anchors above zero.

        loss_a = log Σ_{j ∈ P(a) ∪ N(a)} exp S_aj − mean_{p ∈ P(a)} S_ap

    With labels, the mean over positives is one product with the sum of a label's rows: no pair is ever made. See
    `_PairLoss` for the arguments beside these.

    Args:
        temperature: 0.1.
    """

    def __init__(self, temperature: float = 0.1, **kwargs: object) -> None:
        super().__init__(temperature, **kwargs)

    def get_default_reducer(self) -> nn.Module:
        return AvgNonZeroReducer()

    def _of_labels(self, q: Tensor, k: Tensor, q_labels: Tensor, k_labels: Tensor, same: bool) -> Tensor | None:
        if not len(q) * len(k):
            return None
        scale = inverse(self.temperature)
        lse = similarity_logsumexp(q, None if k is q else k, scale=scale, exclude_self=same)
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(dtype), k.to(dtype)
        classes = int(torch.cat([q_labels, k_labels]).max()) + 1
        sums = k.new_zeros(classes, k.shape[1]).index_add(0, k_labels, k)[q_labels]
        counts = k_labels.bincount(minlength=classes)[q_labels]
        if same:
            sums, counts = sums - k, counts - 1
        pairs = int(counts.sum())
        if _too_few(pairs, len(q) * (len(k) - same) - pairs):
            return None
        mean = (q * sums).sum(1) * scale / counts.clamp_min(1)
        return torch.where(counts > 0, lse - mean, _nothing(q, k))

    def _of_pairs(self, q: Tensor, k: Tensor, a1: Tensor, p: Tensor, a2: Tensor, n: Tensor) -> Tensor | None:
        if _too_few(len(a1), len(a2)):
            return None
        positive = (a1 * len(k) + p).unique()
        pairs = torch.cat([positive, (a2 * len(k) + n).unique()])
        if len(pairs.unique()) != len(pairs):
            raise AssertionError("indices_tuple must not name a pair as positive and as negative")
        anchor = pairs // len(k)
        logits = pair_logits(q, k, anchor, pairs % len(k), inverse(self.temperature))
        lse = logsumexp_by_anchor(logits, anchor, len(q))
        anchor = anchor[: len(positive)]
        counts = anchor.bincount(minlength=len(q))
        mean = logits.new_zeros(len(q)).index_add(0, anchor, logits[: len(positive)]) / counts.clamp_min(1)
        return torch.where(counts > 0, lse.where(counts > 0, 0) - mean, 0) + _nothing(q, k)


def _too_few(positives: int, negatives: int) -> bool:
    """Whether the library calls the loss 0: one kind of pair is missing, or there is but one of each."""
    return min(positives, negatives) == 0 or max(positives, negatives) <= 1


def _nothing(q: Tensor, k: Tensor) -> Tensor:
    """0 for each anchor, NaN where its row of the library's matrix has one: in the anchor or in any key."""
    return (q.detach() * 0).sum(1) + (k.detach() * 0).sum()


def _normalises(distance: nn.Module) -> bool:
    """Whether the distance takes rows of unit length."""
    name = type(distance).__name__
    plain = getattr(distance, "p", 2) == 2 and getattr(distance, "power", 1) == 1
    if name not in ("CosineSimilarity", "DotProductSimilarity") or not plain:
        raise NotImplementedError(
            f"distance must be None, CosineSimilarity or DotProductSimilarity, with p=2 and power=1; got {name}"
        )
    return bool(getattr(distance, "normalize_embeddings", True))


def _check_labels(name: str, rows: Tensor, labels: Tensor | None) -> None:
    if labels is None:
        return
    if labels.dim() != 1 or len(labels) != len(rows):
        raise ValueError(f"labels of {name} must be [{len(rows)}]; got {list(labels.shape)}")


def _four(indices: tuple[Tensor, ...], q: Tensor, k: Tensor) -> list[Tensor]:
    """(anchors, positives, anchors, negatives) as rows of q and k, triplets written out."""
    if len(indices) not in (3, 4):
        raise ValueError(f"indices_tuple must hold 3 or 4 tensors; got {len(indices)}")
    if len(indices) == 3:
        anchor, positive, negative = indices
        indices = anchor, positive, anchor, negative
    lengths = [len(x) for x in indices]
    if lengths[0] != lengths[1] or lengths[2] != lengths[3]:
        raise IndexError(f"indices_tuple must hold an anchor for each partner; got {lengths} of them")
    return [_rows(x, rows) for x, rows in zip(indices, (q, k, q, k), strict=True)]


def _rows(indices: Tensor, rows: Tensor) -> Tensor:
    """Indices as int64 from the first of the rows on, which negative ones count from the last."""
    indices, size = torch.as_tensor(indices, device=rows.device), len(rows)
    if not len(indices):
        return indices.long()
    if indices.is_floating_point() or indices.dtype in (torch.bool, torch.uint8):
        raise IndexError(f"indices_tuple must hold integers, and masks are none; got {indices.dtype}")
    least, most = indices.aminmax()
    if least < -size or most >= size:
        raise IndexError(f"indices_tuple must be in [-{size}, {size}); got {int(least)} to {int(most)}")
    return indices.long() % size
