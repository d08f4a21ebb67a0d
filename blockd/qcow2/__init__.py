"""The qcow2 image format, versions 2 and 3.

Source for all files here: "Qcow2 Image File Format" (QEMU, docs/interop/qcow2), cited by section.
"""
