"""Images in, batches of views out."""

from .channels import to_channels
from .colour import normalise, photometric
from .decode import UndecodableImage
from .loader import Batch, ViewLoader, default_workers, plain_batches
from .moments import statistics
from .sources import ArraySource, FolderSource, MissingSplit, Source, digits, open_source
from .views import DIGITS, MAE, SIMCLR_32, SIMCLR_224, ViewSpec

__all__ = [
    "DIGITS",
    "MAE",
    "SIMCLR_32",
    "SIMCLR_224",
    "ArraySource",
    "Batch",
    "FolderSource",
    "MissingSplit",
    "Source",
    "UndecodableImage",
    "ViewLoader",
    "ViewSpec",
    "default_workers",
    "digits",
    "normalise",
    "open_source",
    "photometric",
    "plain_batches",
    "statistics",
    "to_channels",
]
