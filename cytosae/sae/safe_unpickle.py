"""Read an untrusted pickle of `torch.save` as plain data: nothing that it names is imported or called.

An interpreter for the few opcodes that `torch.save` writes (protocol 2). Each function or class that the pickle names
must be on the lists below; calling it gives a value of ours: the location of a tensor, a dict, the fields of a config.
Everything else raises `Refused`. Time and memory are bounded by the length of the pickle.
"""

import math
import pickletools
from dataclasses import dataclass
from typing import Any

from stores.torch_archive import Refused

FLOATS = {
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
}
_STORAGES = {f"torch.{kind}" for kind in FLOATS}
_DTYPES = {f"torch.{dtype}" for dtype in FLOATS.values()}
_CALLED = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.device",
}
_MAX_DEPTH = 8  # nesting of a value in a config; 2 in the released one
_MAX_SIZE = 1 << 20  # values and characters of a config; one list may be referenced many times


@dataclass(frozen=True)
class Name:
    """A class, function or dtype that the pickle names, such as `torch.float32`."""

    name: str


@dataclass(frozen=True)
class Tensor:
    """Location of a tensor: in the record `key`, which has `length` numbers of type `dtype`."""

    key: str
    dtype: str
    length: int
    offset: int = 0
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()


@dataclass
class Instance:
    """The fields of an object whose class is allowed by name; the class itself is not imported."""

    name: str
    fields: dict[str, Any]


def read_pickle(pickled: bytes, *, classes: frozenset[str]) -> Any:
    """The content: dicts, lists, tuples, strings, numbers, `Name`, `Tensor`, and `Instance` of one of `classes`.

    Raises
    ------
    Refused
        If it names anything else; the message says what.
    ValueError, IndexError, ...
        If it is damaged: pickletools raises almost anything.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def take() -> list[Any]:
        """The values pushed since the last mark."""
        start = marks.pop()
        taken = stack[start:]
        del stack[start:]
        return taken

    for code, argument, _ in pickletools.genops(pickled):
        match code.name:
            case "PROTO" if argument == 2:
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[code.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                marks.append(len(stack) - int(code.name[-1]))
                stack.append(tuple(take()))
            case "TUPLE":
                stack.append(tuple(take()))
            case "APPEND":
                value = stack.pop()
                _as(list, stack[-1]).append(value)
            case "APPENDS":
                values = take()
                _as(list, stack[-1]).extend(values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _as(dict, stack[-1])[_as(str, key)] = value
            case "SETITEMS":
                values = take()
                keys = [_as(str, key) for key in values[::2]]
                _as(dict, stack[-1]).update(zip(keys, values[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_allowed(str(argument).replace(" ", "."), classes))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, called = stack.pop(), stack.pop()
                stack.append(_call(_as(Name, called).name, _as(tuple, arguments)))
            case "NEWOBJ":
                arguments, made = stack.pop(), stack.pop()
                if _as(Name, made).name not in classes or arguments != ():
                    raise Refused(f"is refused: it wants to make a {made.name!r:.80}")
                stack.append(Instance(made.name, {}))
            case "BUILD":
                state = _as(dict, stack.pop())
                if isinstance(stack[-1], Instance):
                    stack[-1].fields = state  # not copied: the same one may come many times
                elif state.keys() != {"_metadata"}:  # what PyTorch notes on a state dict: versions of its modules
                    raise Refused("is refused: its pickle sets fields of more than a config")
            case other:
                raise Refused(f"is refused: its pickle holds more than torch.save writes ({other})")
    raise ValueError("the pickle does not end")


def plain_config(value: Any) -> Any:
    """A value of a config as JSON values: names, NaN and infinity as text, tuples as lists.

    Raises
    ------
    Refused
        If it is nested deeper or larger than a config can be, or contains a tensor.
    """
    budget = [_MAX_SIZE]

    def walk(value: Any, depth: int) -> Any:
        budget[0] -= 1 + (len(value) if isinstance(value, str) else 0)
        if depth > _MAX_DEPTH or budget[0] < 0:
            raise Refused("is refused: its config is nested deeper, or is larger, than that of an SAE")
        match value:
            case None | bool():
                return value
            case int() if abs(value) < 2**63:
                return value
            case float():
                return value if math.isfinite(value) else str(value)
            case str():
                value.encode()  # lone surrogates raise: they are no text
                return value
            case Name():
                return value.name.removeprefix("torch.")
            case list() | tuple():
                return [walk(item, depth + 1) for item in value]
            case dict():
                return {walk(key, depth): walk(item, depth + 1) for key, item in value.items()}
            case Instance():
                return walk(value.fields, depth)
        raise Refused(f"is refused: its config holds more than plain values ({type(value).__name__})")

    return walk(value, 0)


def _allowed(name: str, classes: frozenset[str]) -> Name:
    if name not in _CALLED | _STORAGES | _DTYPES | classes:
        raise Refused(
            f"is refused: it asks for {name!r:.80}, which is neither a plain tensor nor the config of an SAE, "
            f"and may execute code"
        )
    return Name(name)


def _storage(wanted: Any) -> Tensor:
    match wanted:
        case ("storage", Name(kind), str(key), str(), int(length)) if kind in _STORAGES and length >= 0:
            return Tensor(key, FLOATS[kind.removeprefix("torch.")], length)
    raise Refused("is refused: its pickle asks for a record that is no storage of a tensor")


def _call(name: str, arguments: tuple[Any, ...]) -> Any:
    """The result, as plain data, of one of the four calls that a checkpoint may contain."""
    match name, arguments:
        case "collections.OrderedDict", ():
            return {}
        case "torch.device", (str(device),):
            return device
        case "torch.device", (str(device), int(number)):
            return f"{device}:{number}"
        case "torch._utils._rebuild_parameter", (Tensor() as tensor, *_):
            return tensor
        case "torch._utils._rebuild_tensor_v2", (
            Tensor(shape=()) as part,
            int(offset),
            tuple(shape),
            tuple(strides),
            *_,
        ):
            if all(type(number) is int and number >= 0 for number in (offset, *shape, *strides)):
                return Tensor(part.key, part.dtype, part.length, offset, shape, strides)
    raise Refused(f"is refused: its pickle calls {name} with {len(arguments)} arguments, as torch.save does not")


def _as(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise Refused(f"is refused: its pickle puts a {type(value).__name__} where a {kind.__name__} belongs")
    return value
