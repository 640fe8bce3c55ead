"""The suite's own rule: a skip without an allowed reason fails the run."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
CONFTEST = (Path(__file__).parent / "conftest.py").read_text()


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("no GPU", 0),
        ("no lm-eval is installed", 0),
        ("data that may not ship: sample not found", 0),
        ("megatron is missing", 1),
        ("slow", 1),
    ],
)
def test_only_listed_reasons_pass(pytester: pytest.Pytester, reason: str, code: int) -> None:
    pytester.makeconftest(CONFTEST)
    skipped = f"@pytest.mark.skip(reason={reason!r})\ndef test_a():\n    assert False\n"
    pytester.makepyfile(f"import pytest\n{skipped}def test_b():\n    assert True\n")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    assert result.ret == code
    assert ("not an allowed reason to skip" in result.stdout.str()) == bool(code)


def test_a_skipped_import_is_no_excuse(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile("import pytest\npytest.importorskip('no_such_module')\ndef test_a():\n    assert True\n")
    assert pytester.runpytest_subprocess("-p", "no:cacheprovider").ret != 0
