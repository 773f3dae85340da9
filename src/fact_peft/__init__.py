"""FacT, Factor-Tuning (Jie & Deng, AAAI 2023), as a PEFT method. Importing this package registers it with PEFT."""

from .adapter.adapter import Adapter
from .adapter.config import FacTConfig
from .converters.conversion import convert_checkpoint, convert_from
from .operations.export import convert_to_lora, save_as_lora
from .operations.gradient_start import initialize_from_gradients
from .operations.parameter_groups import parameter_groups
from .operations.replacement import hotswap_adapter, quantize_adapter
from .serving.pool import AdapterPool, Prediction
from .sharing.classifier import load_image_classifier, push_image_classifier, save_image_classifier
from .tuner.combination import weighted_sum
from .tuner.layer import FacTLinear
from .tuner.model import FacTModel
from .upstream import register

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "AdapterPool",
    "FacTConfig",
    "FacTLinear",
    "FacTModel",
    "Prediction",
    "convert_checkpoint",
    "convert_from",
    "convert_to_lora",
    "hotswap_adapter",
    "initialize_from_gradients",
    "load_image_classifier",
    "parameter_groups",
    "push_image_classifier",
    "quantize_adapter",
    "save_as_lora",
    "save_image_classifier",
    "weighted_sum",
]

register(FacTConfig, FacTModel)
