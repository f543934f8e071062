"""The base of all messages."""

from cluster.structs import Struct


class Wire(Struct, array_like=True):
    """Base of all structs below. Treated as immutable once sent or received."""
