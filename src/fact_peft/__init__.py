"""FacT, Factor-Tuning (Jie & Deng, AAAI 2023), as a PEFT method. Importing this package registers it with PEFT."""

from .config import FacTConfig
from .layer import FacTLinear
from .model import FacTModel
from .registration import register

__version__ = "0.1.0"
__all__ = ["FacTConfig", "FacTLinear", "FacTModel"]

register(FacTConfig, FacTModel)
