"""The configuration of a run: one tree of dataclasses that the command line, the YAML file and the checkpoint share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hsv.config.checks import positive, require
from hsv.config.contrastive import CANConfig, CPCConfig, MoCoConfig, SimCLRConfig
from hsv.config.convert import build, plain
from hsv.config.distillation import BYOLConfig, DINOConfig, IBOTConfig, SimSiamConfig, SwAVConfig
from hsv.config.reconstruction import BEiTConfig, CMAEConfig, DAEConfig, MAEConfig
from hsv.config.run import EncoderConfig, InputConfig, OptimiserConfig, RunConfig, WeightingConfig

__all__ = [
    "METHODS",
    "Config",
    "load_config",
    "preset_files",
    "preset_named_in",
    "preset_names",
    "preset_path",
    "read_yaml",
]


@dataclass
class Config:
    """Pre-training of a vision transformer on images without labels."""

    data: str | None = None
    """What to train on, always needed: `digits` (embedded), a folder of images, or a folder or glob of tar shards."""
    output: str | None = None
    """Folder of the run; unset = runs/DATA-TIME."""
    init: str | None = None
    """Weights to start from: `timm` (pretrained weights of `encoder.name`), a file, or the folder of an earlier run."""
    minutes: float | None = None
    """Length of the training in minutes: measured once, when the run begins, and from then on a number of steps."""
    objectives: list[str] = field(default_factory=lambda: ["simclr", "mae"])
    """What is trained together, of the methods whose settings follow, such as `[simclr, mae]`."""
    input: InputConfig = field(default_factory=InputConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    simclr: SimCLRConfig = field(default_factory=SimCLRConfig)
    moco: MoCoConfig = field(default_factory=MoCoConfig)
    byol: BYOLConfig = field(default_factory=BYOLConfig)
    simsiam: SimSiamConfig = field(default_factory=SimSiamConfig)
    dino: DINOConfig = field(default_factory=DINOConfig)
    swav: SwAVConfig = field(default_factory=SwAVConfig)
    mae: MAEConfig = field(default_factory=MAEConfig)
    ibot: IBOTConfig = field(default_factory=IBOTConfig)
    beit: BEiTConfig = field(default_factory=BEiTConfig)
    cpc: CPCConfig = field(default_factory=CPCConfig)
    dae: DAEConfig = field(default_factory=DAEConfig)
    can: CANConfig = field(default_factory=CANConfig)
    cmae: CMAEConfig = field(default_factory=CMAEConfig)
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_dict(self) -> dict[str, Any]:
        """The tree as plain dictionaries, lists and numbers."""
        return plain(self)

    def save(self, path: Path) -> None:
        """Write the tree as YAML."""
        path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of `to_dict`; keys that are missing take their defaults, unknown ones raise."""
        return build(cls, values, "config")

    def check(self) -> None:
        """Raise ValueError for the first setting that cannot work."""
        known = ", ".join(METHODS)
        named = self.objectives
        require(
            bool(named) and set(named) <= set(METHODS) and len(set(named)) == len(named),
            "objectives",
            named,
            f"one or more of {known}, each once",
        )
        positive("minutes", self.minutes, optional=True)
        self.encoder.check("encoder")
        self.input.check("input")
        self.optimiser.check("optimiser")
        self.run.check("run")
        self.weighting.check("weighting", named)
        for name in METHODS:
            getattr(self, name).check(name)
        require(
            self.minutes is None or self.run.steps is None,
            "minutes and run.steps",
            (self.minutes, self.run.steps),
            "one of them",
        )
        self.check_negatives(self.run.batch_size // self.run.accumulate)
        require(bool(self.data), "data", self.data, "digits, a folder of images, or tar shards")

    def check_negatives(self, images: int) -> None:
        """Raise ValueError if so few images are contrasted with each other that there are no negatives."""
        contrastive = {"simclr", "can", "cmae"} | ({"moco"} if self.moco.version == "v3" else set())
        named = [name for name in self.objectives if name in contrastive]
        require(
            images > 1 or not named,
            "run.batch_size",
            self.run.batch_size,
            f"two images or more in each micro-batch, and on each rank with local negatives: in {', '.join(named)} the "
            "others are an image's negatives",
        )


SECTIONS = {"input", "encoder", "weighting", "optimiser", "run"}
METHODS = tuple(f.name for f in dataclasses.fields(Config) if f.type.endswith("Config") and f.name not in SECTIONS)
"""Names of the objectives."""


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    folder = resources.files("hsv.presets")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def preset_path(name: str) -> Path:
    """Path of a preset's YAML file. Raises ValueError for an unknown name."""
    require(name in preset_names(), "preset", name, f"one of {', '.join(preset_names())}")
    return Path(str(resources.files("hsv.presets") / f"{name}.yaml"))


def load_config(path: str | Path | None = None, *, preset: str | None = None) -> Config:
    """A configuration from a YAML file, a preset, or the file over the preset.

    The file may name its preset itself, under the key `preset`; the argument comes before it.
    """
    own = read_yaml(path) if path is not None else {}
    named = own.pop("preset", None)
    values: dict[str, Any] = {}
    for file in preset_files(preset or named):
        _merge(values, read_yaml(file))
    _merge(values, own)
    values.pop("preset", None)
    return Config.from_dict(values)


def preset_files(name: str | None) -> list[Path]:
    """The YAML files that a preset consists of: it may start from another one, whose file comes first."""
    if name is None:
        return []
    path = preset_path(name)
    return [*preset_files(preset_named_in(path)), path]


def preset_named_in(path: str | Path) -> str | None:
    """The preset that a YAML file starts from, if it names one."""
    return read_yaml(path).get("preset")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, none for an empty one. Raises ValueError for anything else."""
    allowed = "a YAML file of settings"
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ValueError(f"config: got {str(path)!r}; allowed: {allowed} ({reason})") from error
    if not isinstance(values, dict | None):
        raise ValueError(f"config: got {str(path)!r}, which holds a {type(values).__name__}; allowed: {allowed}")
    return values or {}


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
