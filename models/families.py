"""The families of models, by name."""

from importlib import import_module

from models.errors import ConfigError
from models.family import Family

NAMES = ("deepant", "bagel", "mtad_gat", "autoencoder", "vae")


def family(name: str) -> Family:
    """Return a family.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in NAMES:
        raise ConfigError(f"family {name!r} is not known; known: {', '.join(NAMES)}")
    found: Family = import_module(f"models.{name}").FAMILY
    return found
