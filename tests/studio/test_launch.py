"""The command: quick help, plain refusals, and what is said where Gradio is missing."""

import subprocess
import sys
from pathlib import Path

import pytest

from dit_accel.cli import main

from .conftest import FLUX


def test_help_loads_no_framework() -> None:
    code = (
        "import sys; from dit_accel.cli import main; main(['demo', '--help']); "
        "print({'torch', 'gradio', 'diffusers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("set()\n") and "--no-browser" in done.stdout


def test_without_gradio_the_pip_line_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['gradio'] = None; from dit_accel.cli import main; "
        f"sys.exit(main(['demo', '--no-browser', '--pipelines', {str(FLUX)!r}, '--out', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 4 and "pip install gradio" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--host", "0.0.0.0"], "not served at the address 0.0.0.0 without a password"),
        (["--share"], "not served at a public link without a password"),
        (["--out", __file__], "is a file; give a folder"),
        (["--pipelines", "/nowhere"], "is no pipeline"),
    ],
)
def test_what_is_not_allowed_is_one_sentence(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    sentence: str,
) -> None:
    monkeypatch.delenv("DIT_ACCEL_STUDIO_AUTH", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--no-browser", *options]) == 2
    assert sentence in capsys.readouterr().err
