"""What a process runs on: the memory of freed tensors stays its own."""

import platform
import resource
import subprocess
import sys

import pytest

from helpers import ENV, ROOT


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_large_tensor_takes_the_memory_of_the_last_one():
    """Each was mapped anew (the first few still are), page by page: a tenth of the time of a
    fine-tuning."""
    code = (
        "import resource, torch\n"
        "from smallgpt.hardware import choose_device\n"
        "choose_device('cpu')\n"
        "for i in range(31):\n"
        "    if i == 20: first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.zeros(2**24)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENV, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 5 * 2**26 // resource.getpagesize(), (
        "ten tensors fault in fewer pages than five have"
    )
