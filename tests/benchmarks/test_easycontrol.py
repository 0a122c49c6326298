"""The benchmark of EasyControl: what it refuses."""

import pytest

from dit_toolkit.benchmarks import easycontrol


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--repeats=2", "--repeats must be at least 5"),
        ("--hidden=100", "multiple of 128"),
        ("--single=0", "--single must be at least 1"),
        ("--text-dim=-4", "--text-dim must be at least 1"),
        ("--picture=1000", "square of a number"),
        ("--rank=abc", "invalid int value"),
    ],
)
def test_the_benchmark_refuses_sizes_that_cannot_be(argument, said, capsys):
    with pytest.raises(SystemExit):
        easycontrol.main([argument])
    assert said in capsys.readouterr().err
