"""The softmax loss's Triton kernels, in Triton's interpreter: in a process of its own, since Triton asks for it when it
is imported.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from train.losses.kinds.softmax import serves

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed; torch's CUDA builds bring it")
def test_the_kernels_are_the_dense_form() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{HELPERS.parents[1]}{os.pathsep}{HELPERS}"}
    result = subprocess.run(
        [sys.executable, HELPERS / "kernel_checks.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "the kernels' loss is the dense loss\n"


def test_a_cpu_does_without() -> None:
    assert not serves(torch.zeros(2, 3))
