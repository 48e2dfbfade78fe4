"""The loop that trains one network, or many of one shape at once: Adam, early stopping, and a way back from divergence.

Networks of one shape are trained together as one (K, P) matrix of parameters, a row a member. A member keeps its own
clock: its epochs, rate, best weights and end are those that it would have had alone. All randomness is drawn from the
seed and the number of the pass, so a training can be taken up again after any pass, and ends with the same bits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.base import Bool, Float64, Int64
from models.corpus import Corpus
from models.family import Batch, Network

RETRIES = 4  # of a member that diverged, each at a lower rate
LOWER = 0.3  # the factor of such a rate
# A held-out loss so far above that of the untrained weights, in units of its size, has left for good.
AWAY = 10.0
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # of Adam, as published
TOGETHER = 256  # members that learn at once; when one has ended, the next begins: the activations stay in memory
HELD_OUT_WINDOWS = 65_536  # at once, over all members


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train, apart from the network and its data."""

    epochs: int
    batch: int
    learning_rate: float
    decay: float
    patience: int
    clip_norm: float
    trim: float
    windows_per_epoch: int | None
    seed: int


@dataclass(slots=True)
class State:
    """Where a training stands after a pass: tensors (K, P) float32, and a number for each member (K,).

    Attributes:
        weights: of the last good epoch.
        best: those of the best epoch.
        mean: Adam's mean of gradients.
        square: Adam's mean of their squares.
        steps: steps that Adam made.
        epoch: good epochs.
        retries: epochs that were taken back.
        stale: epochs since the best.
        best_epoch: 0 while there is none.
        reference: held-out loss of the untrained weights.
        best_loss: held-out; inf while there is none.
        train_loss: of the last good epoch.
        held_out_loss: of the last good epoch.
        done: which members have ended.
        passes: over the data; a good epoch of one member, and one that is taken back of another, are one pass.
        curve: train and held-out loss of every pass in which a member got on, means over the members.
        best_pass: the one of `curve` in which a member last got better, from 1.
        notes: what went wrong, for the record.
    """

    weights: Tensor
    best: Tensor
    mean: Tensor
    square: Tensor
    steps: Int64
    epoch: Int64
    retries: Int64
    stale: Int64
    best_epoch: Int64
    reference: Float64
    best_loss: Float64
    train_loss: Float64
    held_out_loss: Float64
    done: Bool
    passes: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)
    best_pass: int = 0
    notes: list[str] = field(default_factory=list)

    @classmethod
    def new(cls, weights: Tensor) -> "State":
        """Begin with these weights, (K, P)."""
        counts, unknown = np.zeros((5, len(weights)), np.int64), np.full((3, len(weights)), np.nan)
        return cls(
            weights=weights,
            best=weights.clone(),
            mean=torch.zeros_like(weights),
            square=torch.zeros_like(weights),
            steps=counts[0],
            epoch=counts[1],
            retries=counts[2],
            stale=counts[3],
            best_epoch=counts[4],
            reference=unknown[0],
            best_loss=np.full(len(weights), np.inf),
            train_loss=unknown[1],
            held_out_loss=unknown[2],
            done=np.zeros(len(weights), np.bool_),
        )


@dataclass(frozen=True, slots=True)
class PassReport:
    """One pass over the data, as the caller of `Fit.run` is told of it."""

    state: State
    improved: bool  # a member is better than ever
    note: str  # what went wrong in this pass; empty when nothing did


