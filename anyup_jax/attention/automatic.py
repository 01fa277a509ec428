"""The backend `auto`: the fused kernels in programs for a TPU, tiles of plain operations in all others."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array, Float, Int

from anyup_core.geometry import AxisWindow
from anyup_jax.attention.pallas_tpu import attend, kernel_tables
from anyup_jax.attention.tiled import attend_tiles, tile_tables
from anyup_jax.promotion import standard_promotion

EXPORTED_CHANNELS = 512  # in programs for any number of channels, the kernel takes as many of them as of so many


def automatic(
    query: Float[Array, "B Ho Wo D"],
    key: Float[Array, "B h w D"],
    values: Float[Array, "B h w E"],
    rows: AxisWindow,
    cols: AxisWindow,
    *,
    num_heads: int,
    q_chunk_size: int | None = None,
    strip: Int[Array, ""] | int = 0,
) -> Float[Array, "B Ho Wo E"]:
    """Compute `window_attention` with `pallas_tpu` where the program is lowered for a TPU and the keys fit, or `tiled`.

    The platform is that of the program, not of the host that traces it: a program compiled on a CPU host for a TPU has
    the kernels. A program for one platform has one of the two; one that `jax.export` makes for several has both.
    """
    tiles = tile_tables(query, rows, cols, q_chunk_size, strip)
    known = isinstance(values.shape[-1], int)
    shape = values if known else jax.ShapeDtypeStruct((*values.shape[:3], EXPORTED_CHANNELS), values.dtype)
    kernels = kernel_tables(query, key, shape, rows, cols, num_heads, q_chunk_size, strip)
    if kernels is None:
        return attend_tiles(query, key, values, tiles, num_heads)
    return _program(_Kernels(num_heads), _Tiles(num_heads), (tiles, kernels), query, key, values)


@dataclasses.dataclass(frozen=True)
class _Tiles:
    num_heads: int

    def __call__(self, tables, query, key, values):
        return attend_tiles(query, key, values, tables[0], self.num_heads)


@dataclasses.dataclass(frozen=True)
class _Kernels:
    num_heads: int

    def __call__(self, tables, query, key, values):
        channels = values.shape[-1]
        if isinstance(channels, int):
            return attend(query, key, values, tables[1], self.num_heads)
        block = tables[1].channels
        blocks = (channels + block - 1) // block
        padded = jnp.pad(values, ((0, 0), (0, 0), (0, 0), (0, blocks * block - channels)))
        padded = jnp.moveaxis(padded.reshape(*values.shape[:3], blocks, block), 3, 0)
        output = lax.map(lambda values: attend(query, key, values, tables[1], self.num_heads), padded)
        return jnp.moveaxis(output, 0, 3).reshape(*query.shape[:3], blocks * block)[..., :channels]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def by_platform(on_tpu: Callable[..., Any], elsewhere: Callable[..., Any], tables: Any, *operands: Any) -> Any:
    """Call `on_tpu` in programs for a TPU and `elsewhere` in all others; differentiable in the operands.

    `lax.platform_dependent` does so too, but in a program for several platforms it lowers each function for every one
    of them, and the kernels have no lowering but one.

    Args:
        on_tpu, elsewhere: functions `(tables, *operands)`; hashable, and equal to others that do the same.
        tables: a tree of arrays.
        operands: arrays.
    """
    flat, tree = jax.tree.flatten((tables, *operands))
    output = jax.tree.structure(jax.eval_shape(elsewhere, tables, *operands))
    return output.unflatten(_primitive.bind(*flat, functions=(_Flat(on_tpu, tree), _Flat(elsewhere, tree))))


def _forward(on_tpu, elsewhere, tables, *operands):
    return _program(on_tpu, elsewhere, tables, *operands), (tables, operands)


@standard_promotion()
def _backward(on_tpu, elsewhere, saved, cotangent):
    tables, operands = saved
    return None, *_program(_Gradients(on_tpu), _Gradients(elsewhere), tables, cotangent, *operands)


by_platform.defvjp(_forward, _backward)
_program = jax.jit(by_platform, static_argnums=(0, 1), inline=True)  # compiled once where it is not called in a program


@dataclasses.dataclass(frozen=True)
class _Gradients:
    function: Callable[..., Any]

    def __call__(self, tables, cotangent, *operands):
        return jax.vjp(lambda *x: self.function(tables, *x), *operands)[1](cotangent)


@dataclasses.dataclass(frozen=True)
class _Flat:
    """The function of a flat list of arrays, which returns one; `mapped` are the axes of these that `vmap` maps."""

    function: Callable[..., Any]
    tree: Any
    mapped: tuple[tuple[int | None, ...], ...] = ()

    @standard_promotion()
    def __call__(self, *flat):
        def call(*flat):
            return jax.tree.leaves(self.function(*self.tree.unflatten(flat)))

        for axes in self.mapped:
            call = jax.vmap(call, axes)
        return call(*flat)


_primitive = Primitive("attention_by_platform")
_primitive.multiple_results = True


@_primitive.def_abstract_eval
def _shapes(*avals, functions):
    shapes = jax.eval_shape(functions[1], *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals))
    return [avals[0].update(shape=x.shape, dtype=x.dtype, weak_type=False) for x in shapes]


def _batch(flat, axes, *, functions):
    mapped = tuple(dataclasses.replace(function, mapped=(*function.mapped, tuple(axes))) for function in functions)
    output = _primitive.bind(*flat, functions=mapped)
    return output, [0] * len(output)


def _lower(index: int):
    def lower(context, *flat, functions):
        return mlir.lower_fun(functions[index], multiple_results=True)(context, *flat)

    return lower


batching.primitive_batchers[_primitive] = _batch
mlir.register_lowering(_primitive, _lower(1))
mlir.register_lowering(_primitive, _lower(0), platform="tpu")
