"""Variables that are set before libraries are imported: for which CPUs, and never over the user's values."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.machine import environment as settings
from flows.machine.environment import NUMPY_WITHOUT_AVX512, has_slow_avx512_sort, prepare_numpy

CPUINFO = """processor\t: 0
vendor_id\t: {vendor}
cpu family\t: {family}
model name\t: as sold
flags\t\t: fpu vme sse2 avx2 {flags}

processor\t: 1
vendor_id\t: {vendor}
cpu family\t: {family}
"""


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "slow"),
    [
        ("AuthenticAMD", "25", "avx512f avx512vbmi2", True),  # Zen 4
        ("AuthenticAMD", "25", "", False),  # Zen 3
        ("AuthenticAMD", "26", "avx512f avx512vbmi2", False),  # Zen 5
        ("GenuineIntel", "6", "avx512f", False),
    ],
)
def test_cpus_that_sort_slowly_by_avx512(vendor: str, family: str, flags: str, slow: bool) -> None:
    assert has_slow_avx512_sort(CPUINFO.format(vendor=vendor, family=family, flags=flags)) is slow
    assert not has_slow_avx512_sort("")


def test_the_users_own_setting_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    name, value = NUMPY_WITHOUT_AVX512
    monkeypatch.setattr(settings, "has_slow_avx512_sort", lambda _: True)
    monkeypatch.setenv(name, "")  # so that the old value is restored at the end
    monkeypatch.delenv(name)
    prepare_numpy()
    assert os.environ[name] == value
    monkeypatch.setenv(name, "AVX2")
    prepare_numpy()
    assert os.environ[name] == "AVX2"


@pytest.mark.skipif(
    not has_slow_avx512_sort(Path("/proc/cpuinfo").read_text(encoding="utf-8")),
    reason="a CPU that sorts well by AVX-512",
)
def test_numpy_knows_the_names() -> None:
    """Check the names in NumPy: for unknown names it only warns, and continues with AVX-512."""
    program = "import numpy._core._multiarray_umath as m; print(m.__cpu_features__['X86_V4'])"
    environment = os.environ | dict([NUMPY_WITHOUT_AVX512])
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, encoding="utf-8")
    assert done.stdout.strip() == "False"
