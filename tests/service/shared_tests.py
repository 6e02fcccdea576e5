"""Tests of one server, to be run against another."""

import inspect
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any


def shared_with(module: ModuleType, fixture: str, but: Collection[str] = ()) -> dict[str, Callable[..., Any]]:
    """The tests of a module that ask the server of a fixture.

    Args:
        module: whose tests.
        fixture: its name; where a test comes from, and where it runs, each has a fixture of that name.
        but: names of those that look into the server's process.
    """
    tests = {name: test for name, test in vars(module).items() if name.startswith("test_")}
    assert set(but) <= set(tests), "an exception that is no test"
    asking = {name for name, test in tests.items() if fixture in inspect.signature(test).parameters}
    return {name: tests[name] for name in asking - set(but)}
