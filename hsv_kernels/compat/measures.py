"""The distance and the reducers that pytorch-metric-learning's losses have by default, for who reads them of a loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["AvgNonZeroReducer", "CosineSimilarity", "MeanReducer"]


class CosineSimilarity(nn.Module):
    """The library's distance of this name, as its miners and losses call it: greater is nearer."""

    normalize_embeddings = is_inverted = True
    p, power = 2, 1

    def forward(self, query_emb: Tensor, ref_emb: Tensor | None = None) -> Tensor:
        """Cosines [N, M] of rows [N, D] and [M, D], None for the same rows."""
        return self.normalize(query_emb) @ self.normalize(query_emb if ref_emb is None else ref_emb).T

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return (query_emb * ref_emb).sum(1)

    def normalize(self, embeddings: Tensor, dim: int = 1) -> Tensor:
        return F.normalize(embeddings, dim=dim)

    def smallest_dist(self, *args: object, **kwargs: object) -> object:
        return torch.max(*args, **kwargs)

    def largest_dist(self, *args: object, **kwargs: object) -> object:
        return torch.min(*args, **kwargs)

    def margin(self, x: Tensor, y: Tensor) -> Tensor:
        return y - x


class MeanReducer(nn.Module):
    """The library's reducer of this name: the mean of all losses."""

    def forward(self, loss_dict: dict[str, dict], embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        """A scalar of the one entry of `loss_dict`, {"losses": [P], ...}; its losses are the number 0 for none."""
        (entry,) = loss_dict.values()
        if not isinstance(entry["losses"], Tensor):
            return (embeddings * 0).sum()
        return self.reduced(entry["losses"], embeddings)

    def reduced(self, losses: Tensor, embeddings: Tensor) -> Tensor:
        return losses.mean()


class AvgNonZeroReducer(MeanReducer):
    """The mean of the losses above zero; without any, 0 from the embeddings, which passes their NaN on."""

    def reduced(self, losses: Tensor, embeddings: Tensor) -> Tensor:
        positive = losses > 0
        if not positive.any():  # a branch: of NaN that no loss is made of there is no gradient
            return (embeddings * 0).sum()
        return losses.where(positive, 0).sum() / positive.sum()
