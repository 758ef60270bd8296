"""Where kernels run: on CUDA, or interpreted (test_interpreter.py starts that)."""

from __future__ import annotations

import pytest
import torch

from backends.kernels.dispatch import IS_INTERPRETED

DEVICE = "cpu" if IS_INTERPRETED else pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=[DEVICE])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device; test_interpreter.py runs these under the interpreter")
    return request.param
