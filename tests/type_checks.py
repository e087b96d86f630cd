"""Types and shapes of mmalign are checked on every call, and a check is made when its function is first called.

jaxtyping's own wrapper makes two checks of a function when it is defined, called or not, and passes the arguments of each call
through both: more work than a tiny training. Here arguments and result pass one check, in which a name of an axis has one size.
"""

import dataclasses
import functools
import inspect
import threading
import types
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

# The tower: an int may stand for a float, as for every type checker. A violation is a TypeError, as of jaxtyping's own wrapper.
typed = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))
jaxtyped = jaxtyping.jaxtyped
sizes_of_axes = jaxtyped("context")
NOT_AT_ONCE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
checks: list[Callable[[], Any]] = []  # of the functions and dataclasses of all modules that were imported
checks_of_code: dict[types.CodeType, tuple[dict[str, Any], Callable[..., Any]]] = {}  # of functions inside of functions
calling = threading.local()


def install() -> None:
    """Check every module of mmalign that is imported from now on."""
    jaxtyping.install_import_hook("mmalign", "type_checks.typed")
    jaxtyping.jaxtyped = lambda *, typechecker: checked  # what the hook writes above functions and classes


def checked(what: Any) -> Any:
    """A function that checks its calls; a class, whose fields are checked where it is a dataclass."""
    if inspect.isclass(what):
        if dataclasses.is_dataclass(what) and not hasattr(what.__init__, "__wrapped__"):
            what.__init__ = _checking(what.__init__)
        return what
    if not what.__annotations__:
        return what
    inside = "<locals>" in what.__qualname__ and not what.__code__.co_flags & NOT_AT_ONCE and not _computes_an_axis(what)
    return _checking_inside(what) if inside else _checking(what)


def _checking(function: Callable[..., Any]) -> Callable[..., Any]:
    check: Callable[..., Any] | None = None

    def made() -> Callable[..., Any]:
        nonlocal check
        check = check or _check(function, function)
        return check

    @functools.wraps(function)
    def wrapper(*args: Any, **options: Any) -> Any:
        __tracebackhide__ = True
        with sizes_of_axes:
            return (check or made())(*args, **options)

    checks.append(made)
    return wrapper


def _checking_inside(function: Any) -> Callable[..., Any]:
    """The check of a function that its outer function defines anew at each call: made once for all of them."""

    @functools.wraps(function)
    def wrapper(*args: Any, **options: Any) -> Any:
        __tracebackhide__ = True
        annotations, check = checks_of_code.get(function.__code__, (None, None))
        if check is None or annotations != function.__annotations__:
            check = _check(function, _called)
            checks_of_code[function.__code__] = function.__annotations__, check
        with sizes_of_axes:
            calling.function = function
            return check(*args, **options)

    return wrapper


def _called(*args: Any, **options: Any) -> Any:
    __tracebackhide__ = True
    return calling.function(*args, **options)


def _check(function: Any, body: Callable[..., Any]) -> Callable[..., Any]:
    """A body that is called where arguments, and returned from where the result, are what the function's annotations say."""
    hints = {name: _resolved(hint, function.__globals__) for name, hint in function.__annotations__.items()}
    if function.__code__.co_flags & NOT_AT_ONCE or _computes_an_axis(function):
        return jaxtyped(function, typechecker=typed)
    # Without the names of its module: beartype's code uses builtins, which may have other meanings there.
    bare = types.FunctionType(function.__code__, {}, function.__name__, function.__defaults__, function.__closure__)
    bare.__kwdefaults__, bare.__annotations__ = function.__kwdefaults__, hints
    bare.__module__, bare.__qualname__ = function.__module__, function.__qualname__
    return typed(functools.wraps(bare)(lambda *args, **options: body(*args, **options)))


def _computes_an_axis(function: Any) -> bool:
    """Whether an axis has a size that an argument tells, as in `batch {length}`."""
    return any("{" in str(hint) for hint in function.__annotations__.values())


def _resolved(hint: Any, names: dict[str, Any]) -> Any:
    """What an annotation means; Any where it names what only a type checker imports, or itself."""

    def of(value: Any) -> None:
        """Bear the annotation."""

    of.__annotations__["value"] = hint
    try:
        found = typing.get_type_hints(of, names, include_extras=True)["value"]
    except NameError:
        return Any
    return Any if "ForwardRef(" in repr(found) else found
