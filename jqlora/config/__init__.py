"""A run's settings: what there is (:mod:`.schema`) and how it is read (:mod:`.reading`)."""

from jqlora.config.methods import AdaLoRAConfig, LoRAConfig, MethodConfig
from jqlora.config.reading import dump_config, known_keys, read_config
from jqlora.config.schema import (
    DataConfig,
    ModelConfig,
    OutputConfig,
    QuantizeConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)

__all__ = [
    "AdaLoRAConfig",
    "DataConfig",
    "LoRAConfig",
    "MethodConfig",
    "ModelConfig",
    "OutputConfig",
    "QuantizeConfig",
    "RunConfig",
    "SampleConfig",
    "TrainConfig",
    "dump_config",
    "known_keys",
    "read_config",
]
