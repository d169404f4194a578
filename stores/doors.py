"""Lazy packages ("doors"): the public names listed in `__init__.pyi` are imported on first use; so are rooms below.

Python gives a package an attribute for every imported submodule. If a public function has the name of a submodule
(`cytosae.compare`), the meaning of that name would depend on earlier imports. Therefore such a module is made callable:
`cytosae.compare(...)` works beside `cytosae.compare.CompareConfig`.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import lazy_loader


def open_door(
    package: str, file: str, *, callable_modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package (PEP 562, SPEC 1).

    Parameters
    ----------
    package, file : the package's `__name__` and `__file__`; beside it lies `__init__.pyi`
    callable_modules : public names that are submodules, each of which calls `make_callable`
    """
    load, list_names, names = lazy_loader.attach_stub(package, file)

    def load_name(name: str) -> Any:
        is_module = name in callable_modules or (Path(file).parent / name / "__init__.pyi").is_file()  # a room
        return importlib.import_module(f"{package}.{name}") if is_module else load(name)

    return load_name, list_names, names


def make_callable(module: str, function: str) -> None:
    """Make a module callable: a call of the module calls this function of it. To be called at the module's end."""
    found = sys.modules[module]
    found.__dict__["_function"] = function
    found.__class__ = _CallableModule


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **settings: Any) -> Any:
        return getattr(self, self.__dict__["_function"])(*args, **settings)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(getattr(self, self.__dict__["_function"]))
