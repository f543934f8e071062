"""The base of messages: msgspec's Struct, or, where msgspec is not installed, a stand-in that is built and compared alike.

The stand-in can't be sent. It serves machines on which the engine runs in one process (cluster.offline, bench.gpu) with nothing
installed but torch and its companions.
"""

import copy
import dataclasses
import inspect
from typing import TYPE_CHECKING, Any, dataclass_transform

__all__ = ["Struct", "replace"]


@dataclass_transform()
class PlainStruct:
    """Subclasses become dataclasses. As with msgspec: positional fields but for those of a class with kw_only, equality by type
    and fields, no hash, and an empty list, dict or set as a default means a new one for every instance."""

    def __init_subclass__(cls, *, kw_only: bool = False, **encoding: Any) -> None:
        """kw_only concerns the class's own fields. `encoding` (array_like, tag, ...) says how msgspec writes it: of no use here."""
        super().__init_subclass__()
        for name in inspect.get_annotations(cls):
            default = cls.__dict__.get(name)
            if isinstance(default, list | dict | set):
                if default:
                    raise TypeError(f"{cls.__name__}.{name}: a mutable default must be empty")
                setattr(cls, name, dataclasses.field(default_factory=lambda empty=default: copy.copy(empty)))  # type: ignore[misc]
        dataclasses.dataclass(kw_only=kw_only)(cls)


if TYPE_CHECKING:
    from msgspec import Struct
    from msgspec.structs import replace
else:
    try:
        from msgspec import Struct
        from msgspec.structs import replace
    except ImportError:
        Struct, replace = PlainStruct, dataclasses.replace
