"""The examples of the docs run, print what the pages say, and no page is left out."""

from __future__ import annotations

import re

import doc_examples
import pytest
import torch
from places import TESTS

import red_kernels as rk
from red_kernels.edits.kinds import kind_named

DOCS = doc_examples.ROOT / "docs"


def printed(page: str) -> list[str]:
    """The blocks of text that a page shows as printed."""
    return re.findall(r"^```text\n(.*?)\n```$", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def test_every_page_with_examples_is_run_by_one_test():
    tests = {path: path.read_text() for path in TESTS.rglob("test_*.py")}
    for page in sorted(DOCS.glob("*.md")):
        if list(doc_examples.blocks(page)):
            name = f'"docs/{page.name}"'
            found = [path.name for path, text in tests.items() if name in text]
            assert len(found) == 1, f"{name} is run by {found}, expected one test"


def test_links_lead_somewhere():
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (DOCS / target).exists(), f"{page.name}: {target}"


def test_patching(tmp_path):
    pytest.importorskip("peft")
    names = doc_examples.run_page("docs/patching.md", tmp_path)
    assert printed("patching.md") == [str(names["report"])]
    assert len(names["trained"]) == 18
    assert all(names["trained"].values())
    assert set(names["vectors"]) == {"scale", "bias"}
    loaded = rk.edit_parameters(names["model"])["model.layers.0.mlp.down_proj"]
    assert all(torch.equal(loaded[part], vector) for part, vector in names["vectors"].items())
    assert not torch.equal(loaded["scale"], torch.ones(32))
    with_gradients = {name for name, own in names["lora"].named_parameters() if own.grad is not None}
    assert any("lora_A" in name for name in with_gradients)
    assert any("red_edit.scale" in name for name in with_gradients)


def test_positions_and_kinds_of_the_table():
    text = (DOCS / "patching.md").read_text()
    from red_kernels.edits.config import KINDS, POSITIONS

    assert set(re.findall(r"^\| `(\w+)`(?: \([^)]*\))? \| [^|]*\|[^|]*\|[^|]*\|[^|]*\|$", text, flags=re.M)) == set(
        POSITIONS
    )
    assert set(re.findall(r"`(all|scaling|bias|ln)`", text)) == {"all", "scaling", "bias", "ln"}
    kinds = (DOCS / "kinds.md").read_text()
    first = re.search(r"(?s)\n\| kind \| computes .*?\n\n", kinds)
    assert first is not None
    rows = re.findall(r"^\| `(\w+)` \|(?:[^|]*\|){2}\s*([\d,]*)\s*\|", first.group(), flags=re.M)
    assert [name for name, _ in rows] == sorted(KINDS, key=[name for name, _ in rows].index)
    for name, count in rows:  # of Llama-2-7B's 32 sites of width 4,096
        kind = kind_named(name)
        if count:
            made = kind.start(11008 if kind.on_input else 4096, torch.float32, "meta")
            assert (1 if kind.shared else 32) * sum(own.numel() for own in made.values()) == int(
                count.replace(",", "")
            ), name


def test_kernels(tmp_path, capsys):
    names = doc_examples.run_page("docs/kernels.md", tmp_path)
    assert all(gradient.abs().sum() > 0 for gradient in names["trained"][:2])
    assert names["nothing"] is None
    assert names["scales"].grad.shape == (3, 32)
    assert names["sublayer"].norm.grad is not None
    torch.testing.assert_close(names["plain"], names["scale"] * names["x"] + names["bias"])
    assert "reference can be used here" in capsys.readouterr().out
    text = (DOCS / "kernels.md").read_text()
    for function in re.findall(r"`rk\.(\w+)\(", text):
        assert callable(getattr(rk, function))
    for function in re.findall(r"`(\w+Function)`", text):
        assert function in rk.functional.__all__


def test_kinds(tmp_path, kinds, capsys):
    names = doc_examples.run_page("docs/kinds.md", tmp_path)
    assert {site.fused for site in names["report"].sites} == {None}
    assert all(site.fused for site in names["fused_report"].sites)


def test_backends(tmp_path, known_backends, capsys):
    names = doc_examples.run_page("docs/backends.md", tmp_path)
    assert capsys.readouterr().out.splitlines() == ["torch.Size([4, 8]) 1e-06 False all ['bias', 'scale']", "None"]
    assert torch.equal(names["y"], rk.rms_norm_edit(names["x"], None, names["scale"], None).detach())


def test_families(tmp_path, families, capsys):
    with pytest.warns(DeprecationWarning, match="register_family"):
        names = doc_examples.run_page("docs/families.md", tmp_path)
    assert printed("families.md") == [str(names["report"])]
    assert capsys.readouterr().out.splitlines() == str(names["report"]).splitlines()
    assert all(site.fused for site in names["named_report"].sites)
    model, ids = names["model"], names["ids"]
    plain = names["Decoder"]()
    weights = {key: value for key, value in model.state_dict().items() if "red_edit" not in key}
    plain.load_state_dict(weights)
    registered = rk.patch(plain, rk.RedConfig(position="ffn_attn"))
    assert [site.site for site in registered.sites] == [site.site for site in names["report"].sites]
    values = rk.edit_parameters(model)
    for parts in values.values():
        with torch.no_grad():
            parts["scale"].mul_(1.5)
            parts["bias"].add_(0.5)
    plain.load_state_dict(model.state_dict())
    for site in values:  # hooks of others: each edit by itself
        plain.get_submodule(site).register_forward_hook(lambda module, args, output: None)
    torch.testing.assert_close(model(ids), plain(ids))


def test_serving(tmp_path):
    doc_examples.run_page("docs/serving.md", tmp_path)
    assert (tmp_path / "merged" / "config.json").exists()


def test_many_edits(tmp_path, capsys):
    names = doc_examples.run_page("docs/many-edits.md", tmp_path)
    assert "('default', 'alice', 'bob') default" in capsys.readouterr().out
    model, ids, logits = (names[name] for name in ("model", "ids", "logits"))
    assert names["tokens"].shape == (3, 13)
    torch.testing.assert_close(logits[2], names["base"][2])
    assert not torch.allclose(logits[0], names["base"][0])
    rk.switch_edit(model, "alice")  # which has bob's values by now
    torch.testing.assert_close(model(input_ids=ids).logits[1], logits[1])
