"""Edits on the hub: `red-kernels push`, and loading by a repository's id, against a stand-in on this machine."""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny_folders
import torch
import transformers.utils.hub
from checkpoint_helpers import every_vector
from hub_stand_in import TOKEN, Hub, Repository, serving
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import red_kernels as rk
from red_kernels.checkpoints.folder import HEAD_NAME, TENSORS_NAME
from red_kernels.checkpoints.peft_write import PEFT_NAMES
from red_kernels.cli import main
from red_kernels.integrations.trainer import save_trained

IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as started:
        _use(started.address, tmp_path, monkeypatch)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
        yield started


def _use(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT and its like set it, which the library reads when it is imported.

    A client keeps the address that it was made with. Those that are shared live on, so each gets the new one, and
    transformers' own is made now: one made later would keep this test's address for the tests behind it.
    """
    getattr(transformers.utils.hub, "hf_api", lambda: None)()
    for client in [own for own in gc.get_objects() if isinstance(own, huggingface_hub.HfApi)]:
        monkeypatch.setattr(client, "endpoint", address)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def randomised(model: Any) -> Any:
    with torch.no_grad():
        for vector in every_vector(model):
            vector.add_(torch.randn(vector.shape))
    return model.eval()


def language_model(base: str | Path, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    rk.patch(model)
    return randomised(model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny_folders.tiny_llama(tmp_path / "llama")


def push(*arguments: object) -> int:
    return main(["push", *map(str, arguments)])


def test_what_is_pushed_is_loaded_by_its_id(hub: Hub, llama: Path, tmp_path: Path, capsys: Any) -> None:
    model = language_model(llama)
    rk.save_edits(model, tmp_path / "edits")
    assert push(tmp_path / "edits", "user/name") == 0
    assert 'rk.from_pretrained("user/name")' in capsys.readouterr().out
    repository = hub.repositories["user/name"]
    files = repository.commits[repository.branches["main"]]
    assert files[TENSORS_NAME] == (tmp_path / "edits" / TENSORS_NAME).read_bytes()
    assert not repository.private

    other = AutoModelForCausalLM.from_pretrained(llama)
    rk.patch(other, rk.saved_config("user/name"))
    report = rk.load_edits(other, "user/name")
    assert report.warnings == ()
    assert torch.equal(logits(other.eval()), logits(model))
    whole = rk.from_pretrained("user/name")
    assert torch.equal(logits(whole), logits(model))
    assert whole.config._name_or_path == str(llama)
    assert rk.load_tokenizer("user/name")("abc").input_ids == tiny_folders.tokenizer()("abc").input_ids


def test_a_base_model_on_the_hub_is_loaded_at_the_commit_of_the_training(hub: Hub, llama: Path, tmp_path: Path) -> None:
    commit = hub.put_folder("owner/base", llama)
    model = language_model("owner/base")
    rk.save_edits(model, tmp_path / "edits")
    rk.push_edits(tmp_path / "edits", "user/name")
    other = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    other.save_pretrained(tmp_path / "changed")
    assert hub.put_folder("owner/base", tmp_path / "changed") != commit
    assert torch.equal(logits(rk.from_pretrained("user/name")), logits(model))
    changed = rk.from_pretrained("user/name", base="owner/base", base_revision="main")
    assert not logits(changed).any()
    repository = hub.repositories["user/name"]
    card = repository.commits[repository.branches["main"]]["README.md"].decode()
    assert "base_model: owner/base\n" in card
    assert commit in card


def test_a_trained_head_goes_along_and_a_former_one_is_deleted(hub: Hub, tmp_path: Path) -> None:
    bert = tiny_folders.tiny_bert(tmp_path / "bert")
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    rk.patch(model, rk.RedConfig(train_head=True))
    for own in model.bert.pooler.parameters():  # saved with the base model
        own.requires_grad_(False)
    model.config.id2label = {0: "bad", 1: "odd", 2: "good"}
    randomised(model)
    save_trained(model, tmp_path / "edits")
    rk.push_edits(tmp_path / "edits", "user/name")
    whole = rk.from_pretrained("user/name")
    assert torch.equal(logits(whole), logits(model))
    assert whole.config.id2label[2] == "good"

    rk.save_edits(model, tmp_path / "alone")
    rk.push_edits(tmp_path / "alone", "user/name")
    repository = hub.repositories["user/name"]
    assert HEAD_NAME not in repository.commits[repository.branches["main"]]


def test_a_branch_a_message_and_a_private_repository(hub: Hub, llama: Path, tmp_path: Path) -> None:
    first, second = language_model(llama), language_model(llama)
    rk.save_edits(first, tmp_path / "first")
    rk.save_edits(second, tmp_path / "second")
    assert push(tmp_path / "first", "user/name", "--private", "--message", "the first") == 0
    assert push(tmp_path / "second", "user/name", "--revision", "next", "--private") == 0
    repository = hub.repositories["user/name"]
    assert repository.private
    assert repository.messages[1] == "the first"
    token = Path(constants.HF_TOKEN_PATH)
    token.write_text(TOKEN)
    assert torch.equal(logits(rk.from_pretrained("user/name")), logits(first))
    assert torch.equal(logits(rk.from_pretrained("user/name", revision="next")), logits(second))
    rk.load_edits(second, "user/name", revision=repository.branches["main"])
    assert torch.equal(logits(second), logits(first))


def test_a_public_repository_takes_nothing_that_is_to_be_private(
    hub: Hub, llama: Path, tmp_path: Path, capsys: Any
) -> None:
    hub.repositories["user/name"] = Repository()
    hub.repositories["user/name"].add("main", {})
    rk.save_edits(language_model(llama), tmp_path / "edits")
    assert push(tmp_path / "edits", "user/name", "--private") == 2
    assert "is public; nothing was uploaded" in capsys.readouterr().err
    assert len(hub.repositories["user/name"].commits) == 1


def test_a_run_is_pushed_by_its_folder_and_nothing_but_the_edits(hub: Hub, llama: Path, tmp_path: Path) -> None:
    model = language_model(llama)
    rk.save_edits(model, tmp_path / "run" / "edits")
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "run" / "edits" / "notes.txt").write_text("mine")
    done = rk.push_edits(tmp_path / "run", "user/name")
    assert done.files == ("README.md", *sorted([TENSORS_NAME, *PEFT_NAMES]))
    assert done.left_out == ("notes.txt",)
    assert not (tmp_path / "run" / "edits" / "README.md").exists()
    assert torch.equal(logits(rk.from_pretrained("user/name")), logits(model))


def test_the_pushed_card_loads_by_the_id_and_a_users_own_is_not_touched(hub: Hub, llama: Path, tmp_path: Path) -> None:
    model = language_model(llama)
    rk.save_edits(model, tmp_path / "edits")
    card = rk.write_model_card(tmp_path / "edits", data="lines")
    assert card is not None
    before = card.read_text()
    rk.push_edits(tmp_path / "edits", "user/name")
    assert card.read_text() == before
    repository = hub.repositories["user/name"]
    pushed = repository.commits[repository.branches["main"]]["README.md"].decode()
    assert "lines" in pushed
    assert str(tmp_path) not in pushed
    lines = pushed.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(lines, names)
    assert torch.equal(logits(names["model"]), logits(model))
    assert names["tokenizer"].eos_token == "<eos>"
    card.write_text('---\ntags: [mine]\n---\nrk.from_pretrained("here")\n')
    rk.push_edits(tmp_path / "edits", "user/name")
    assert repository.commits[repository.branches["main"]]["README.md"] == card.read_bytes()


# ---- errors


def test_a_folder_that_is_not_whole_is_refused_before_the_hub_is_asked(
    hub: Hub, llama: Path, tmp_path: Path, capsys: Any
) -> None:
    rk.save_edits(language_model(llama), tmp_path / "edits")
    file = tmp_path / "edits" / TENSORS_NAME
    file.write_bytes(file.read_bytes()[:-9])
    assert push(tmp_path / "edits", "user/name") == 2
    assert "is damaged" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert push(tmp_path / "empty", "user/name") == 2
    assert push(tmp_path / "missing", "user/name") == 2
    assert push(tmp_path / "edits", "no id") == 2
    assert "expected an id of the hub" in capsys.readouterr().err
    assert hub.requests == []


def test_no_token_and_a_wrong_one(
    hub: Hub, llama: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rk.save_edits(language_model(llama), tmp_path / "edits")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    capsys.readouterr()
    assert push(tmp_path / "edits", "user/name") == 2
    error = capsys.readouterr().err
    assert "hf auth login" in error
    assert error.count("\n") == 1
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_wrong")
    assert push(tmp_path / "edits", "user/name") == 2
    error = capsys.readouterr().err
    assert "could not upload to 'user/name': the hub refuses (status 401)" in error
    assert error.count("\n") == 1
    assert hub.repositories == {}


def test_no_network(llama: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as held:  # a port that nobody listens on
        held.bind(("127.0.0.1", 0))
        _use(f"http://127.0.0.1:{held.getsockname()[1]}", tmp_path, monkeypatch)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
        model = language_model(llama)
        rk.save_edits(model, tmp_path / "edits")
        capsys.readouterr()
        assert push(tmp_path / "edits", "user/name") == 2
        error = capsys.readouterr().err
        assert "could not upload to 'user/name': the hub cannot be reached" in error
        assert error.count("\n") == 1
        with pytest.raises(OSError, match="could not be fetched from the hub: the hub cannot be reached"):
            rk.load_edits(model, "user/name")


def test_what_is_not_there(hub: Hub, llama: Path, tmp_path: Path) -> None:
    model = language_model(llama)
    with pytest.raises(FileNotFoundError, match="there is no repository 'user/nobody'"):
        rk.load_edits(model, "user/nobody")
    hub.put_folder("user/base", llama)
    with pytest.raises(FileNotFoundError, match="has no such revision"):
        rk.load_edits(model, "user/base", revision="nothing")
    with pytest.raises(FileNotFoundError, match="'user/base' holds no edits"):
        rk.from_pretrained("user/base")
    with pytest.raises(ValueError, match=r"revision: got 'main', but .* is no id of the hub"):
        rk.load_edits(model, tmp_path, revision="main")
