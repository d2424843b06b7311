"""pytorch-metric-learning's contrastive losses (pytorch_metric_learning.losses).

from hsv_kernels.compat.pytorch_metric_learning import NTXentLoss, SupConLoss
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsv_kernels.compat.contrast import inverse
from hsv_kernels.compat.pairs import logsumexp_by_anchor, matching_pairs, pair_logits
from hsv_kernels.functional import similarity_logsumexp
from hsv_kernels.rows import unit_rows

__all__ = ["NTXentLoss", "SupConLoss"]


def _mean(losses: Tensor) -> Tensor:
    return losses.mean()


def _mean_of_positive(losses: Tensor) -> Tensor:
    positive = losses > 0
    return losses.where(positive, 0).sum() / positive.sum().clamp_min(1)


#: The library's reducers that are here, by name.
REDUCERS: dict[str, Callable[[Tensor], Tensor]] = {
    "MeanReducer": _mean,
    "AvgNonZeroReducer": _mean_of_positive,
}


class _PairLoss(nn.Module):
    """What both losses share: which rows are whose, which pairs count, distance and reducer.

    Args:
        temperature: number of any sign, or a 0-dim tensor or parameter.
        distance: None or CosineSimilarity(), which normalise rows; DotProductSimilarity(normalize_embeddings=False)
            takes them as they are.
        reducer: None is the loss's own; MeanReducer() or AvgNonZeroReducer().
        embedding_regularizer, collect_stats: their defaults alone.
        embedding_reg_weight: without effect, for there is no regulariser.

    Raises:
        NotImplementedError: another distance or reducer, a regulariser, statistics.
    """

    default_reducer: str

    def __init__(
        self,
        temperature: float,
        *,
        distance: object = None,
        reducer: object = None,
        embedding_regularizer: object = None,
        embedding_reg_weight: float = 1,
        collect_stats: bool | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.normalise = _normalises(distance)
        name = self.default_reducer if reducer is None else type(reducer).__name__
        if name not in REDUCERS:
            raise NotImplementedError(f"reducer must be None or one of {', '.join(REDUCERS)}; got {name}")
        self.reduce = REDUCERS[name]
        if embedding_regularizer is not None:
            raise NotImplementedError(
                f"embedding_regularizer must be None: add its loss to this one; got {embedding_regularizer!r}"
            )
        self.embedding_reg_weight = embedding_reg_weight
        if collect_stats:
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
                place of the labels' pairs; int64 [P] or [M] each.
            ref_emb: [M, D] references; None is the anchors themselves, without each one's pair with itself.
            ref_labels: [M]; None, or the very tensor `labels`, says that row i of ref_emb is anchor i: no pair of it.

        Returns:
            A scalar; 0 with a zero gradient where there is no positive or no negative pair.

        Raises:
            ValueError: neither labels nor indices_tuple, labels that do not fit, embeddings that are no matrix.
            IndexError: labels for fewer rows of ref_emb than there are anchors.
        """
        _check_labels("embeddings", embeddings, labels)
        if labels is None and indices_tuple is None:
            raise ValueError("labels and indices_tuple must not both be None")
        keys = embeddings if ref_emb is None else ref_emb
        key_labels = labels if ref_emb is None else ref_labels
        _check_labels("ref_emb", keys, key_labels)
        if embeddings.dim() != 2 or keys.dim() != 2:
            raise ValueError(f"embeddings must be [N, D]; got {list(embeddings.shape)} and {list(keys.shape)}")
        q = unit_rows(embeddings) if self.normalise else embeddings
        k = q if keys is embeddings else (unit_rows(keys) if self.normalise else keys).to(q.dtype)
        if indices_tuple is not None:
            losses = self._of_pairs(q, k, *_four(indices_tuple, embeddings.device))
        else:
            same = key_labels is None or key_labels is labels
            if same and len(k) < len(q):
                raise IndexError(f"ref_emb without ref_labels needs the {len(q)} rows of embeddings; got {len(k)}")
            k = k[: len(q)] if same and len(k) > len(q) else k
            losses = self._of_labels(q, k, *_integers(labels, labels if same else key_labels, q.device), same)
        return (embeddings * 0).sum() if losses is None else self.reduce(losses)

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

    default_reducer = "MeanReducer"

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

    default_reducer = "AvgNonZeroReducer"

    def __init__(self, temperature: float = 0.1, **kwargs: object) -> None:
        super().__init__(temperature, **kwargs)

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
        return torch.where(counts > 0, lse - mean, 0)

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
        return torch.where(counts > 0, lse.where(counts > 0, 0) - mean, 0)


def _too_few(positives: int, negatives: int) -> bool:
    """Whether the library calls the loss 0: one kind of pair is missing, or there is but one of each."""
    return min(positives, negatives) == 0 or max(positives, negatives) <= 1


def _normalises(distance: object) -> bool:
    """Whether the distance takes rows of unit length; None does."""
    if distance is None:
        return True
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


def _four(indices: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """(anchors, positives, anchors, negatives), triplets written out."""
    if len(indices) == 3:
        anchor, positive, negative = indices
        indices = anchor, positive, anchor, negative
    return tuple(x.to(device) for x in indices)


def _integers(labels: Tensor, other: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Labels of any dtype as 0 … classes − 1, equal where they are equal."""
    both = torch.cat([labels.to(device), other.to(device)]).unique(return_inverse=True)[1]
    return both[: len(labels)], both[len(labels) :]
