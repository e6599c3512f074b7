"""The helper that runs the examples of the docs: it would not do if it left some out."""

from __future__ import annotations

import traceback
from pathlib import Path

import doc_examples
import pytest
import torch

PAGE = """A page.

```python
first = 1
```

```sh
exit 1
```

```python gpu
on_gpu = True
```

```python
second = first + given
open("file", "w").close()
```
"""


def write(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def test_blocks_run_in_order_in_a_folder_of_their_own(tmp_path):
    before = Path.cwd()
    folder = tmp_path / "work"
    folder.mkdir()
    names = doc_examples.run_page(write(tmp_path, PAGE), folder, {"given": 2})
    assert names["second"] == 3
    assert ("on_gpu" in names) == torch.cuda.is_available()
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert Path.cwd() == before


def test_a_failure_has_the_line_of_the_page(tmp_path):
    with pytest.raises(NameError, match="given") as raised:
        doc_examples.run_page(write(tmp_path, PAGE), tmp_path)
    assert traceback.extract_tb(raised.value.__traceback__)[-1].lineno == 16


@pytest.mark.parametrize("text", ["Nothing here.\n", "```sh\nls\n```\n"])
def test_a_page_without_examples(text, tmp_path):
    with pytest.raises(AssertionError, match="has no block of Python"):
        doc_examples.run_page(write(tmp_path, text), tmp_path)


def test_unknown_words_and_wrong_syntax(tmp_path):
    with pytest.raises(ValueError, match=r"page.md:2: got ```python skip"):
        doc_examples.run_page(write(tmp_path, "```python skip\n1\n```\n"), tmp_path)
    with pytest.raises(SyntaxError):
        doc_examples.run_page(write(tmp_path, "```python gpu\n1 +\n```\n"), tmp_path)
