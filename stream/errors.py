"""The exceptions of the service: the tree of `models.errors`, under the name that `stream` uses."""

from models.errors import (
    BrokerError,
    CheckpointError,
    ConfigError,
    InputError,
    RecordError,
    StateError,
    StoreError,
    TocsinError,
)

__all__ = [
    "BrokerError",
    "CheckpointError",
    "ConfigError",
    "InputError",
    "RecordError",
    "StateError",
    "StoreError",
    "TocsinError",
]
