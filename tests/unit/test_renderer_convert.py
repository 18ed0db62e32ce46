"""Published Oobleck autoencoders: converted, they compute what was published; what does not fit is named."""

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from duotok.recipes.renderer.convert_waveform_vae import infer_config, main, take_over
from duotok.renderer.renderer import open_vae
from duotok.renderer.waveform_vae import OobleckVAE, OobleckVAEConfig

State = dict[str, Tensor]
SMALL: dict[str, Any] = {"width": 32, "multiples": (1, 1, 1, 2, 2), "latents": 16, "decoder_width": 4}
V1 = {"strides": (2, 4, 4, 4, 8), "blocks": 2}  # 44.1 kHz, hop 1024
V2 = {"strides": (2, 2, 4, 6, 10), "blocks": 0}  # 48 kHz, hop 960
INV_FREQ = "transformers.rotary_pos_emb.inv_freq"


def published_shapes(strides, multiples, width, latents, decoder_width, blocks) -> dict[str, tuple[int, ...]]:
    """Names and shapes as stable-audio-tools and ear-VAE store them."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name, out, channels, kernel, bias: int | None = None):
        shapes[f"{name}.weight_g"], shapes[f"{name}.weight_v"] = (out, 1, 1), (out, channels, kernel)
        if bias != 0:
            shapes[f"{name}.bias"] = (bias or out,)

    def snake(name, channels):
        shapes[f"{name}.alpha"] = shapes[f"{name}.beta"] = (channels,)

    def unit(name, channels):
        for layer, kernel in ((0, 7), (2, 1)):
            snake(f"{name}.layers.{layer}", channels)
            conv(f"{name}.layers.{layer + 1}", channels, channels, kernel)

    last = len(strides) + 1
    widths = [width * multiple for multiple in (1, *multiples)]
    conv("encoder.layers.0", width, 2, 7)
    for number, stride in enumerate(strides, start=1):
        block, channels = f"encoder.layers.{number}.layers", widths[number - 1]
        for place in range(3):
            unit(f"{block}.{place}", channels)
        snake(f"{block}.3", channels)
        conv(f"{block}.4", widths[number], channels, 2 * stride)
    snake(f"encoder.layers.{last}", widths[-1])
    conv(f"encoder.layers.{last + 1}", 2 * latents, widths[-1], 3)

    widths = [decoder_width * multiple for multiple in (1, *multiples)][::-1]
    conv("decoder.layers.0", widths[0], latents, 7)
    for number, stride in enumerate(reversed(strides), start=1):
        block, channels = f"decoder.layers.{number}.layers", widths[number]
        snake(f"{block}.0", widths[number - 1])
        conv(
            f"{block}.1", widths[number - 1], channels, 2 * stride, bias=channels
        )  # transposed: [in, out, k]
        for place in (2, 3, 4):
            unit(f"{block}.{place}", channels)
    snake(f"decoder.layers.{last}", widths[-1])
    conv(f"decoder.layers.{last + 1}", 2, widths[-1], 7, bias=0)

    for number in range(blocks):
        block = f"transformers.layers.{number}"
        for norm in ("pre_norm", "ff_norm"):
            shapes[f"{block}.{norm}.gamma"] = shapes[f"{block}.{norm}.beta"] = (latents,)
        shapes[f"{block}.self_attn.to_qkv.weight"] = (3 * latents, latents)
        shapes[f"{block}.self_attn.to_out.weight"] = (latents, latents)
        shapes[f"{block}.ff.ff.0.proj.weight"] = (8 * latents, latents)
        shapes[f"{block}.ff.ff.0.proj.bias"] = (8 * latents,)
        shapes[f"{block}.ff.ff.2.weight"] = (latents, 4 * latents)
        shapes[f"{block}.ff.ff.2.bias"] = (latents,)
    return shapes


def rotation(count: int) -> Tensor:
    return 1.0 / 10_000 ** (torch.arange(0, 2 * count, 2).float() / (2 * count))


def make_state(strides, blocks) -> State:
    """A state dict of random numbers at which every layer matters; heads of 8 in 16 latents."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in published_shapes(**SMALL, strides=strides, blocks=blocks).items():
        value = torch.randn(shape, generator=generator)
        if name.endswith("weight_g"):
            value = 0.8 + 0.1 * value
        elif name.endswith("gamma"):
            value = 1 + 0.1 * value
        elif name.endswith(".beta") and "norm" in name:
            value = torch.zeros(shape)
        elif name.startswith("transformers"):
            value = value * 0.3
        elif not name.endswith("weight_v"):
            value = value * 0.2
        state[name] = value
    if blocks:
        state[INV_FREQ] = rotation(2)
    return state


