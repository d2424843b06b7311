"""The shared encoder and what objectives put on top of it."""

from hsv.models.decoder import Decoder
from hsv.models.encoder import Encoder, Encoding
from hsv.models.heads import Prototypes, SyncBatchNorm, mlp
from hsv.models.positions import resample_positions
from hsv.models.teacher import teacher_of

__all__ = ["Decoder", "Encoder", "Encoding", "Prototypes", "SyncBatchNorm", "mlp", "resample_positions", "teacher_of"]
