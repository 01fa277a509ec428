"""Outputs larger than memory: finished bands of rows, one after the other, from norms whose maps are never held.

A GroupNorm needs the sums of a whole map, but between two norms every layer acts on single pixels. So the image is
passed through once for each norm in turn: strip by strip the layers before it are computed again, added up and
forgotten. With all norms known, a strip's queries depend on nothing else, and a band of the output on its own rows of
queries and one more at either end. The recomputation takes more than a plain call's time again, and still more where
the guide is too large to be held (`GUIDE`); what is held is the image, the keys and values, a strip and a band.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from anyup_core import checks
from anyup_core.band_plan import Pieces, Plan, plan_bands
from anyup_core.checks import OutputSize
from anyup_core.geometry import AxisWindow, plan_tiles
from anyup_torch.attention import resolve, window_attention
from anyup_torch.attention.tiled import TileAttention
from anyup_torch.image_code import ImageCode, Size
from anyup_torch.layers import ConvEncoder
from anyup_torch.streaming import Affine, activate, affine, block_size, matrix, turn

GUIDE = 1 << 29  # bytes of the guide up to which it is held, not computed again for every use


def upsample_bands(
    model: nn.Module,
    image: Float[Tensor, "B input_dim H W"],
    features: Float[Tensor, "B C h w"],
    output_size: OutputSize | None = None,
    q_chunk_size: int | None = None,
    values: Float[Tensor, "B E h w"] | None = None,
    *,
    rows: int | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Float[Tensor, "B E rows Wo"]]:
    """Yield what a plain call returns in bands of rows, from the top, with memory that does not grow with Ho.

    The inputs are checked at once; work begins with the first band. Bands are CPU tensors in channels-last order;
    there are no gradients.

    Args:
        model, image, features, output_size, q_chunk_size, values: as for `AnyUp.forward`.
        rows: rows of a band, the last one may have fewer; None for about 256 MB of float32. More rows repeat less work
            at the borders of bands.
        dtype: floating type of the bands, at most 32 bits wide; None for the type of the values.

    Raises:
        ValueError, TypeError: as for `AnyUp.forward`, for a number of rows or a type that does not fit, and for
            `backend="natten"`, which knows no bands.
    """
    size = checks.check_inputs(model.config, "NCHW", image, features, output_size, q_chunk_size, values)
    values = features if values is None else values
    if model.config.backend == "natten":
        raise ValueError('backend="natten" computes whole outputs only; load the model with backend="auto" for bands.')
    if changed := model.changed:
        raise ValueError(
            f"upsample_bands computes the model's own layers, but {', '.join(changed)} are replaced, hooked or "
            "parametrised; call the model itself."
        )
    dtype = values.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize > 4:
        raise TypeError(f"dtype={dtype} must be a floating type of at most 32 bits: float32, float16 or bfloat16.")
    channels = len(image) * max(values.shape[1], model.config.qk_dim)
    plan = plan_bands(model.config, size, tuple(features.shape[2:]), channels, rows, q_chunk_size)
    image, features, values = image.to(model.dtype), features.to(model.dtype), values.to(model.widened(values.dtype))
    return _bands(model, image, features, values, plan, dtype)


class RecomputedMaps(ImageCode):
    """The code of one image whose maps are never held: a strip of any of them is computed when it is asked for.

    Attributes:
        keys: for each grid of cells, (1, D, h, w), as in `ImageCode`.
        queries: empty; `query_rows` computes queries of any output size.
        image: (input_dim, H, W), its borders reflected.
        affines: for each encoder the scales and shifts of its norms, in their order, as far as they are known.
        guide: (H, W, D), once it is held.
    """

    def __init__(
        self, model: nn.Module, image: Float[Tensor, "input_dim H W"], grids: Sequence[Size], hold_guide: bool
    ):
        super().__init__({}, {})
        self.model = model
        self.height, self.width = image.shape[1:]
        self.image = model.image_encoder[0].pad(image[None])[0]
        self.affines: dict[str, tuple[Affine, ...]] = {"image_encoder": (), "key_encoder": (), "query_encoder": ()}
        self.guide: Float[Tensor, "H W D"] | None = None
        self.turns = [(angle.cos(), angle.sin()) for angle in model.rope.angles(self.height, self.width)]
        self.rows = max(1, min(self.height, block_size(image) // self.width))  # of a strip
        self._find_norms(("image_encoder",))
        if hold_guide:
            guide = torch.cat([self.guide_strip(*rows) for rows in self._strips()])
            self.guide = guide.view(self.height, self.width, -1)
        self._find_norms(("key_encoder", "query_encoder"))
        for grid in grids:
            pieces = Pieces(self.height, grid[0], grid[0], self.rows)
            self.keys[grid] = self._pooled("key_encoder", pieces, 0, grid[1]).permute(2, 0, 1)[None]

    def query_rows(self, size: Size, first: int, rows: int) -> Float[Tensor, "1 _ Wo D"]:
        pieces = Pieces(self.height, size[0], rows, self.rows, border=1)
        return self._pooled("query_encoder", pieces, first, size[1])[None]

    def strip(self, name: str, guide: Float[Tensor, "pixels D"]) -> Float[Tensor, "pixels D"]:
        """A strip of the map that an encoder returns, or, where a norm is not known yet, of the map that it norms."""
        encoder = getattr(self.model, name)
        return advance(encoder, guide @ matrix(encoder[0]), self.affines[name])

    def image_strip(self, first: int, rows: int) -> Float[Tensor, "pixels D"]:
        """The same for the image encoder."""
        conv = self.model.image_encoder[0]
        x = F.conv2d(self.image[None, :, first : first + rows + conv.kernel_size[0] - 1], conv.weight)[0]
        x = x.permute(1, 2, 0).flatten(0, 1).contiguous()
        return advance(self.model.image_encoder, x, self.affines["image_encoder"])

    def guide_strip(self, first: int, rows: int) -> Float[Tensor, "pixels D"]:
        """Rotated pixels of the image encoder's output."""
        if self.guide is not None:
            return self.guide[first : first + rows].flatten(0, 1)
        return turn(self.image_strip(first, rows), self.turns, first)

    def _find_norms(self, names: tuple[str, ...]) -> None:
        """Pass through the image once for each norm of these encoders: it needs the means of x and x squared.

        Strips are added in float64 on the host: a single sum over a large map would lose digits in float32.
        """
        for number in range(4):
            sums = torch.zeros(len(names), 2, self.model.config.qk_dim, dtype=torch.float64)
            for first, rows in self._strips():
                if names == ("image_encoder",):
                    maps = [self.image_strip(first, rows)]
                else:
                    guide = self.guide_strip(first, rows)
                    maps = [self.strip(name, guide) for name in names]
                wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in maps]
                sums += torch.stack([torch.stack([x.sum(0), x.square().sum(0)]) for x in wide]).cpu()
            for name, moments in zip(names, sums / (self.height * self.width)):
                norms = [layer for layer in getattr(self.model, name).modules() if isinstance(layer, nn.GroupNorm)]
                self.affines[name] += (affine(norms[number], moments, self.image),)

    def _strips(self) -> Iterator[Size]:
        return ((i, min(self.rows, self.height - i)) for i in range(0, self.height, self.rows))

    def _pooled(self, name: str, pieces: Pieces, first: int, width: int) -> Float[Tensor, "rows width D"]:
        """Rows of an encoder's output, from `first` on, averaged over a grid `width` cells wide, piece by piece."""
        wide, dim = min(width, self.width), self.model.config.qk_dim
        rows, dtype = len(pieces.wanted), self.image.dtype
        total = self.image.new_zeros(rows, wide * dim, dtype=torch.promote_types(dtype, torch.float32))
        starts, shares = pieces.shares(first)
        for start, share in zip(starts.tolist(), shares):
            x = self.strip(name, self.guide_strip(start, pieces.size)).view(1, pieces.size, self.width, dim)
            x = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), (pieces.size, wide)).permute(0, 2, 3, 1)
            total.addmm_(torch.from_numpy(share).to(total), x.reshape(pieces.size, -1).to(total.dtype))
        total = total.view(rows, wide, dim).to(dtype)
        if wide < width:
            total = F.adaptive_avg_pool2d(total.permute(2, 0, 1)[None], (rows, width))[0].permute(1, 2, 0)
        return total


