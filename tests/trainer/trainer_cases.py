"""Small configurations that train in a second or two."""

import itertools
from pathlib import Path

from torch import Tensor

from hsv.config import METHODS, Config, load_config


def tiny_config(output: Path | str, **run: object) -> Config:
    """Two narrow blocks on the embedded digits, with drop-path and colour changes on."""
    config = load_config(preset="digits")
    config.output = str(output)
    config.input.limit, config.input.workers = 200, 0
    config.encoder.embed_dim, config.encoder.depth, config.encoder.num_heads = 32, 2, 2
    config.encoder.drop_path = 0.3
    config.simclr.hidden_dim, config.simclr.out_dim = 32, 16
    config.mae.decoder_dim, config.mae.decoder_depth = 32, 1
    for name, value in {"batch_size": 64, "steps": 4, "log_every": 1, "progress": False, **run}.items():
        assert hasattr(config.run, name), name
        setattr(config.run, name, value)
    return config


def tiny_model(**arguments: object) -> dict:
    """Arguments of `hsv.models.Encoder` for a narrow vision transformer."""
    return {"img_size": 16, "patch_size": 4, "in_chans": 3, "embed_dim": 32, "depth": 2, "num_heads": 2, **arguments}


def narrow_config(output: Path | str, objectives: list[str], **run: object) -> Config:
    """`tiny_config` for any objectives, with narrow heads, few prototypes, small crops and keys."""
    config = tiny_config(output, **run)
    config.objectives = objectives
    narrow = {"hidden_dim": 24, "out_dim": 16, "bottleneck_dim": 12, "predictor_dim": 12, "prototypes": 16}
    narrow |= {"queue_size": 100, "num_locals": 2, "vocabulary": 32, "decoder_dim": 32}
    narrow |= {"decoder_depth": 1, "feature_depth": 1}
    for name, (key, value) in itertools.product(METHODS, narrow.items()):
        if hasattr(getattr(config, name), key):
            setattr(getattr(config, name), key, value)
    return config


def sinkhorn(scores: Tensor, temperature: float) -> Tensor:
    """Assignments [B, K]: prototypes used alike and samples of mass 1, in turn, three times."""
    q = (scores.double() / temperature).exp()
    for _ in range(3):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdim=True)
    return q
