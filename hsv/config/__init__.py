"""The configuration of a run: settings of the run, settings of each method, and the tree that holds them."""

from hsv.config.contrastive import CANConfig, CPCConfig, MoCoConfig, SimCLRConfig
from hsv.config.distillation import (
    BYOLConfig,
    DINOConfig,
    IBOTConfig,
    SelfDistillationConfig,
    SimSiamConfig,
    SwAVConfig,
)
from hsv.config.reconstruction import BEiTConfig, CMAEConfig, DAEConfig, MAEConfig
from hsv.config.run import EncoderConfig, InputConfig, OptimiserConfig, RunConfig, WeightingConfig
from hsv.config.tree import (
    METHODS,
    Config,
    load_config,
    preset_files,
    preset_named_in,
    preset_names,
    preset_path,
    read_yaml,
)

__all__ = [
    "METHODS",
    "BEiTConfig",
    "BYOLConfig",
    "CANConfig",
    "CMAEConfig",
    "CPCConfig",
    "Config",
    "DAEConfig",
    "DINOConfig",
    "EncoderConfig",
    "IBOTConfig",
    "InputConfig",
    "MAEConfig",
    "MoCoConfig",
    "OptimiserConfig",
    "RunConfig",
    "SelfDistillationConfig",
    "SimCLRConfig",
    "SimSiamConfig",
    "SwAVConfig",
    "WeightingConfig",
    "load_config",
    "preset_files",
    "preset_named_in",
    "preset_names",
    "preset_path",
    "read_yaml",
]