def advance(
    encoder: ConvEncoder, x: Float[Tensor, "pixels D"], affines: tuple[Affine, ...]
) -> Float[Tensor, "pixels D"]:
    """Apply an encoder's ResBlocks to the output of its convolution, up to the first norm that is not in `affines`."""
    for block, known in ((encoder[1].block, affines[:2]), (encoder[2].block, affines[2:])):
        if not known:
            return x
        hidden = activate(x, known[0], torch.empty_like(x)) @ matrix(block[2])
        if len(known) == 1:
            return hidden
        x = x.addmm_(activate(hidden, known[1], hidden), matrix(block[5]))
    return x


def _bands(
    model: nn.Module,
    image: Float[Tensor, "B input_dim H W"],
    features: Float[Tensor, "B C h w"],
    values: Float[Tensor, "B E h w"],
    plan: Plan,
    dtype: torch.dtype,
) -> Iterator[Float[Tensor, "B E rows Wo"]]:
    """Yield the bands, which share the images' codes, the keys, the values, and tiles planned once.

    There are no gradients in it; the caller's mode is untouched between bands.
    """
    config, decode = model.config, model.cross_decode
    options = dict(num_heads=config.num_heads, backend=config.backend, q_chunk_size=plan.q_chunk_size)
    rows, cols = plan.windows(config.window_ratio, config.window)
    tiles = None
    if resolve(config.backend, image.device) == "tiled":
        tall, wide = plan_tiles(rows, cols, plan.q_chunk_size, plan.count)
        tiles = TileAttention(tall, wide, config.num_heads, plan.q_chunk_size, image.device)
    hold_guide = len(image) * image[0, 0].numel() * config.qk_dim * image.element_size() <= GUIDE
    with torch.no_grad():
        codes = [RecomputedMaps(model, guidance, [plan.cells], hold_guide) for guidance in image]
        keys = [decode.project_key(model.describe(code, maps[None])) for code, maps in zip(codes, features)]
    images = list(zip(codes, keys, values.permute(0, 2, 3, 1)))

    @torch.no_grad()
    def finish(band: int) -> Float[Tensor, "B E _ Wo"]:
        first, begin = plan.first(band), band * plan.rows
        seen = slice(begin, begin + plan.rows)
        window = AxisWindow(rows.keys, rows.start[seen], rows.count[seen])
        output = torch.empty(len(images), plan.rows, plan.size[1], values.shape[1], dtype=dtype)
        for (code, key, averaged), pixels in zip(images, output):
            query = decode.project_rows(code.query_rows(plan.size, first, plan.rows))
            if tiles is None:
                pixels.copy_(window_attention(query, key, averaged[None], window, cols, **options)[0])
            else:
                tiles.write(seen.start, seen.stop, query[0], key[0], averaged, pixels)
        return output[:, begin - first :].permute(0, 3, 1, 2)

    yield from map(finish, range(plan.count))
