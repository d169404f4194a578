"""zarr under `python -O` (PYTHONOPTIMIZE, set in slim images): it takes a key out of metadata inside an assert."""

from typing import Any

from zarr.core.group import GroupMetadata


def mend_zarr() -> None:
    """Let groups be read where asserts are left out; nothing where they are not, or where zarr no longer does that."""
    plain = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    try:
        GroupMetadata.from_dict(plain)
    except TypeError:
        read = GroupMetadata.from_dict.__func__  # type: ignore[attr-defined]

        def from_dict(cls: type[GroupMetadata], data: dict[str, Any]) -> Any:
            if data.get("node_type", "group") != "group":  # what the assert is for
                raise ValueError(f"not the metadata of a group: {data.get('node_type')!r}")
            return read(cls, {name: value for name, value in data.items() if name != "node_type"})

        GroupMetadata.from_dict = classmethod(from_dict)  # type: ignore[method-assign,assignment]
