"""The QEMU Machine Protocol: the control socket that programs use."""
