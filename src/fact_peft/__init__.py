"""FacT, Factor-Tuning (Jie & Deng, AAAI 2023), as a PEFT method. Importing this package registers it with PEFT."""

from .classifier import load_image_classifier, push_image_classifier, save_image_classifier
from .config import FacTConfig
from .hotswap import hotswap_adapter
from .layer import FacTLinear
from .lora import convert_to_lora, save_as_lora
from .model import FacTModel
from .registration import register

__version__ = "0.1.0"
__all__ = [
    "FacTConfig",
    "FacTLinear",
    "FacTModel",
    "convert_to_lora",
    "hotswap_adapter",
    "load_image_classifier",
    "push_image_classifier",
    "save_as_lora",
    "save_image_classifier",
]

register(FacTConfig, FacTModel)
