"""A whole recipe: every group of fields as one frozen value."""

from dataclasses import dataclass, field

from recipes.schema.checkpoint import CheckpointConfig
from recipes.schema.data import DataConfig
from recipes.schema.evaluate import EvaluateConfig
from recipes.schema.launch import LaunchConfig
from recipes.schema.model import ModelConfig
from recipes.schema.objective import ObjectiveConfig
from recipes.schema.optim import OptimConfig, ScheduleConfig
from recipes.schema.parallel import ParallelConfig
from recipes.schema.precision import PrecisionConfig
from recipes.schema.run import RunConfig
from recipes.schema.telemetry import TelemetryConfig


@dataclass(frozen=True)
class Recipe:
    """A complete recipe of a run. On the command line, `precision=bf16` swaps a group and `optim.lr=3e-4` overrides a field."""

    run: RunConfig
    """Name, length and size of a step."""
    model: ModelConfig
    """Shape of the model."""
    data: DataConfig
    """Sources, tokenizer, and the order of rows."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Degrees of parallelism."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Number formats and backend."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What the model is trained to do."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over time."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save, and what to keep."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Held-out evaluation."""
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    """Progress, metrics files, Weights & Biases."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Processes, machines, Slurm."""
