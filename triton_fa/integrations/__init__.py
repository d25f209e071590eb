"""This package inside other frameworks. Each module imports the framework it is for."""

from __future__ import annotations

import importlib
from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from triton_fa.errors import TritonFAError


class FeatureError(TritonFAError, NotImplementedError):
    """A framework asks for something that attention here does not do; the message names it."""


class FrameworkVersionError(TritonFAError, ImportError):
    """A framework is missing, or of a version that its integration was not written for."""


def require(name: str, supported: str) -> None:
    """Raise unless a framework is there in a supported version.

    Sources that do not tell their version are taken for supported.

    Args:
        name: Of the distribution, and of its module.
        supported: A version specifier: ">=1.2,<2". Development versions count as what they become.

    Raises:
        FrameworkVersionError: it is missing, too old or too new.
    """
    found = _version(name)
    if found is None:
        raise FrameworkVersionError(f"{name}: expected {supported}, found none installed")
    try:
        # A development version sorts before the release that it leads to.
        fits = Version(found).base_version in SpecifierSet(supported)
    except InvalidVersion:
        return
    if not fits:
        raise FrameworkVersionError(f"{name}: expected {supported}, found {found}")


def _version(name: str) -> str | None:
    """Of a distribution, or else of a module; empty if it does not say, None if there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # it is there, and misses something itself
            raise
        return None
    return str(getattr(module, "__version__", ""))
