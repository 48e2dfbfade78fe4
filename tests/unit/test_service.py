from pathlib import Path

import numpy as np
import pytest

from models.checkpoint import Checkpoint, Training
from models.deepant import DeepAnT, DeepAnTConfig, Network
from models.pot import PotConfig
from stream.errors import CheckpointError
from stream.registry import served


def checkpoint(features: int, metrics: tuple[str, ...]) -> Checkpoint:
    shape = DeepAnTConfig(window=10, features=features, filters=2, hidden=2)
    scores = np.random.default_rng(0).exponential(size=20_000).astype(np.float32)
    return Checkpoint(
        "servers", 1, Path(), DeepAnT(shape, Network(shape).state_dict()), (scores,), None, Training(), metrics
    )


def test_a_model_of_several_features_must_know_their_names() -> None:
    with pytest.raises(CheckpointError, match=r"servers@1 takes 2 features and names 0 metrics: train it anew"):
        served(checkpoint(2, ()), PotConfig())
    assert served(checkpoint(2, ("cpu", "load")), PotConfig()).metrics == ("cpu", "load")


def test_scores_of_the_very_series_calibrate_those_of_others_are_a_prior() -> None:
    own = served(checkpoint(1, ()), PotConfig())
    assert own.calibrations
    assert own.prior is None
    shape = DeepAnTConfig(window=10, scaling="window", filters=2, hidden=2)
    general = Checkpoint(
        "general",
        1,
        Path(),
        DeepAnT(shape, Network(shape).state_dict()),
        checkpoint(1, ()).calibrations,
        None,
        Training(),
    )
    other = served(general, PotConfig())
    assert not other.calibrations
    assert other.prior is not None
