"""What the served models of all families share: their weights and constants, plain or stacked, and passes over them.

A stack holds many models of one config: each weight and constant has one more axis in front, K, the members. Its passes
are those of a plain model, mapped over the members (`torch.func.vmap`), which makes batched matrix products of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.base import Assessment, Bool, Config, Constants, Context, Float64
from models.batching import SIZES, run_padded
from models.errors import ConfigError
from models.family import Weights
from models.scaling import normalise, standardise

C = TypeVar("C", bound=Config)

CACHE = 2**20  # bytes of activations that one chunk may take


class ServedModel(Generic[C]):
    """The part of a model that does not depend on its family.

    Attributes:
        config: shape and scaling.
        constants: as they are in the checkpoint: `center` and `scale` (standardisation), `usual_step` and `still` (see
            below) and what the family measures; (F,) float64 each, or (K, F).
        members: K of a stack; 0 of a plain model.
        packed: the weights in the form that the passes read.
    """

    family: ClassVar[str]
    reads_point: ClassVar[bool]
    looks_ahead: ClassVar[bool] = False

    def __init__(self, config: C, weights: Weights, constants: Constants, *, stacked: bool = False) -> None:
        """Take weights and constants over; a missing `center` is 0, `scale` 1, `still` none.

        Raises:
            ConfigError: a constant has another shape, or is not finite or not in its bounds.
        """
        self.config = config
        self.raw = {name: tensor.detach() for name, tensor in weights.items()}
        self.members = len(next(iter(weights.values()))) if stacked else 0
        lead, shape = ((self.members,) if stacked else ()), (config.features,)
        known: dict[str, Float64] = {"center": np.zeros(lead + shape), "scale": np.ones(lead + shape)}
        self.constants = known | {name: np.array(one, dtype=np.float64) for name, one in constants.items()}
        for name, one in self.constants.items():
            if one.shape[: len(lead)] != lead or (name in _PER_FEATURE and one.shape != lead + shape):
                raise ConfigError(f"{name} is {one.shape}, and {'x'.join(map(str, lead + shape))} numbers are needed")
            if not np.isfinite(one).all():
                raise ConfigError(f"{name}={one.tolist()} must be finite")
        if not (self.constants["scale"] > 0).all():
            raise ConfigError(f"scale={self.constants['scale'].tolist()} must be above 0")
        usual = self.constants.get("usual_step")
        if usual is not None and not (usual >= 0).all():
            raise ConfigError(f"usual_step={usual.tolist()} must be at least 0")
        # A feature that never moved in training can teach nothing: the network sees 0, its forecast is its last value.
        self.still: Bool = self.constants.get("still", np.zeros(lead + shape)) != 0

    @property
    def window(self) -> int:
        """W, the points that the network reads at once."""
        return self.config.window

    @property
    def features(self) -> int:
        """F, the metrics of one point."""
        return self.config.features

    @property
    def neutral(self) -> Float64:
        """What stands for a feature that has never been seen: the center of the training data, (F,) or (K, F)."""
        return self.constants["center"]

    @property
    def parameters(self) -> int:
        """The number of weights, of one member."""
        return sum(tensor.numel() for tensor in self.raw.values()) // max(self.members, 1)

    @property
    def history(self) -> int:
        """H, the points before the one that is assessed."""
        raise NotImplementedError

    def assess(self, context: Context) -> Assessment:
        """Say of each point what was expected and how far off it is."""
        raise NotImplementedError

    def constant(self, name: str, context: Context) -> Float64:
        """A constant as it is for each row, (B, ...)."""
        one = self.constants[name]
        if self.members:
            assert context.member is not None, "a stack is told which member each row has"
            return one[context.member]
        return np.broadcast_to(one, (len(context), *one.shape))

    def still_rows(self, context: Context) -> Bool:
        """Which features never moved in training, as it is for each row, (B, F)."""
        if self.members:
            rows: Bool = self.still[context.member]
            return rows
        return np.broadcast_to(self.still, (len(context), self.features))

    def standardised(self, context: Context) -> tuple[NDArray[np.float32], Float64, Float64]:
        """Histories as a network reads them: (B, H, F) within ±INPUT_LIMIT, and their centers and scales, (B, F).

        By the constants of the training data when scaling is "train", by each history itself when it is "window"; a
        feature that never moved in training is 0.
        """
        if self.config.scaling == "train":
            center, scale = self.constant("center", context), self.constant("scale", context)
            x = standardise(context.history, center[:, None], scale[:, None])
        else:
            x, center, scale = normalise(context.history)
        if self.still.any():
            x = np.where(self.still_rows(context)[:, None], np.float32(0), x)
        return x, center, scale

    def run(
        self,
        forward: Callable[..., tuple[Tensor, ...]],
        packed: Weights,
        inputs: Sequence[NDArray[Any]],
        context: Context,
        *,
        chunk: int = SIZES[-1],
    ) -> tuple[NDArray[np.float32], ...]:
        """Run a pass over the rows of some arrays, each with its member's weights.

        Args:
            forward: a pure function of weights and tensors (n, ...), to a tuple of (n, ...); row by row.
            packed: its weights, with the axis of the members in front if this is a stack.
            inputs: arrays of B rows.
            context: says which member each row has.
            chunk: rows at once, as in `run_padded`.
        """
        if not self.members:
            return run_padded(lambda *x: forward(packed, *x), inputs, chunk=chunk)
        assert context.member is not None, "a stack is told which member each row has"
        one = torch.func.vmap(lambda w, *x: tuple(y[0] for y in forward(w, *(part[None] for part in x))))

        def mapped(member: Tensor, *x: Tensor) -> tuple[Tensor, ...]:
            out: tuple[Tensor, ...] = one({name: tensor[member] for name, tensor in packed.items()}, *x)
            return out

        return run_padded(mapped, [context.member, *inputs], chunk=chunk)


_PER_FEATURE = ("center", "scale", "usual_step", "still")


def fitting_chunk(bytes_per_row: int) -> int:
    """The largest batch whose activations stay in the cache."""
    return max([size for size in SIZES if size * bytes_per_row <= CACHE], default=SIZES[0])
