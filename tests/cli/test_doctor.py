"""The doctor names versions, devices and what is missing, and never fails."""

import platform

import jax

from gadjax.cli import doctor


def test_what_is_there(gadjax):
    said = gadjax("doctor").splitlines()
    assert platform.python_version() in said[0]
    assert f"jax {jax.__version__}" in said
    for name in doctor.REQUIRED:
        assert any(line.startswith(f"{name} ") for line in said)
    assert any(line.startswith(f"devices: {jax.device_count()} x ") for line in said)


def test_what_is_missing(gadjax, monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: None)
    said = gadjax("doctor")
    assert "flax MISSING" in said
    assert "torch missing: only for convert --check" in said


def test_devices_that_cannot_be_used(gadjax, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ACCELERATORS", {"tpu": ((str(tmp_path),), "a TPU", "jax[tpu]")})
    assert "found a TPU that JAX does not use: pip install 'jax[tpu]'" in gadjax("doctor")

    def broken():
        raise RuntimeError("no such\nbackend")

    monkeypatch.setattr(jax, "devices", broken)
    assert "devices: none that JAX can use (no such backend)" in gadjax("doctor")
