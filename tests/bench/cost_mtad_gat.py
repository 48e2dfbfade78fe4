"""`python -m tests.bench.cost_mtad_gat`: a point scored by MTAD-GAT, as it is written down and as it is shipped.

Naive is a pass over the window before the point, for its forecast, and one over the window that ends with it, for its
reconstruction; each attention lays every pair of nodes end to end, (B, N, N, 2 C), and every step of the decoder's
input is projected and of its output goes through the last layer. Shipped is `assess` with the forecast that was kept
from the tick before, arithmetic around the network included. Same weights, one thread, one run, in turns; processor
time, so that another process on the machine does not count. The results of both are compared first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from models.base import Context
from models.mtad_gat import MTADGAT, Attention, MTADGATConfig, MTADGATNetwork, serve

ROWS = 256  # series that are assessed in one tick
PIECE = 16  # windows of a naive pass: the table of pairs of all would take 1.5 GB
LEAST = 5.0  # times as fast
# Window and units of the published PyTorch code, its dimensions of the attention over time for both attentions.
PUBLISHED = MTADGATConfig(window=100, features=38, embed=76, hidden=150, dense=150, latent=150)
SHIPPED = MTADGATConfig(features=38)


def naive_attention(layer: Attention, v: Tensor) -> Tensor:
    nodes = v.shape[1]
    left, right = v[:, :, None].expand(-1, -1, nodes, -1), v[:, None].expand(-1, nodes, -1, -1)
    weight = torch.cat([layer.left, layer.right], dim=1)
    pairs = torch.nn.functional.linear(torch.cat([left, right], dim=3), weight, layer.offset)  # (B, N, N, D)
    e = torch.nn.functional.leaky_relu(pairs, layer.slope) @ layer.attention + layer.bias
    return torch.sigmoid(torch.softmax(e, dim=2) @ v)


def naive(network: MTADGATNetwork, x: Tensor) -> tuple[Tensor, Tensor]:
    """Forecast after the windows and reconstruction of their newest points, (B, F) each."""
    v = torch.relu(network.conv(x.transpose(1, 2)))
    by_feature = naive_attention(network.by_feature, v).transpose(1, 2)
    by_time = naive_attention(network.by_time, v.transpose(1, 2))
    state = network.gru(torch.cat([x, by_feature, by_time], dim=2))[1][0]
    code = network.code(state)[:, : network.config.latent]
    return network.ahead(x, state), network.decode(code)[:, -1]


def naive_tick(network: MTADGATNetwork, x: Tensor) -> tuple[Tensor, Tensor]:
    """Forecast and reconstruction of the newest of W + 1 points, (B, F) each."""
    found = [(naive(network, some[:, :-1])[0], naive(network, some[:, 1:])[1]) for some in torch.split(x, PIECE)]
    forecasts, reconstructions = zip(*found, strict=True)
    return torch.cat(forecasts), torch.cat(reconstructions)


def measure(rounds: int, config: MTADGATConfig = PUBLISHED) -> dict[str, float]:
    """Return processor time per point, us, of `naive` and `shipped`, and the `ratio`, medians over the rounds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        network = MTADGATNetwork(config).eval()
        model = serve(config, network.state_dict())
        values = np.random.default_rng(0).normal(size=(ROWS, config.window + 1, config.features))
        x, point = torch.tensor(values, dtype=torch.float32), context(values)
        with torch.inference_mode():
            check(model, point, *naive_tick(network, x))
            point = replace(point, ahead=model.look(point.history, point)[0])
            times = []
            for _ in range(rounds):
                began = time.process_time()
                naive_tick(network, x)
                middle = time.process_time()
                model.assess(point)
                times.append((middle - began, time.process_time() - middle))
    finally:
        torch.set_num_threads(threads)
    slow, fast = (1e6 * statistics.median(column) / ROWS for column in zip(*times, strict=True))
    return {"naive": slow, "shipped": fast, "ratio": statistics.median(a / b for a, b in times)}


def context(values: np.ndarray[tuple[int, int, int], np.dtype[np.float64]]) -> Context:
    """The last of W + 1 points after the others."""
    history, value = np.ascontiguousarray(values[:, :-1]), values[:, -1].copy()
    unknown = np.full(value.shape, np.nan)
    return Context(history, np.ones(history.shape, np.bool_), value, np.zeros(len(value), np.int64), unknown)


def check(model: MTADGAT, point: Context, forecast: Tensor, reconstruction: Tensor) -> None:
    """Both ways give the same."""
    ended = np.concatenate([point.history[:, 1:], point.value[:, None]], axis=1)
    np.testing.assert_allclose(model.look(point.history, point)[0], forecast.numpy(), atol=1e-5)
    np.testing.assert_allclose(model.look(ended, point)[1], reconstruction.numpy(), atol=1e-5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    good = True
    for name, config in (("published size", PUBLISHED), ("default size", SHIPPED)):
        found = measure(given.rounds, config)
        good &= config is not PUBLISHED or found["ratio"] >= LEAST
        line = {"name": f"mtad_gat, {name}", "window": config.window, "features": config.features}
        sys.stdout.write(json.dumps(line | {key: round(one, 2) for key, one in found.items()}) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
