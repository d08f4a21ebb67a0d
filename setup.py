"""Builds the two C extensions; everything else is declared in pyproject.toml.

cffi's `cffi_modules` keyword has no place in pyproject.toml, which is why this file exists.
"""

from pathlib import Path

from setuptools import setup

BUILDERS = ("coordinator/contract/build_segment.py", "vcpu/build_core.py")

here = Path(__file__).resolve().parent
setup(cffi_modules=[f"{builder}:ffibuilder" for builder in BUILDERS if (here / builder).exists()])
