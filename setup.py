"""Builds the C extensions; everything else is declared in pyproject.toml.

cffi's `cffi_modules` keyword has no place in pyproject.toml, which is why this file exists.
"""

from setuptools import setup

setup(
    cffi_modules=[
        "coordinator/contract/build_segment.py:ffibuilder",
        "coordinator/contract/sandbox/build_sandbox.py:ffibuilder",
        "coordinator/migrate/build_ram.py:ffibuilder",
        "vcpu/build_core.py:ffibuilder",
        "blockd/build_batch.py:ffibuilder",
    ]
)
