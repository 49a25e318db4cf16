"""The types of arrays with their shapes: jaxtyping's, or mere names where it is not installed."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32, Int32, Int64, Key, Num, Shaped, UInt8, UInt32
else:
    try:
        from jaxtyping import Bool, Float, Float32, Int32, Int64, Key, Num, Shaped, UInt8, UInt32
    except ImportError:  # a packed model runs without it

        class Shaped:
            """The type of an array, whatever its dtype and shape."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Bool = Float = Float32 = Int32 = Int64 = Key = Num = UInt8 = UInt32 = Shaped

__all__ = ["Bool", "Float", "Float32", "Int32", "Int64", "Key", "Num", "Shaped", "UInt8", "UInt32"]
