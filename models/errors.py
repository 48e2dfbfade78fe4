"""The exception tree of Tocsin, branched by who has to act.

TocsinError
├── ConfigError        a setting or an argument is wrong          -> the operator, exit code 2
│   └── InputError     a file to read cannot be read as asked     -> the operator, exit code 2
├── CheckpointError    a checkpoint is missing, damaged or of another kind
├── StateError         a state blob is damaged or of an unknown version
├── RecordError        one record cannot be read                  -> the reject topic
├── BrokerError        Kafka is absent, refuses or fails          -> retried, then exit code 1
└── StoreError         Redis is absent, refuses or fails          -> retried, then exit code 1

Every message names the value, the bound that it breaks, and the next step.
"""


class TocsinError(Exception):
    """The root: everything that Tocsin raises on purpose."""

    exit_code = 1


class ConfigError(TocsinError):
    """A setting or an argument is wrong; the operator has to change it."""

    exit_code = 2


class InputError(ConfigError):
    """A file cannot be read as asked: no rows, no such column, not a CSV."""


class CheckpointError(TocsinError):
    """A checkpoint is missing, damaged, or of another kind than asked."""


class StateError(TocsinError):
    """A state blob is damaged, or of a version that this program does not know."""


class RecordError(TocsinError):
    """One record cannot be read; it goes to the reject topic."""


class BrokerError(TocsinError):
    """Kafka is absent, refuses, or fails for longer than the retries last."""


class StoreError(TocsinError):
    """Redis is absent, refuses, or fails for longer than the retries last."""
