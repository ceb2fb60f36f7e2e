"""Golden texts are compared line by line, and rewritten only when asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.testing import assert_golden


def test_a_golden_text_is_written_on_request_and_kept_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder" / "program.txt"
    monkeypatch.delenv("MOEC_GOLDEN", raising=False)
    with pytest.raises(AssertionError, match="does not exist yet; `make golden` writes it"):
        assert_golden("a\n", path)
    monkeypatch.setenv("MOEC_GOLDEN", "1")
    assert_golden("def f(x):  \n    return x\n\n", path)
    assert path.read_text() == "def f(x):\n    return x\n"
    monkeypatch.setenv("MOEC_GOLDEN", "0")
    assert_golden("def f(x):\n    return x", path)
    with pytest.raises(AssertionError, match=r"-    return x\n\+    return y"):
        assert_golden("def f(x):\n    return y\n", path)
    assert path.read_text() == "def f(x):\n    return x\n"
