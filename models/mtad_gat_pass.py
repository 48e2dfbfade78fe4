"""The served pass of MTAD-GAT: what its layers compute in eval mode, for the newest point only, over packed weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from models.family import Weights
    from models.mtad_gat import MTADGATConfig

_ATTENTION = ("left", "offset", "right", "attention", "bias")


class Pass:
    """The same function as the layers in eval mode, for the newest point only, over packed weights.

    Each attention is three matrix products and two distances (see `Attention.weights`); the convolution is one product
    over overlapping views; the input of a GRU is projected for all steps at once, and that of the decoder, which is the
    same at every step, once; only the last step goes through the output layer.
    """

    def __init__(self, config: MTADGATConfig, weights: Weights) -> None:
        self.config = config
        self.up: dict[str, int] = {}  # of each attention, how many dimensions count upwards; they come first
        packed = {"conv": _wide(weights["conv.weight"].permute(2, 1, 0).reshape(-1, config.features), 1)}
        packed |= {"conv.bias": _wide(weights["conv.bias"], 0)} | _pack_gru("gru", weights)
        for name in ("by_feature", "by_time"):
            packed |= self._pack_attention(name, {key: weights[f"{name}.{key}"] for key in _ATTENTION})
        if config.forecasts:
            for index, axes in ((0, (1,)), (3, (0, 1)), (6, (0, 1))):
                packed[f"forecast.{index}"] = _wide(weights[f"forecast.{index}.weight"].t(), *axes)
                packed[f"forecast.{index}.bias"] = _wide(weights[f"forecast.{index}.bias"], 0)
        if config.reconstructs:
            # At serving the code is its mean; the layer of its variance is not needed.
            packed |= {"code": _wide(weights["code.weight"][: config.latent].t(), 1)}
            packed |= {"code.bias": _wide(weights["code.bias"][: config.latent], 0)} | _pack_gru("decoder", weights)
            packed["decoder.input"] = _wide(packed["decoder.input"], 0)
            packed |= {"out": _wide(weights["out.weight"].t(), 1), "out.bias": _wide(weights["out.bias"], 0)}
        self.packed = {name: tensor.contiguous() for name, tensor in packed.items()}

    def _pack_attention(self, name: str, weights: Weights) -> dict[str, Tensor]:
        attention, right, slope = weights["attention"], weights["right"], self.config.slope
        order = torch.argsort(attention, descending=True)
        self.up[name] = int((attention > 0).sum())
        size = ((1 - slope) / 2 * attention.abs())[order]
        known = {"left": (weights["left"][order] * size[:, None]).t(), "right": (right[order] * -size[:, None]).t()}
        known |= {"linear": (1 + slope) / 2 * (attention @ right)[:, None]}
        known = {key: _wide(one, 0) for key, one in known.items()} if name == "by_time" else known
        known |= {"left": _wide(known["left"], 1), "right": _wide(known["right"], 1)}
        known |= {"offset": _wide(weights["offset"][order] * size, 0), "bias": weights["bias"]}
        return {f"{name}.{key}": one for key, one in known.items()}

    def __call__(self, weights: Weights, x: Tensor) -> tuple[Tensor, ...]:
        """Pass windows (B, W, F): forecast of the point after them, and reconstruction of their newest, (B, F) each."""
        config, batch, features = self.config, len(x), self.config.features
        v = self._convolve(weights, x)  # (B, W, F or more), see `_wide`
        by_time = self._attend(weights, "by_time", v)[..., :features]
        by_feature = self._attend(weights, "by_feature", v[..., :features].transpose(1, 2).contiguous()).transpose(1, 2)
        read = torch.cat([x, by_feature, by_time], dim=2).view(-1, 3 * features)
        gates = torch.addmm(weights["gru.input_bias"], read, weights["gru.input"]).view(batch, config.window, -1)
        state = self._recur(weights, "gru", [gates[:, step] for step in range(config.window)])  # (B, hidden)
        found: list[Tensor] = []
        if config.forecasts:
            h = torch.relu_(torch.addmm(weights["forecast.0.bias"], state, weights["forecast.0"]))
            h = torch.relu_(torch.addmm(weights["forecast.3.bias"], h, weights["forecast.3"]))
            step = torch.addmm(weights["forecast.6.bias"], h, weights["forecast.6"])[:, :features]
            found.append(x[:, -1] + step if config.scaling == "window" else step)
        if config.reconstructs:
            z = torch.addmm(weights["code.bias"], state, weights["code"])  # (B, latent)
            gate = torch.addmm(weights["decoder.input_bias"], z, weights["decoder.input"])
            state = self._recur(weights, "decoder", [gate] * config.window)
            found.append(torch.addmm(weights["out.bias"], state, weights["out"])[:, :features])
        return tuple(found)

    def _convolve(self, weights: Weights, x: Tensor) -> Tensor:
        """Convolution along the time with zeros around, and ReLU, (B, W, F or more)."""
        batch, window, features = x.shape
        kernel = self.config.kernel
        padded = functional.pad(x, (0, 0, kernel // 2, kernel // 2)).contiguous()  # (B, W + kernel - 1, F)
        size = (batch, window, kernel * features)
        rows = padded.as_strided(size, ((window + kernel - 1) * features, features, 1)).reshape(-1, size[2])
        return torch.relu_(torch.addmm(weights["conv.bias"], rows, weights["conv"])).view(batch, window, -1)

    def _attend(self, weights: Weights, name: str, v: Tensor) -> Tensor:
        """As `Attention.forward`, of contiguous nodes (B, N, C)."""
        rows, up = v.view(-1, v.shape[2]), self.up[name]
        left = torch.addmm(weights[f"{name}.offset"], rows, weights[f"{name}.left"]).view(*v.shape[:2], -1)
        right = (rows @ weights[f"{name}.right"]).view_as(left)
        e = torch.cdist(left[..., :up], right[..., :up], p=1.0)  # (B, N, N)
        e -= torch.cdist(left[..., up:], right[..., up:], p=1.0)
        e += (rows @ weights[f"{name}.linear"]).view(len(v), 1, -1)
        e += weights[f"{name}.bias"]
        return _sigmoid_by_row(torch.bmm(torch.softmax(e, dim=2), v))

    def _recur(self, weights: Weights, name: str, gates: list[Tensor]) -> Tensor:
        """Last state (B, hidden) of a GRU that begins at 0, from its projected input at each step, (B, 3 hidden)."""
        hidden, size = weights[f"{name}.hidden"], self.config.hidden
        bias = weights[f"{name}.hidden_bias"]
        h = torch.zeros(len(gates[0]), size)
        for gate in gates:
            own = torch.addmm(bias, h, hidden)  # (B, 3 hidden): reset, update, new
            # In place, in parts of rows, see `_sigmoid_by_row`.
            switch, new = own[:, : 2 * size], own[:, 2 * size :]
            switch.add_(gate[:, : 2 * size]).sigmoid_()
            new.mul_(switch[:, :size]).add_(gate[:, 2 * size :]).tanh_()
            h = torch.lerp(new, h, switch[:, size:])
        return h


def _wide(weight: Tensor, *axes: int) -> Tensor:
    """A weight with zeros after the end of some axes, so that products have a width that depends on no position.

    A product with 5, 6, 7, 9, 10 or 11 columns was measured to give a row other last bits at another place of the
    batch; 1 to 4, 8, and all from 12 on did not.
    """
    for axis in axes:
        size = weight.shape[axis]
        if 4 < size < 12:
            zeros = list(weight.shape)
            zeros[axis] = -size % 4
            weight = torch.cat([weight, weight.new_zeros(zeros)], dim=axis)
    return weight


def _sigmoid_by_row(x: Tensor) -> Tensor:
    """Sigmoid of (B, N, C), each row by itself.

    Of a whole batch in one piece, the last few elements are computed one by one where all others are by vectors, with
    other last bits; which row they belong to depends on the batch. Rows that do not touch each other end alike.
    """
    apart = x.new_empty(len(x), x[0].numel() + 1)[:, :-1]
    torch.sigmoid(x.view_as(apart), out=apart)
    return apart.view_as(x)


def _pack_gru(name: str, weights: Weights) -> dict[str, Tensor]:
    return {
        f"{name}.input": weights[f"{name}.weight_ih_l0"].t(),
        f"{name}.input_bias": weights[f"{name}.bias_ih_l0"],
        f"{name}.hidden": weights[f"{name}.weight_hh_l0"].t(),
        f"{name}.hidden_bias": weights[f"{name}.bias_hh_l0"],
    }
