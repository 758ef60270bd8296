"""Starts the tests of kernels over several instances' KV under Triton's interpreter."""

from __future__ import annotations

import pytest
import test_interpreter


@pytest.mark.slow
def test_every_distributed_kernel_agrees_with_its_reference_when_interpreted():
    test_interpreter.test_every_kernel_agrees_with_its_reference_when_interpreted(
        "test_distributed_kernels.py"
    )
