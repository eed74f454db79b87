"""What the flags for sizes and rates take, and how sizes are shown."""

import pytest

from rso_ds import RSOConfigError
from rso_ds.units import amount, in_unit, parse_memory, parse_rate, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9), ("1.5 kb", 1500), ("300", 300), ("2M", 2 * 10**6), ("1.5TB", 15 * 10**11),
        (" 80gb ", 80 * 10**9), ("1.15GB", 1_150_000_000), ("7B", 7),
    ],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text, "--max-shard-size") == size


@pytest.mark.parametrize("text", ["", "five", "-1GB", "0", "0.5", "5 GiB", "1.2.3GB", "5 GB more"])
def test_what_is_no_size(text):
    with pytest.raises(RSOConfigError) as error:
        parse_size(text, "--max-shard-size")
    assert str(error.value) == f"--max-shard-size {text!r} is not a size: write it as 80GB or 200MB."


def test_a_size_of_nothing_where_it_may_be():
    assert parse_size("0", "--checkpoint-size", least=0) == 0
    with pytest.raises(RSOConfigError, match="--checkpoint-size 'many' is not a size"):
        parse_size("many", "--checkpoint-size", least=0)


@pytest.mark.parametrize(
    ("text", "size"), [("40GB", 40 * 10**9), ("79.25GiB", 79.25 * 2**30), (" 512 MiB ", 2**29), ("40.3MB", 40_300_000)]
)
def test_memory(text, size):
    assert parse_memory(text, "--gpu-memory") == size


@pytest.mark.parametrize("text", ["40", "40Gb", "40gb", "0GB", "-4GB", "40  GB", "1TB"])
def test_what_is_no_memory(text):
    with pytest.raises(RSOConfigError) as error:
        parse_memory(text, "--gpu-memory")
    assert str(error.value) == f"--gpu-memory {text!r} is not an amount of memory: write it as 40GB or 79GiB."


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("10Gbit", 1.25e9), ("25 Gbit/s", 3.125e9), ("300GB/s", 3e11), ("1Mb", 1.25e5), ("1Gbps", 1.25e8),
        ("8bits", 1.0), ("2kB", 2e3), ("3Kbytes/s", 3e3), ("1Tbyte", 1e12), (".5GB", 5e8),
    ],
)  # fmt: skip
def test_rates(text, rate):
    assert parse_rate(text, "--link") == rate


@pytest.mark.parametrize("text", ["fast", "0Gbit", "10", "1.2.3GB/s", "10 gbit", "-1GB/s"])
def test_what_is_no_rate(text):
    with pytest.raises(RSOConfigError) as error:
        parse_rate(text, "--intra-link")
    assert str(error.value) == f"--intra-link: {text!r} is not a rate: write it as 10Gbit or 300GB/s."


def test_sizes_are_shown():
    assert [amount(n) for n in (0, 999_999, 10**6, 34_560_000_000, 1.5e12)] == [
        "0 bytes", "999999 bytes", "1 MB", "34.6 GB", "1.5 TB",
    ]  # fmt: skip
    assert in_unit(1234567, "MB", ",.2f") == "1.23 MB"
    assert in_unit(2**31, "GiB", ".0f") == "2 GiB"
