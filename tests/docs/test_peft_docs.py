"""The page about PEFT: its examples run, and leave behind what they say."""

from __future__ import annotations

from doc_examples import run_page


def test_page(tmp_path):
    names = run_page("docs/peft.md", tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (tmp_path / "adapter").iterdir()
    }
    assert len(names["generated"]) == len(names["rows"])
    assert not names["mixed"].isnan().any()
