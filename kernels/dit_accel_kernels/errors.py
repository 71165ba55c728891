"""The errors of dit_accel_kernels; each message says what was given, what is allowed and how to fix it."""

from __future__ import annotations


class KernelError(ValueError):
    """An argument of a kernel, or the combination of two, is not allowed."""


class KernelUnavailableError(RuntimeError):
    """The implementation that was asked for by name cannot run here: no compiler, no triton, no such device."""
