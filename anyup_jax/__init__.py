from anyup_jax.config import AnyUpConfig
from anyup_jax.model import AnyUp
