"""Doors of packages: public names are loaded when they are asked for, from the places that `__init__.pyi` says.

A package gets an attribute for every submodule that is imported. Where a public function has the name of a submodule
(`cytosae.compare`), which of the two a notebook finds would depend on what was imported before. So such a module can
be called: `cytosae.compare(...)` beside `cytosae.compare.CompareConfig`.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
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
        return importlib.import_module(f"{package}.{name}") if name in callable_modules else load(name)

    return load_name, list_names, names


def make_callable(module: str, function: str) -> None:
    """Let the module of this name, which is being imported, be called as its function."""
    found = sys.modules[module]
    found.__dict__["_function"] = function
    found.__class__ = _CallableModule


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **settings: Any) -> Any:
        return getattr(self, self.__dict__["_function"])(*args, **settings)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(getattr(self, self.__dict__["_function"]))
