from xla_flags import HURRY, hurried, known


def test_only_flags_that_xla_knows():
    assert known(HURRY) and not known("--xla_no_such_flag=true")
    flags = hurried("--xla_force_host_platform_device_count=2")
    assert flags.startswith("--xla_force_host_platform_device_count=2 ") and HURRY in flags
    assert known(flags)


def test_flags_are_added_once():
    assert hurried(f"{HURRY} --xla_a") == f"{HURRY} --xla_a"
