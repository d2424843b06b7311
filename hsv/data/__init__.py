"""Images in, batches of views out."""

from hsv.data.channels import to_channels
from hsv.data.colour import normalise, photometric
from hsv.data.decode import UndecodableImage
from hsv.data.loader import Batch, ViewLoader, default_workers, plain_batches
from hsv.data.moments import sample_images, statistics
from hsv.data.sources import ArraySource, FolderSource, MissingSplit, Source, digits, open_source
from hsv.data.views import MAE, SIMCLR_224, ViewSpec

__all__ = [
    "MAE",
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
    "sample_images",
    "statistics",
    "to_channels",
]
