"""FacT, Factor-Tuning (Jie & Deng, AAAI 2023), as a PEFT method. Importing this package registers it with PEFT."""

from .config import FacTConfig
from .hotswap import hotswap_adapter
from .layer import FacTLinear
from .lora import convert_to_lora, save_as_lora
from .model import FacTModel
from .registration import register

__version__ = "0.1.0"
__all__ = ["FacTConfig", "FacTLinear", "FacTModel", "convert_to_lora", "hotswap_adapter", "save_as_lora"]

register(FacTConfig, FacTModel)
