"""`config.json` key by key, in both of its generations: types checked, what is unknown refused."""

from collections.abc import Mapping, Sequence
from typing import Any

from mqa_jax.attention.positions import Rope
from mqa_jax.core.checks import check_integer, check_number

# Their names for an activation, and ours.
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}

_SCALINGS = ("default", "linear", "llama3")
_LENGTH = "original_max_position_embeddings"
_WINDOWED = {"sliding_attention": True, "full_attention": False}


class Keys:
    """A `config.json`, or an object within it. A key that is null is one that is not there.

    Args:
      values: the object.
      where: what errors call it, such as the file's path.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self._values = {key: value for key, value in values.items() if value is not None}
        self._nulls = set(values) - set(self._values)
        self.where = where

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def refused(self, key: str, why: str) -> ValueError:
        """The error of a value that cannot be."""
        return ValueError(f"{self.where}: {key} is {self._values.get(key)!r}, {why}")

    def integer(
        self, key: str, default: int | None = None, *, least: int = 1, most: int = 2**31 - 1
    ) -> int:
        value = self._get(key, default)
        return check_integer(f"{self.where}: {key}", value, least=least, most=most)

    def number(self, key: str, default: float | None = None, *, above: float = 0.0) -> float:
        return check_number(f"{self.where}: {key}", self._get(key, default), above=above)

    def optional(self, key: str, default: float | None = None) -> float | None:
        """A number above 0; None where it is null, `default` where it is not there at all."""
        if key not in self and (default is None or key in self._nulls):
            return None
        return self.number(key, default)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.refused(key, "not true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.refused(key, "which is no text")
        return value

    def inner(self, key: str) -> "Keys":
        """The object at a key; one without keys where there is none."""
        value = self._values.get(key, {})
        if not isinstance(value, dict):
            raise self.refused(key, "not an object with keys")
        return Keys(value, f"{self.where}: {key}")

    def only(self, accepted: Mapping[str, Any], why: str) -> None:
        """Refuses any other value of these keys than the one that is given for each."""
        for key, value in accepted.items():
            if self._values.get(key, value) != value:
                raise self.refused(key, f"and {why} {value!r}")

    def activation(self, key: str, default: str | None = None) -> str:
        return self.known_activation(key, self.text(key, default))

    def known_activation(self, key: str, name: str) -> str:
        """`name`, which stands under `key`, in our words."""
        if name not in ACTIVATIONS:
            raise ValueError(
                f"{self.where}: {key} asks for the activation {name!r}, which is not one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[name]

    def rope(self) -> Rope:
        """Of version 5, `rope_parameters`; of version 4, `rope_theta` and `rope_scaling`."""
        key = "rope_parameters" if "rope_parameters" in self else "rope_scaling"
        options = self.inner(key)
        for name, value in options._values.items():
            if isinstance(value, dict):
                raise options.refused(name, "but all layers must turn positions alike")
        self.only({"partial_rotary_factor": 1.0}, "heads can only be rotated whole:")
        options.only({"partial_rotary_factor": 1.0}, "heads can only be rotated whole:")
        name = "rope_type" if "rope_type" in options else "type"
        scaling = options.text(name, "default")
        if scaling not in _SCALINGS:
            raise options.refused(
                name, f"and of scalings of positions only {', '.join(_SCALINGS)} are supported"
            )
        # What is said in two places must be the same.
        said, again = (
            options._values | {"rope_type": scaling},
            {"rope_theta": self.get("rope_theta")},
        )
        if key == "rope_parameters":
            again |= self.inner("rope_scaling")._values
        elif "type" in said:
            again["rope_type"] = said["type"]
        if "type" in again:
            again["rope_type"] = again.pop("type")
        for name, value in again.items():
            if value is not None and name in said and said[name] != value:
                raise ValueError(
                    f"{options.where}: {name} is {said[name]!r}, and in another place {value!r}: "
                    "they cannot both be right"
                )
        theta = options.number("rope_theta", self.number("rope_theta", 10000.0))
        if scaling == "default":
            options.only({"factor": 1.0}, "without a rope_type that scales it is")
            return Rope(theta=theta)
        factor = options.number("factor")
        if scaling == "linear":
            return Rope(theta=theta, scaling=scaling, factor=factor)
        return Rope(
            theta=theta,
            scaling=scaling,
            factor=factor,
            low_freq_factor=options.number("low_freq_factor"),
            high_freq_factor=options.number("high_freq_factor"),
            # Beside the object it counts before what is in it.
            original_max_length=(self if _LENGTH in self else options).integer(
                _LENGTH, self.get("max_position_embeddings")
            ),
        )

    def windows(
        self, is_windowed: Sequence[bool], default: int | None = None
    ) -> int | tuple[int | None, ...] | None:
        """`sliding_window` in the layers that `layer_types`, or else `is_windowed`, says."""
        if "layer_types" in self:
            types = self.get("layer_types")
            if (
                not isinstance(types, list)
                or len(types) != len(is_windowed)
                or not set(map(str, types)) <= set(_WINDOWED)
            ):
                raise self.refused(
                    "layer_types", f"not one of {list(_WINDOWED)} for each of {len(is_windowed)}"
                )
            is_windowed = [_WINDOWED[kind] for kind in types]
        window = self.optional("sliding_window", default)
        if window is None or not any(is_windowed):
            return None
        window = self.integer("sliding_window", default)
        if all(is_windowed):
            return window
        return tuple(window if windowed else None for windowed in is_windowed)

    def _get(self, key: str, default: Any) -> Any:
        value = self._values.get(key, default)
        if value is None:
            raise ValueError(f"{self.where}: {key} is missing")
        return value
