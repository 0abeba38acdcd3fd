"""The whole configuration: every key with its type, default, limits and one line of help, section by section.

A section is a frozen pydantic model that refuses unknown keys. Checks that need one section live in that section;
checks across sections live in `combinations`. Stages receive the whole `Config` and read their own section.
"""

from pydantic import Field, model_validator

from qtale_jax.config.architecture import ArchitectureConfig, DropConfig, ModelConfig, RopeScalingConfig
from qtale_jax.config.budget import BudgetConfig
from qtale_jax.config.combinations import check_combinations
from qtale_jax.config.data import DataConfig
from qtale_jax.config.distributed import DistributedConfig
from qtale_jax.config.experiment import ExperimentConfig, PointsConfig
from qtale_jax.config.measuring import CalibrateConfig, EvaluateConfig, GenerateConfig, HarnessConfig
from qtale_jax.config.planning import PlanConfig
from qtale_jax.config.profiling import ProfileConfig
from qtale_jax.config.quantization import (
    CALIBRATED,
    AWQConfig,
    GPTQConfig,
    MagRConfig,
    QuantizationRuleConfig,
    QuantizeConfig,
    StatisticsConfig,
)
from qtale_jax.config.routing import LinearName, LoraConfig, RoutingConfig
from qtale_jax.config.section import Section, Seed
from qtale_jax.config.serving import ServeConfig
from qtale_jax.config.training import (
    DistillationConfig,
    MeshConfig,
    OptimizerConfig,
    QuantizationAwareConfig,
    TrainConfig,
    WeightFormatConfig,
)

__all__ = [
    "AWQConfig",
    "ArchitectureConfig",
    "BudgetConfig",
    "CALIBRATED",
    "CalibrateConfig",
    "Config",
    "DataConfig",
    "DistillationConfig",
    "DistributedConfig",
    "DropConfig",
    "EvaluateConfig",
    "ExperimentConfig",
    "GPTQConfig",
    "GenerateConfig",
    "HarnessConfig",
    "LinearName",
    "LoraConfig",
    "MagRConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PlanConfig",
    "PointsConfig",
    "ProfileConfig",
    "QuantizationAwareConfig",
    "QuantizationRuleConfig",
    "QuantizeConfig",
    "RopeScalingConfig",
    "RoutingConfig",
    "ServeConfig",
    "StatisticsConfig",
    "TrainConfig",
    "WeightFormatConfig",
]


class Config(Section):
    """One experiment; `output` is the folder that holds everything it writes."""

    output: str = Field(default="runs/default", description="folder for models, logs and reports")
    seed: Seed = Field(default=0, description="seed of initialisation, data order, noise")
    model: ModelConfig = Field(default=ModelConfig(), description="starting point")
    routing: RoutingConfig = Field(default=RoutingConfig(), description="token-adaptive execution")
    lora: LoraConfig | None = Field(default=LoraConfig(), description="adapters; null: none")
    data: DataConfig = Field(default=DataConfig(), description="data")
    train: TrainConfig = Field(default=TrainConfig(), description="training")
    mesh: MeshConfig = Field(default=MeshConfig(), description="devices")
    distributed: DistributedConfig = Field(default=DistributedConfig(), description="processes")
    profile: ProfileConfig = Field(default=ProfileConfig(), description="trace of training steps")
    quantize: QuantizeConfig = Field(default=QuantizeConfig(), description="quantization")
    calibrate: CalibrateConfig = Field(default=CalibrateConfig(), description="threshold")
    budget: BudgetConfig = Field(default=BudgetConfig(), description="speed that theta is calibrated for")
    evaluate: EvaluateConfig = Field(default=EvaluateConfig(), description="evaluation")
    harness: HarnessConfig = Field(default=HarnessConfig(), description="lm-evaluation-harness")
    generate: GenerateConfig = Field(default=GenerateConfig(), description="generation")
    serve: ServeConfig = Field(default=ServeConfig(), description="server")
    plan: PlanConfig = Field(default=PlanConfig(), description="planner")
    experiment: ExperimentConfig = Field(default=ExperimentConfig(), description="grid of stages")

    @model_validator(mode="after")
    def _check(self):
        check_combinations(self)
        return self
