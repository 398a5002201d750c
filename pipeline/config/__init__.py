"""What a command was asked to do: one frozen, validated object each; the only source of defaults.

Flags, their help and docs/cli.md are made from these (`setting`), `train` writes its own, resolved,
into the run directory. A --config file knows exactly these field names.
"""

from pipeline.config.caches import CopyConfig, ExtractConfig, LabelConfig, VerifyConfig
from pipeline.config.passes import (
    Member,
    PassConfig,
    Question,
    SweepConfig,
    TrainConfig,
    cross,
    fitting_warmup,
)
from pipeline.config.runs import EvaluateConfig, PredictConfig, ReportConfig

__all__ = [
    "CopyConfig",
    "EvaluateConfig",
    "ExtractConfig",
    "LabelConfig",
    "Member",
    "PassConfig",
    "PredictConfig",
    "Question",
    "ReportConfig",
    "SweepConfig",
    "TrainConfig",
    "VerifyConfig",
    "cross",
    "fitting_warmup",
]
