"""`rk.write_model_card`: what it says, that the hub can read it, and that nobody's own card is replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_folders
import torch
from checkpoint_helpers import every_vector, trained
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import red_kernels as rk
from red_kernels.integrations.trainer import save_trained


def edits(folder: Path, base: str = "owner/base", **options: Any) -> Path:
    model: Any = trained("llama", **options)
    model.config._name_or_path = base
    rk.save_edits(model, folder)
    return folder


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*arguments: Any, **options: Any) -> str:
        raise OSError("no network in this test")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)


def test_the_front_matter_and_the_facts(tmp_path: Path) -> None:
    folder = edits(tmp_path / "edits", position="attn", kind="scaling", layers=(1,))
    card = rk.write_model_card(
        folder,
        data="reviews, 90 % of them",
        datasets=["user/reviews"],
        figures={"loss": (3.25, 2.5), "accuracy": (None, 0.875)},
        settings={"steps": 30, "learning rate": 0.01},
        licence="mit",
    )
    assert card == folder / "README.md"
    loaded = ModelCard.load(card)
    said = loaded.data.to_dict()
    assert said["base_model"] == "owner/base"
    assert said["library_name"] == "red-kernels"
    assert said["license"] == "mit"
    assert said["datasets"] == ["user/reviews"]
    assert {"red", "representation-editing"} <= set(said["tags"])
    count = sum(own.numel() for own in every_vector(trained("llama", position="attn", kind="scaling", layers=(1,))))
    for row in (
        "| base model | [owner/base](https://huggingface.co/owner/base) |",
        "| position of the edits | attn |",
        "| kind of edit | scaling |",
        "| layers | 1 |",
        f"| trained parameters | {count:,} in vectors |",
        "| loss | 3.25 | 2.5 |",
        "| accuracy |  | 0.875 |",
        "| steps | 30 |",
        "| licence of the base model | mit |",
    ):
        assert row in loaded.text.splitlines()
    assert "reviews, 90 % of them; [user/reviews](" in loaded.text


def test_the_lines_of_code_load_the_edits(tmp_path: Path) -> None:
    llama = tiny_folders.tiny_llama(tmp_path / "llama")
    model = AutoModelForCausalLM.from_pretrained(llama)
    rk.patch(model)
    with torch.no_grad():
        for vector in every_vector(model):
            vector.add_(torch.randn(vector.shape))
    rk.save_edits(model, tmp_path / 'a "quoted" name')
    card = rk.write_model_card(tmp_path / 'a "quoted" name')
    assert card is not None
    names: dict[str, Any] = {}
    exec(card.read_text().partition("```python\n")[2].partition("```")[0], names)
    ids = torch.tensor([names["tokenizer"]("some text").input_ids])
    assert torch.equal(names["model"](ids).logits, model.eval()(ids).logits)
    assert str(llama) not in card.read_text()  # a folder of this machine says nothing to others
    assert "the local model `llama`" in card.read_text()
    assert "base_model" not in ModelCard.load(card).data.to_dict()


@pytest.mark.parametrize(
    ("base", "identity", "licence"),
    [
        ("SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"),
        ("/cache/models--owner--base/snapshots/0123abc", "owner/base", None),
        ("owner/base", "owner/base", None),
        ("", None, None),
    ],
)
def test_the_base_model_and_its_licence(base: str, identity: str | None, licence: str | None, tmp_path: Path) -> None:
    card = rk.write_model_card(edits(tmp_path / "edits", base))
    assert card is not None
    said = ModelCard.load(card).data.to_dict()
    assert said.get("base_model") == identity
    assert said.get("license") == licence


def test_the_licence_of_the_base_models_own_card(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    front = "---\nlicense: other\nlicense_name: own-terms\nlicense_link: https://example.org/terms\n---\n# Base\n"
    (base / "README.md").write_text(front)
    card = rk.write_model_card(edits(tmp_path / "edits", str(base)))
    assert card is not None
    said = ModelCard.load(card).data.to_dict()
    assert (said["license"], said["license_name"]) == ("other", "own-terms")
    assert said["license_link"] == "https://example.org/terms"
    (base / "README.md").write_text("---\n[: no yaml\n---\n")
    assert rk.write_model_card(tmp_path / "edits") == card
    assert "license" not in ModelCard.load(card).data.to_dict()
    assert "not known: see the base model" in card.read_text()


def test_a_trained_head(tmp_path: Path) -> None:
    bert = tiny_folders.tiny_bert(tmp_path / "bert")
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    model.config.id2label = {0: "bad", 1: "good|very"}
    rk.patch(model, rk.RedConfig(train_head=True))
    save_trained(model, tmp_path / "run" / "edits")
    card = rk.write_model_card(tmp_path / "run")
    assert card == tmp_path / "run" / "edits" / "README.md"
    text = card.read_text()
    assert "66 in a trained head" in text
    assert "good\\|very" in text
    assert ModelCard.load(card).data.to_dict()["pipeline_tag"] == "text-classification"


def test_a_card_of_somebody_else_stays(tmp_path: Path) -> None:
    folder = edits(tmp_path / "edits")
    card = rk.write_model_card(folder, data="first")
    assert card is not None
    assert rk.write_model_card(folder, data="second") == card
    assert "second" in card.read_text()
    mine = "\n".join(line for line in card.read_text().splitlines() if "Written by" not in line)
    card.write_text(mine)
    with pytest.warns(UserWarning, match="was not written by red-kernels and is left as it is"):
        assert rk.write_model_card(folder, data="third") is None
    assert card.read_text() == mine
    assert rk.write_model_card(folder, data="third", overwrite=True) == card
    assert "third" in card.read_text()


def test_what_is_refused(tmp_path: Path) -> None:
    folder = edits(tmp_path / "edits")
    with pytest.raises(ValueError, match=r"figures: got 2\.5 for 'loss'"):
        rk.write_model_card(folder, figures={"loss": 2.5})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="datasets: got 'user/one'"):
        rk.write_model_card(folder, datasets="user/one")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        rk.write_model_card(tmp_path / "missing")
    rk.export_authors(trained("llama"), tmp_path / "authors")
    with pytest.raises(ValueError, match="red-kernels convert"):
        rk.write_model_card(tmp_path / "authors")
    assert not (folder / "README.md").exists()
