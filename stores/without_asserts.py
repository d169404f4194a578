"""Makes zarr work under `python -O` (PYTHONOPTIMIZE, as in slim images): it removes a key inside an assert."""

from typing import Any

from zarr.core.group import GroupMetadata


def mend_zarr() -> None:
    """Let zarr read groups without asserts; does nothing if asserts run, or if zarr no longer needs it."""
    plain = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    try:
        GroupMetadata.from_dict(plain)
    except TypeError:
        read = GroupMetadata.from_dict.__func__  # type: ignore[attr-defined]

        def from_dict(cls: type[GroupMetadata], data: dict[str, Any]) -> Any:
            if data.get("node_type", "group") != "group":  # the condition of the assert
                raise ValueError(f"not the metadata of a group: {data.get('node_type')!r}")
            return read(cls, {name: value for name, value in data.items() if name != "node_type"})

        GroupMetadata.from_dict = classmethod(from_dict)  # type: ignore[method-assign,assignment]
