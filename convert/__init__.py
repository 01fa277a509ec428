"""The weight bridge between PyTorch and Flax, for use from a checkout; what it does stands in `anyup_core.checkpoints`.

`read` and `write` handle .pth, .pt, .safetensors and Orbax directories; `load` also knows the published and the shipped
checkpoints by their names. A `Checkpoint` gives its weights as PyTorch names them (`tensors`) and as Flax does
(`flax()`); so does the `EncoderCheckpoint` of a vision encoder.
"""

from anyup_core.checkpoints.checkpoint import Checkpoint
from anyup_core.checkpoints.encoder_checkpoint import EncoderCheckpoint
from anyup_core.checkpoints.formats import read, write
from anyup_core.checkpoints.names import NAMES, load

__all__ = ["NAMES", "Checkpoint", "EncoderCheckpoint", "load", "read", "write"]
