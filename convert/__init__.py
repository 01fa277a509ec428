"""The weight bridge between PyTorch and Flax. It speaks numpy; torch, jax and orbax are imported only where needed.

`read` and `write` handle .pth, .pt, .safetensors and Orbax directories; `load` also knows the published
checkpoints and those that are shipped, by their names.
A `Checkpoint` gives its weights as PyTorch names them (`tensors`) and as Flax does (`flax()`); so does the
`EncoderCheckpoint` of a vision encoder, which `encoder_files` reads and `write` writes.
"""

from convert.apply import Checkpoint
from convert.encoder import EncoderCheckpoint
from convert.io import read, write
from convert.release import NAMES, load

__all__ = ["NAMES", "Checkpoint", "EncoderCheckpoint", "load", "read", "write"]