def conv(state: State, name: str, x: Tensor, transposed_stride: int = 0, **settings: int) -> Tensor:
    direction = state[f"{name}.weight_v"]
    weight = state[f"{name}.weight_g"] * direction / direction.norm(dim=(1, 2), keepdim=True)
    if transposed_stride:
        settings = {"stride": transposed_stride, "padding": -(-transposed_stride // 2)}
        return functional.conv_transpose1d(x, weight, state[f"{name}.bias"], **settings)
    return functional.conv1d(x, weight, state.get(f"{name}.bias"), **settings)


def snake(state: State, name: str, x: Tensor) -> Tensor:
    alpha, beta = (state[f"{name}.{part}"].exp()[:, None] for part in ("alpha", "beta"))
    return x + (alpha * x).sin() ** 2 / (beta + 1e-9)


def unit(state: State, name: str, x: Tensor, dilation: int) -> Tensor:
    inner = snake(state, f"{name}.layers.0", x)
    inner = conv(state, f"{name}.layers.1", inner, dilation=dilation, padding=3 * dilation)
    return x + conv(state, f"{name}.layers.3", snake(state, f"{name}.layers.2", inner))


def encode_as_published(state: State, wave: Tensor, strides) -> tuple[Tensor, Tensor]:
    x, last = conv(state, "encoder.layers.0", wave, padding=3), len(strides) + 1
    for number, stride in enumerate(strides, start=1):
        block = f"encoder.layers.{number}.layers"
        for place, dilation in enumerate((1, 3, 9)):
            x = unit(state, f"{block}.{place}", x, dilation)
        x = snake(state, f"{block}.3", x)
        x = conv(state, f"{block}.4", x, stride=stride, padding=-(-stride // 2))
    x = conv(state, f"encoder.layers.{last + 1}", snake(state, f"encoder.layers.{last}", x), padding=1)
    mean, scale = x.chunk(2, dim=1)
    return mean, functional.softplus(scale)


def transform_as_published(state: State, latents: Tensor, blocks: int, head: int = 8) -> Tensor:
    """Every head, frame and pair of numbers by itself; latents [1, dim, frames]."""
    x = latents[0].T
    frames, dim = x.shape
    angles = torch.arange(frames)[:, None] * torch.cat([state[INV_FREQ]] * 2)[None]

    def turn(part: Tensor) -> Tensor:
        half = part[:, : head // 2]
        first, second = half[:, : head // 4], half[:, head // 4 :]
        turned = half * angles.cos() + torch.cat([-second, first], dim=1) * angles.sin()
        return torch.cat([turned, part[:, head // 2 :]], dim=1)

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(dim=1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{name}.gamma"] + state[f"{name}.beta"]

    for number in range(blocks):
        block = f"transformers.layers.{number}"
        qkv = norm(x, f"{block}.pre_norm") @ state[f"{block}.self_attn.to_qkv.weight"].T
        query, key, value = qkv.split(dim, dim=1)
        heads = []
        for start in range(0, dim, head):
            place = slice(start, start + head)
            scores = turn(query[:, place]) @ turn(key[:, place]).T / head**0.5
            heads.append(scores.softmax(dim=1) @ value[:, place])
        x = x + torch.cat(heads, dim=1) @ state[f"{block}.self_attn.to_out.weight"].T
        up = norm(x, f"{block}.ff_norm") @ state[f"{block}.ff.ff.0.proj.weight"].T
        values, gates = (up + state[f"{block}.ff.ff.0.proj.bias"]).chunk(2, dim=1)
        down = values * gates * gates.sigmoid() @ state[f"{block}.ff.ff.2.weight"].T
        x = x + down + state[f"{block}.ff.ff.2.bias"]
    return x.T[None]


def decode_as_published(state: State, latents: Tensor, strides) -> Tensor:
    x, last = conv(state, "decoder.layers.0", latents, padding=3), len(strides) + 1
    for number, stride in enumerate(reversed(strides), start=1):
        block = f"decoder.layers.{number}.layers"
        x = conv(state, f"{block}.1", snake(state, f"{block}.0", x), transposed_stride=stride)
        for place, dilation in zip((2, 3, 4), (1, 3, 9), strict=True):
            x = unit(state, f"{block}.{place}", x, dilation)
    return conv(state, f"decoder.layers.{last + 1}", snake(state, f"decoder.layers.{last}", x), padding=3)


def run_convert(folder, state: State, *options: str) -> int:
    save_file(state, folder / "state.safetensors")
    return main([str(folder / "state.safetensors"), "--out", str(folder / "vae"), *options])


@pytest.fixture(scope="module", params=[V1, V2], ids=["v1", "v2"])
def converted(request, tmp_path_factory) -> tuple[State, OobleckVAE, dict[str, Any]]:
    torch.set_num_threads(1)
    folder, state = tmp_path_factory.mktemp("ear"), make_state(**request.param)
    assert run_convert(folder, state) == 0
    vae = open_vae(folder / "vae")
    assert isinstance(vae, OobleckVAE)
    return state, vae, request.param


@pytest.fixture(scope="module")
def v1(tmp_path_factory) -> OobleckVAE:
    folder = tmp_path_factory.mktemp("v1")
    assert run_convert(folder, make_state(**V1)) == 0
    return OobleckVAE.from_pretrained(folder / "vae")


@torch.no_grad()
def test_a_converted_model_computes_what_was_published(converted):
    state, vae, settings = converted
    strides, hop = settings["strides"], vae.hop_samples
    latents = torch.randn(1, 16, 12, generator=torch.Generator().manual_seed(1))
    refined = latents
    if settings["blocks"]:
        refined = transform_as_published(state, latents, settings["blocks"])
        assert vae.transformer is not None and (refined - latents).std() > 0.5
        torch.testing.assert_close(vae.transformer(latents), refined, rtol=1e-4, atol=1e-4)
    wave = decode_as_published(state, refined, strides)
    assert wave.shape[-1] == 12 * hop
    torch.testing.assert_close(vae.model.decoder(refined), wave, rtol=1e-3, atol=1e-3)

    wave = torch.randn(1, 2, 10 * hop, generator=torch.Generator().manual_seed(2)) * 0.1
    mean, deviation = encode_as_published(state, wave, strides)
    if vae.config.sample_rate_hz != 48_000:
        torch.testing.assert_close(vae.model.encoder(wave).chunk(2, dim=1)[0], mean, rtol=1e-3, atol=1e-3)
        return
    found = vae.encode_distribution(wave)
    torch.testing.assert_close(found[0], mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1], deviation + 1e-4, rtol=1e-3, atol=1e-3)
    assert torch.equal(vae.encode(wave), found[0])


@pytest.mark.parametrize(("settings", "rate_hz"), [(V1, 44_100), (V2, 48_000)])
def test_the_true_shapes_tell_all_settings(settings, rate_hz):
    true = {"width": 128, "multiples": (1, 2, 4, 8, 16), "latents": 64, "decoder_width": 128, **settings}
    state = {name: torch.empty(shape, device="meta") for name, shape in published_shapes(**true).items()}
    if settings["blocks"]:
        state[INV_FREQ] = rotation(16)
    config = infer_config(state)
    strides, blocks = settings["strides"], settings["blocks"]
    assert config == OobleckVAEConfig(sample_rate_hz=rate_hz, strides=strides, transformer_blocks=blocks)
    with torch.device("meta"):
        vae = OobleckVAE(config)
    take_over(vae, state)


def test_newer_names_of_normalized_weights_mean_the_same(tmp_path, v1, capsys):
    state = {}
    for name, tensor in make_state(**V1).items():
        name = name.replace("weight_g", "parametrizations.weight.original0")
        state[name.replace("weight_v", "parametrizations.weight.original1")] = tensor
    assert run_convert(tmp_path, state) == 0
    assert open_vae(tmp_path / "vae").fingerprint == v1.fingerprint
    assert "16 latents at 43.0664 Hz" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "shape", "told"),  # no shape: the key is left out
    [
        ("encoder.layers.0.weight_v", None, "missing"),
        ("encoder.layers.3.layers.1.layers.2.alpha", None, "missing"),
        ("decoder.layers.2.layers.1.bias", None, "missing"),
        ("transformers.layers.1.self_attn.to_out.weight", None, "missing"),
        (INV_FREQ, None, "missing"),
        ("decoder.layers.7.bias", (2,), "1 left over"),
        ("encoder.layers.2.layers.3.beta", (1, 32, 1), "the shape (1, 32, 1), where the others need (32,)"),
        ("encoder.layers.2.layers.4.weight_v", (32, 32, 1), "(32, 32, 1), where the others need (32, 32, 4)"),
        ("decoder.layers.0.weight_v", (8,), "the shape (8,)"),
        (INV_FREQ, (3,), "the shape (3,)"),
        (INV_FREQ, (2,), "10000"),
        ("encoder.layers.1.layers.0", None, "not the state dict of an Oobleck"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(tmp_path, capsys, key, shape, told):
    state = {name: value for name, value in make_state(**V1).items() if not name.startswith(key)}
    if shape is not None:
        state[key] = torch.zeros(shape)
    if key == "encoder.layers.1.layers.0":
        state = {f"autoencoder.{name}": value for name, value in state.items()}
    # A wrong kernel changes the hop, so the rate must be given for the shape to be looked at.
    assert run_convert(tmp_path, state, "--sample-rate", "44100") == 1
    message = capsys.readouterr().err.strip()
    assert "\n" not in message and key in message and told in message, message
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("name", ["state.pt", "state.pyt", "state.safetensors"])
def test_pickles_and_damaged_files_are_refused(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"nothing")
    assert main([str(tmp_path / name), "--out", str(tmp_path / "vae")]) == 1
    message = capsys.readouterr().err.strip()
    assert "\n" not in message and "safetensors" in message and name in message
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_another_hop_needs_its_rate(tmp_path, capsys):
    state = make_state(strides=(2, 2, 2, 2, 2), blocks=0)
    assert run_convert(tmp_path, state) == 1
    message = capsys.readouterr().err.strip()
    assert "hop of 32 samples" in message and "--sample-rate" in message and "\n" not in message
    assert run_convert(tmp_path, state, "--sample-rate", "32000") == 0
    assert open_vae(tmp_path / "vae").latent_rate_hz == 1000
