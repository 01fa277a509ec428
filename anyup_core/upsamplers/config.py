"""What the settings of all upsamplers have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from anyup_core.encoders.rows import Row
from anyup_core.preprocessing import IMAGENET, Preprocessing
from anyup_core.settings import require


@dataclasses.dataclass(frozen=True)
class Published:
    """One set of published weights.

    Attributes:
        address: an https address, or "org/name/file" on the Hugging Face hub if it begins otherwise.
        channels: of the features; None if any.
        settings: of the model, that the weights do not tell.
    """

    address: str
    channels: int | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpsamplerConfig:
    """Settings of one upsampler; subclasses add theirs.

    A method is also described by what its class says, and by what follows from the settings.

    Attributes:
        decided: names of the fields that the shapes of the weights decide.
        input_dim: channels of the image.
        width: number of channels of the features; None if any.
        multiple: what the number of channels of the features has to be a multiple of.
        normalisation: mean and standard deviation of the image.
        entries: keys of a training checkpoint under which the state dict may be.
    """

    decided: ClassVar[tuple[str, ...]] = ()
    input_dim: ClassVar[int] = 3
    width: ClassVar[Any] = None
    multiple: ClassVar[Any] = 1
    normalisation: ClassVar[Any] = IMAGENET
    entries: ClassVar[tuple[str, ...]] = ()

    def rows(self) -> Iterator[Row]:
        """Yield the key table; a method without weights has none."""
        yield from ()

    @classmethod
    def published(cls, name: str, **options: Any) -> Published | None:
        """Return the weights of a name, or None if there are none of it.

        Raises ValueError for options that the name does not have, TypeError for unknown ones.
        """
        return None

    @classmethod
    def published_names(cls) -> tuple[str, ...]:
        return ()

    @classmethod
    def select(cls, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the tensors of a state dict that are this upsampler's, by their names in its key table.

        Raises ValueError where they are known to be of no use.
        """
        return dict(tensors)

    @classmethod
    def shapes_tell(cls, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return the fields in `decided`, from the shapes of selected tensors; the defaults for missing ones."""
        return {}

    def native_size(self, image: tuple[int, int], cells: tuple[int, int]) -> tuple[int, int]:
        """Return the output's height and width where none are asked for, given the image's and the features'."""
        return image

    def check(self, image: tuple[int, int], cells: tuple[int, int], size: tuple[int, int]) -> None:
        """Raise ValueError for sizes of image, features and output that the method cannot handle."""

    def replace(self, **changes: Any) -> Any:
        """Return a copy with some fields changed.

        Raises:
            TypeError: for a field that does not exist.
            ValueError: for a value no model can have.
        """
        known = [field.name for field in dataclasses.fields(self)]
        if unknown := sorted(set(changes) - set(known)):
            has = f"its settings are {', '.join(known)}" if known else "it has none"
            raise TypeError(f"{type(self).__name__} has no setting {', '.join(unknown)}; {has}.")
        return dataclasses.replace(self, **changes)


def require_positive(config: Any, *names: str) -> None:
    """Raise ValueError unless these fields are positive whole numbers."""
    for name in names:
        value = getattr(config, name)
        positive = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        require(positive, name, value, "it must be a positive integer")


def require_normalisation(value: Any) -> Preprocessing:
    """Return mean and standard deviation of three channels, as tuples; ValueError unless it is such a pair."""
    pair = np.asarray(value, np.float64) if isinstance(value, tuple | list) else np.zeros(0)
    fits = pair.shape == (2, 3) and np.isfinite(pair).all() and (pair[1] > 0).all()
    require(fits, "normalisation", value, "give mean and standard deviation of three channels, in [0, 1]")
    rows: Any = pair.tolist()
    return tuple(rows[0]), tuple(rows[1])


def size_of(tensors: Mapping[str, np.ndarray], key: str, axis: int, default: int) -> int:
    """Return the size of a tensor along an axis, or the default where there is no such tensor or axis."""
    tensor = tensors.get(key)
    return int(tensor.shape[axis]) if tensor is not None and -tensor.ndim <= axis < tensor.ndim else default
