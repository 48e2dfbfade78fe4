"""What makes a family of models: its network while it is trained, and how it is shaped and served."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.base import Float64, Model

Weights = Mapping[str, Tensor]  # by name, float32


class Batch(NamedTuple):
    """Windows that a network is trained on; tuples of tensors only, so that many networks can be trained at once.

    Attributes:
        x: H + 1 points each, the last one being the point that a live window would assess, (B, H + 1, F) float32,
            standardised, gaps filled. A feature that never moved in training is 0 throughout.
        counts: which values may count in a loss: they arrived, are not labelled anomalous, and their feature moves,
            (B, H + 1, F) bool.
        code: minute, hour and weekday (0 = Sunday) of the last point, UTC, (B, 3) int64.
    """

    x: Tensor
    counts: Tensor
    code: Tensor


class Network(nn.Module):
    """The layers of a family while they are trained."""

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss of each window, (B,); randomness comes from torch's global generator."""
        raise NotImplementedError

    def measure(self, batch: Batch) -> dict[str, Float64]:
        """Return the constants that only a trained network can tell, from some thousand windows of its training."""
        return {}


def hide_newest(x: Tensor) -> Tensor:
    """Windows whose last point repeats the one before it, (B, W, F)."""
    return torch.cat([x[:, :-1], x[:, -2:-1]], dim=1)


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of model: how it is shaped, trained and served.

    Attributes:
        name: as `config.json` and `tocsin train --model` name it.
        title: for people.
        method: for people, how it comes to a score.
        config: its dataclass of plain values.
        shapes: of a config, name and shape of every weight, in the order of the layers.
        network: of a config, the layers with new random weights; its `state_dict` has the names of `shapes`.
        serve: of a config, weights and constants, the model; `stacked`: each has one more axis in front, the members.
        stackable: whether many of one config can be trained and served at once.
        history: of a config, H as its served model has it; W by default, as of a forecaster.
        reads_point: of a config, whether the network sees the point itself, as in a reconstruction. Then windows with
            gaps and labelled points are trained on too: `Batch.counts` says which values are none.
        yardstick: the loss of each window, (B,), with the last value as the forecast; for the record only. None: the
            loss is of another kind.
        training: fields of `models.train.TrainConfig` that this family's training begins with.
    """

    name: str
    title: str
    method: str
    config: type[Any]
    shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    network: Callable[[Any], Network]
    serve: Callable[..., Model]
    stackable: bool = True
    history: Callable[[Any], int] = lambda config: int(config.window)
    reads_point: Callable[[Any], bool] = lambda config: False
    yardstick: Callable[[Batch], Tensor] | None = None
    training: Mapping[str, float] = field(default_factory=dict)
