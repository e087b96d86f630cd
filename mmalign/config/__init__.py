"""Config: YAML to typed, frozen values, every fault told at once, and the command line of each verb.

@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    data: str                                                    # no default: required
    steps: int = 2000
    loss: Annotated[Choice, Table("mmalign.losses:LOSSES")]      # {name: dpo, beta: 5000} or plain dpo

config = read_config(TrainConfig, "configs/x.yaml", ["loss.beta=2000"])
config.loss.build(policy, reference)
"""

from mmalign.config.command import command_line, read_config, tell
from mmalign.config.description import describe, describe_names
from mmalign.config.schema import Choice, Setting, Table, import_address, settings_of
from mmalign.config.writing import check_folder, differences, environment, resolved, write_resolved

__all__ = [
    "Choice",
    "Setting",
    "Table",
    "check_folder",
    "command_line",
    "describe",
    "describe_names",
    "differences",
    "environment",
    "import_address",
    "read_config",
    "resolved",
    "settings_of",
    "tell",
    "write_resolved",
]
