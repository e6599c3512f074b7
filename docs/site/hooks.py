"""What `make docs` makes of the pages beside copying them: mkdocs calls these functions (mkdocs.yml).

Pages are written for GitHub, where a link may lead to any file of the repository. On the site, README.md,
CONTRIBUTING.md and CHANGELOG.md are pages too, pictures of results are copied, and a link to a source file becomes its
name.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# Pages that are made here, and the file of the repository that each is made of.
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
API_PAGE = "api.md"
RESULTS = "benchmarks/results"
# The public names by what they are for; `red_kernels.` stands in front of each.
API = {
    "Patching": ("RedConfig", "patch", "unpatch", "PatchReport", "edit_parameters"),
    "Saving and loading": (
        *("save_edits", "load_edits", "saved_config", "from_pretrained", "load_base_model", "load_tokenizer"),
        *("push_edits", "write_model_card", "export_authors"),
    ),
    "Merging": ("merge", "unmerge", "MergeReport"),
    "Several edits": (
        *("add_edit", "delete_edit", "switch_edit", "active_edit", "edit_names", "use_edits", "disable_edits"),
        *("combine_edits", "sum_gradients_over"),
    ),
    "Operations": (
        *("edit", "edit_add", "edit_add_rms_norm", "edit_add_layer_norm", "rms_norm_edit", "layer_norm_edit"),
        *("linear_edit", "mix", "mix_add", "mix_add_rms_norm", "mix_add_layer_norm"),
    ),
    "Backends": ("backend", "available_backends"),
    "Extending": ("register_kind", "register_backend", "register_family"),
    "Training and other libraries": (
        *("integrations.trainer.RedTrainer", "integrations.trainer_callback.SaveEdits"),
        *("integrations.peft.RedPeftConfig",),
    ),
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_HTML = re.compile(r'(src|srcset)="([^"]+)"')
_ROLE = re.compile(r":(?:func|class|mod|meth|attr):<code>~?")


def api_page() -> str:
    """The page of the API: a directive for each public name, which mkdocstrings fills in."""
    parts = ["# API", "Written from the docstrings. `rk` stands for `red_kernels`."]
    for title, names in API.items():
        parts += [f"## {title}", *(f"::: red_kernels.{name}" for name in names)]
    return "\n\n".join(parts) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made here, and the pictures of results."""
    from mkdocs.structure.files import File

    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, API_PAGE, content=api_page()))
    for picture in sorted((ROOT / RESULTS).rglob("*.png")):
        name = picture.relative_to((ROOT / RESULTS).parent).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page's text with links that hold on the site."""
    return site_text(markdown, PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}"))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Docstrings name functions by roles of reStructuredText: the name stays."""
    return _ROLE.sub("<code>", html)


def site_text(markdown: str, source: str) -> str:
    """The text of a page as the site has it; ``source`` is its file, relative to the repository's root."""
    folder = posixpath.dirname(source)
    pages = {name: page for page, name in PAGES.items()}

    def target(link: str) -> str | None:
        path, mark, anchor = link.partition("#")
        if not path or ":" in path:
            return link
        file = posixpath.normpath(posixpath.join(folder, path))
        if file in pages:
            return pages[file] + mark + anchor
        if file.startswith("docs/"):
            return file.removeprefix("docs/") + mark + anchor
        if file.startswith(f"{RESULTS}/") and file.endswith(".png"):
            return posixpath.relpath(file, posixpath.dirname(RESULTS))
        return None

    def link(found: re.Match[str]) -> str:
        bang, words, to = found.groups()
        on_site = target(to)
        return words if on_site is None else f"{bang}[{words}]({on_site})"

    def attribute(found: re.Match[str]) -> str:
        return f'{found[1]}="{target(found[2]) or found[2]}"'

    parts = re.split(r"(^```.*?^```[ \t]*$)", markdown, flags=re.DOTALL | re.MULTILINE)
    for number, part in enumerate(parts):
        if number % 2:  # what runs on a GPU only is Python all the same
            parts[number] = re.sub(r"^```python [a-z ]+$", "```python", part, count=1, flags=re.MULTILINE)
        else:
            parts[number] = _HTML.sub(attribute, _LINK.sub(link, part))
    return "".join(parts)
