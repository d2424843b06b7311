"""The shared encoder and what objectives put on top of it."""

from hsv.models.decoder import Decoder
from hsv.models.encoder import Encoder, Encoding
from hsv.models.heads import SyncBatchNorm, projector

__all__ = ["Decoder", "Encoder", "Encoding", "SyncBatchNorm", "projector"]
