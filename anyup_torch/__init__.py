from anyup_torch.config import AnyUpConfig
from anyup_torch.model import AnyUp
