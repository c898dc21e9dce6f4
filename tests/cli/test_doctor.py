"""gadjax doctor: versions, devices and missing packages; it never fails."""

import platform

import jax

from gadjax.cli import doctor


def test_versions_and_devices(gadjax):
    output = gadjax("doctor").splitlines()
    assert platform.python_version() in output[0]
    assert f"jax {jax.__version__}" in output
    for name in doctor.REQUIRED:
        assert any(line.startswith(f"{name} ") for line in output)
    assert any(line.startswith(f"devices: {jax.device_count()} x ") for line in output)


def test_missing_packages(gadjax, monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: None)
    output = gadjax("doctor")
    assert "flax MISSING" in output
    assert "torch missing: only for convert --check" in output


def test_unusable_devices(gadjax, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ACCELERATORS", {"tpu": ((str(tmp_path),), "a TPU", "jax[tpu]")})
    assert "found a TPU that JAX does not use: pip install 'jax[tpu]'" in gadjax("doctor")

    def broken():
        raise RuntimeError("no such\nbackend")

    monkeypatch.setattr(jax, "devices", broken)
    assert "devices: none that JAX can use (no such backend)" in gadjax("doctor")