class Fit:
    """Training of the networks of a corpus.

    Attributes:
        network: the layers; which weights they have in between is of no meaning.
        names: of the parameters, in the order of the columns of `State.weights`.
    """

    def __init__(self, network: Network, corpus: Corpus, recipe: Recipe, names: tuple[str, ...] = ()) -> None:
        """Prepare.

        Args:
            network: of the shape that all members have; its weights are what each of them begins with.
            corpus: the data of each member.
            recipe: how to train.
            names: of the members, for messages; empty for one plain model, which is trained without `torch.func.vmap`.
        """
        self.network = network
        self.corpus = corpus
        self.recipe = recipe
        self.members = names
        self._loss = _Loss(network)
        self.names, parameters = zip(*network.named_parameters(), strict=True)
        self._shapes = [parameter.shape for parameter in parameters]
        self._sizes = [parameter.numel() for parameter in parameters]
        self._trim = np.where(corpus.labelled, 0.0, recipe.trim)

    def start(self) -> State:
        """The state before the first pass."""
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in self.network.parameters()])
        state = State.new(flat.repeat(self.corpus.members, 1))
        for begin in range(0, self.corpus.members, TOGETHER):
            some = np.arange(self.corpus.members)[begin : begin + TOGETHER]
            state.reference[some] = self._held_out(state.weights[torch.from_numpy(some)], some)
        return state

    def run(self, state: State, after: Callable[[PassReport], None]) -> None:
        """Train until all members are done; `after` every pass `state` is complete."""
        while not state.done.all():
            active = np.flatnonzero(~state.done)[:TOGETHER]
            # Members with more windows first: those that still have some at a step are a slice then, and no copy.
            active = active[np.argsort([-len(self.corpus.train[k]) for k in active], kind="stable")]
            note, improved = self._pass(state, active)
            after(PassReport(state, improved, note))

    def load(self, weights: Tensor) -> Network:
        """The network with the weights of one member, (P,), ready to be asked."""
        with torch.no_grad():
            for parameter, value in zip(self.network.parameters(), self._unpacked(weights[None]).values(), strict=True):
                parameter.copy_(value[0])
        return self.network.eval()

    def state_dict(self, weights: Tensor) -> dict[str, Tensor]:
        """Weights by name, (K, ...) each, buffers included."""
        own = {name: one.contiguous() for name, one in self._unpacked(weights).items()}
        for name, buffer in self.network.state_dict().items():
            own.setdefault(name, buffer.detach().expand(len(weights), *buffer.shape).contiguous())
        return own

    # --- one pass ---

    def _pass(self, state: State, active: Int64) -> tuple[str, bool]:
        """Train the active members for an epoch each, and take back what came to nothing."""
        torch.manual_seed(_seed(self.recipe.seed, state.passes))
        moving = _Moving.of(state, active)
        train_loss = self._epoch(state, moving)
        lost = ~np.isfinite(train_loss)
        held_out = np.full(len(active), np.nan)
        if not lost.all():
            held_out = self._held_out(moving.weights, active)
        bound = state.reference[active] + AWAY * np.maximum(np.abs(state.reference[active]), 1.0)
        with np.errstate(invalid="ignore"):  # a reference that is not finite bounds nothing
            lost |= ~np.isfinite(held_out) | (held_out > bound)
        lost |= ~torch.isfinite(moving.weights).all(dim=1).numpy()
        state.passes += 1
        note = self._take_back(state, active[lost], train_loss[lost], held_out[lost])
        improved = self._accept(state, moving, ~lost, train_loss, held_out)
        if not lost.all():
            self._record(state, active, improved)
        return note, improved

    def _epoch(self, state: State, moving: "_Moving") -> Float64:
        """One epoch of the moving members, in place; the mean loss of each, not finite for one that diverged."""
        orders = [self._order(state, k) for k in moving.active]
        size = self.recipe.batch
        steps = np.array([math.ceil(len(order) / size) for order in orders])
        rate = self._rate(state, moving.active)
        total, lost = np.zeros(len(orders)), np.zeros(len(orders), np.bool_)
        self.network.train()
        for step in range(steps.max()):
            live = int((steps > step).sum())  # a slice from the first: they are ordered by it
            if lost[:live].all():
                break
            targets, valid = _cut(orders[:live], step * size, size)
            weights = moving.weights[:live].detach().requires_grad_()
            losses = self._losses(weights, self.corpus.batch(targets))
            mean = robust_mean(losses, valid, self._trim[moving.active[:live]])
            (gradient,) = torch.autograd.grad(mean.sum(), weights)
            norm = gradient.norm(dim=1)
            bad = ~(torch.isfinite(torch.where(valid, losses.detach(), 0)).all(dim=1) & torch.isfinite(norm))
            lost[:live] |= bad.numpy()
            moving.step(gradient, norm, rate, lost, self.recipe.clip_norm)
            total[:live] += mean.detach().double().numpy() * valid.sum(dim=1).numpy()
        mean_loss: Float64 = np.where(lost, np.nan, total / np.array([len(order) for order in orders]))
        return mean_loss

    def _rate(self, state: State, k: Int64) -> Float64:
        """Learning rate of some members in their next epoch, (n,)."""
        rate: Float64 = self.recipe.learning_rate * self.recipe.decay ** state.epoch[k] * LOWER ** state.retries[k]
        return rate

    def _order(self, state: State, k: int) -> Int64:
        """The targets of a member's next epoch. Not of its place among the members, so that it learns as if alone."""
        draws = np.random.default_rng([self.recipe.seed, state.epoch[k], state.retries[k]])
        order: Int64 = draws.permutation(self.corpus.train[k])[: self.recipe.windows_per_epoch]
        return order

    def _take_back(self, state: State, lost: Int64, train_loss: Float64, held_out: Float64) -> str:
        """Leave members as they were before the pass, and note it; their next try has a lower rate."""
        if not len(lost):
            return ""
        state.retries[lost] += 1
        given_up = lost[state.retries[lost] > RETRIES]
        state.done[given_up] = True
        first = lost[0]
        what = f"diverged in epoch {state.epoch[first] + 1} (loss {train_loss[0]:.4g}, held out {held_out[0]:.4g})"
        rate = self._rate(state, lost)[0]
        then = "given up" if state.done[first] else f"taken back, learning rate now {rate:.3g}"
        who = f"{self.members[first]}: " if self.members else ""
        more = f"; {len(lost) - 1} more in the same pass" if len(lost) > 1 else ""
        note = f"{who}{what}: {then}{more}"
        state.notes.append(note)
        return note

    def _accept(self, state: State, moving: "_Moving", good: Bool, train_loss: Float64, held_out: Float64) -> bool:
        """Keep what the good members learned; whether one of them is better than ever."""
        rows, k = torch.from_numpy(np.flatnonzero(good)), moving.active[good]
        at = torch.from_numpy(k)
        for name in ("weights", "mean", "square"):
            getattr(state, name)[at] = getattr(moving, name)[rows]
        state.steps[k] = moving.steps[good]
        state.epoch[k] += 1
        state.train_loss[k], state.held_out_loss[k] = train_loss[good], held_out[good]
        better = held_out[good] < state.best_loss[k]
        state.best[torch.from_numpy(k[better])] = state.weights[torch.from_numpy(k[better])]
        state.best_loss[k[better]] = held_out[good][better]
        state.best_epoch[k[better]] = state.epoch[k[better]]
        state.stale[k] = np.where(better, 0, state.stale[k] + 1)
        state.done[k] = (state.stale[k] >= self.recipe.patience) | (state.epoch[k] >= self.recipe.epochs)
        return bool(better.any())

    def _record(self, state: State, active: Int64, improved: bool) -> None:
        """Add a pass to the curve: the losses of a plain model, means over those that got on of many."""
        if not self.members:
            state.curve.append((float(state.train_loss[0]), float(state.held_out_loss[0])))
        else:
            # The best of each so far: members end at their own time, and the mean goes on over all of them.
            known = np.isfinite(state.best_loss)
            state.curve.append((float(np.nanmean(state.train_loss[known])), float(state.best_loss[known].mean())))
        if improved:
            state.best_pass = len(state.curve)

    # --- losses ---

    def _unpacked(self, weights: Tensor) -> dict[str, Tensor]:
        """Rows of parameters, (K, P), as the parameters by name, (K, ...); gradients flow back."""
        parts = torch.split(weights, self._sizes, dim=1)
        lead = len(weights)
        named = zip(self.names, parts, self._shapes, strict=True)
        return {name: part.reshape(lead, *shape) for name, part, shape in named}

    def _losses(self, weights: Tensor, batch: Batch) -> Tensor:
        """Loss of each window of each member, (K, B)."""
        named = {f"network.{name}": one for name, one in self._unpacked(weights).items()}
        if not self.members:
            plain = {name: one[0] for name, one in named.items()}
            losses: Tensor = torch.func.functional_call(self._loss, plain, (Batch(*(one[0] for one in batch)),))
            return losses[None]
        mapped = torch.func.vmap(self._call, randomness="different")
        return torch.as_tensor(mapped(named, batch))

    def _call(self, named: dict[str, Tensor], batch: Batch) -> Any:
        return torch.func.functional_call(self._loss, named, (batch,))

    def _held_out(self, weights: Tensor, active: Int64) -> Float64:
        """Mean held-out loss of some members, (n,); drawn numbers are the same at every call."""
        self.network.eval()
        targets = [self.corpus.held_out[k] for k in active]
        size = max(64, min(4096, HELD_OUT_WINDOWS // len(active)))
        losses, valids = [], []
        kept = torch.get_rng_state()
        torch.manual_seed(_seed(self.recipe.seed, -1))
        with torch.no_grad():
            for begin in range(0, max(map(len, targets)), size):
                some, valid = _cut(targets, begin, size)
                losses.append(self._losses(weights, self.corpus.batch(some)))
                valids.append(valid)
        torch.set_rng_state(kept)
        mean = robust_mean(torch.cat(losses, dim=1).double(), torch.cat(valids, dim=1), self._trim[active])
        held_out: Float64 = mean.numpy()
        return held_out


@dataclass(slots=True)
class _Moving:
    """The rows of a state that a pass works on: copies, so that the state is what to return to."""

    active: Int64
    weights: Tensor
    mean: Tensor
    square: Tensor
    steps: Int64

    @classmethod
    def of(cls, state: State, active: Int64) -> "_Moving":
        at = torch.from_numpy(active)
        return cls(active, state.weights[at], state.mean[at], state.square[at], state.steps[active])

    def step(self, gradient: Tensor, norm: Tensor, rate: Float64, lost: Bool, clip_norm: float) -> None:
        """One step of Adam of the first rows, each with its own rate; lost ones stay.

        Args:
            gradient: (n, P).
            norm: of each row of it, (n,).
            rate: of every member.
            lost: which of them diverged.
            clip_norm: longest gradient of a member.

        Source: Kingma and Ba, "Adam", ICLR 2015, algorithm 1.
        """
        n = len(gradient)
        going = ~lost[:n]
        self.steps[:n] += going
        gradient = gradient * (clip_norm / (norm + 1e-6)).clamp(max=1.0)[:, None]
        mean = torch.lerp(self.mean[:n], gradient, 1 - BETA1)
        square = BETA2 * self.square[:n] + (1 - BETA2) * gradient * gradient
        made = np.maximum(self.steps[:n], 1)
        size = torch.from_numpy((rate[:n] / (1 - BETA1**made)).astype(np.float32))[:, None]
        unbias = torch.from_numpy(np.sqrt(1 - BETA2**made).astype(np.float32))[:, None]
        weights = self.weights[:n] - size * mean / (square.sqrt() / unbias + EPSILON)
        if going.all():
            self.weights[:n], self.mean[:n], self.square[:n] = weights, mean, square
            return
        kept = torch.from_numpy(going)[:, None]
        for own, new in ((self.weights, weights), (self.mean, mean), (self.square, square)):
            own[:n] = torch.where(kept, new, own[:n])


class _Loss(nn.Module):
    """The loss of a network as its forward pass, which is what `functional_call` calls."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> Tensor:
        return self.network.loss(batch)


def robust_mean(losses: Tensor, valid: Tensor, trim: Float64) -> Tensor:
    """Mean loss of each row without the largest share of it, (K,).

    Data that nobody labelled holds anomalies, and they have the largest losses.

    Args:
        losses: (K, B).
        valid: which of them are there, (K, B) bool; at least one a row.
        trim: the share that is left out of each row, (K,), rounded up; 0 leaves none out.
    """
    count = valid.sum(dim=1)
    drop = torch.from_numpy(np.ceil(trim * count.numpy())).clamp(max=count - 1)
    kept = valid
    if bool((drop > 0).any()):
        order = losses.detach().masked_fill(~valid, -math.inf).argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(losses.shape[1]).expand_as(order))
        kept = valid & (rank >= drop[:, None])
    # Not where(kept, loss, 0): the gradient of a loss that is not finite must show.
    return (losses * kept).sum(dim=1) / kept.sum(dim=1)


def _cut(targets: Sequence[Int64], begin: int, size: int) -> tuple[Int64, Tensor]:
    """A part of the targets of each member as a matrix, (K, B), and which of them are there; others are its first."""
    parts = [own[begin : begin + size] for own in targets]
    width = max(map(len, parts))
    rows = np.repeat([own[0] for own in targets], width).reshape(-1, width)
    valid = np.arange(width) < np.array([[len(part)] for part in parts])
    for row, part in zip(rows, parts, strict=True):
        row[: len(part)] = part
    return rows, torch.from_numpy(valid)


def _seed(seed: int, number: int) -> int:
    """A seed for torch, of a pass or (-1) of the held-out windows."""
    return int(np.random.SeedSequence([seed, number + 1]).generate_state(1, np.uint64)[0] >> np.uint64(1))


STATE_TENSORS = ("weights", "best", "mean", "square")
STATE_NUMBERS = tuple(one.name for one in fields(State) if one.name not in STATE_TENSORS)
