"""The configuration of a run: settings of the run, settings of each method, and the tree that holds them."""

from hsv.config.contrastive import MoCoConfig, SimCLRConfig
from hsv.config.distillation import BYOLConfig, DINOConfig, SimSiamConfig, SwAVConfig
from hsv.config.reconstruction import MAEConfig
from hsv.config.run import EncoderConfig, InputConfig, OptimiserConfig, RunConfig, WeightingConfig
from hsv.config.tree import METHODS, Config, load_config, preset_files, preset_named_in, preset_names, preset_path

__all__ = [
    "METHODS",
    "BYOLConfig",
    "Config",
    "DINOConfig",
    "EncoderConfig",
    "InputConfig",
    "MAEConfig",
    "MoCoConfig",
    "OptimiserConfig",
    "RunConfig",
    "SimCLRConfig",
    "SimSiamConfig",
    "SwAVConfig",
    "WeightingConfig",
    "load_config",
    "preset_files",
    "preset_named_in",
    "preset_names",
    "preset_path",
]
