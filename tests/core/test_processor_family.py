"""Which family of processors this is, by what Linux says of it."""

import pytest
import torch

from saccade.core import hardware
from saccade.core.hardware import FAMILIES, family_of, processor_family

AVX2, AVX512, AMX = ["avx2"], ["avx2", "avx512f"], ["avx2", "avx512f", "amx_tile", "amx_bf16"]
INFO = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nmodel name\t: x\nflags\t\t: {}\n\n"


@pytest.fixture
def cpuinfo(monkeypatch, tmp_path):
    """The family of a machine whose /proc/cpuinfo is the text, or is missing."""

    def found(text):
        path = tmp_path / "cpuinfo"
        if text is not None:
            path.write_text(text)
        monkeypatch.setattr(hardware, "_CPUINFO", path)
        processor_family.cache_clear()
        return processor_family()

    yield found
    processor_family.cache_clear()


@pytest.mark.parametrize(
    ("machine", "vendor", "number", "flags", "family"),
    [
        ("x86_64", "GenuineIntel", "6", AMX, "amx"),
        ("x86_64", "GenuineIntel", "6", AVX512, "avx512"),
        ("x86_64", "GenuineIntel", "6", AVX2, "avx2"),
        ("x86_64", "GenuineIntel", "6", ["avx2", "avx512f", "amx_tile"], "avx512"),
        ("x86_64", "AuthenticAMD", "26", AVX512, "zen5"),
        ("x86_64", "AuthenticAMD", "25", AVX512, "zen4"),
        ("x86_64", "AuthenticAMD", "25", AVX2, "avx2"),  # Zen 3
        ("x86_64", "AuthenticAMD", "27", AVX512, "avx512"),
        ("x86_64", "", None, [], "other"),
        ("aarch64", "", None, ["asimd"], "neon"),
        ("arm64", "", None, [], "neon"),
    ],
)
def test_families(machine, vendor, number, flags, family):
    assert family_of(machine, vendor, number, flags) == family and family in FAMILIES


def test_linux_is_read(cpuinfo, monkeypatch):
    monkeypatch.setattr(hardware.platform, "machine", lambda: "x86_64")
    text = INFO.format("AuthenticAMD", 26, "fpu avx2 avx512f avx512_bf16")
    assert cpuinfo(text * 2) == "zen5"
    assert cpuinfo(INFO.format("GenuineIntel", 6, " ".join(AMX))) == "amx"


def test_elsewhere_torch_is_asked(cpuinfo, monkeypatch):
    monkeypatch.setattr(hardware.platform, "machine", lambda: "AMD64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert cpuinfo(None) == "avx512"
