"""What PEFT's form has a place for, and that reading it back gives the same edits: heads, mixtures, stacks, kinds."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import torch
from checkpoint_helpers import every_vector
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import red_kernels as rk
from red_kernels.checkpoints import checkpoint
from red_kernels.checkpoints.convert import convert
from red_kernels.checkpoints.folder import TENSORS_NAME
from red_kernels.checkpoints.peft_write import PEFT_NAMES
from red_kernels.integrations.peft import RedPeftConfig
from red_kernels.integrations.trainer import save_trained


def edited(name: str, *trained: str, sizes: dict[str, Any] | None = None, **options: Any) -> Any:
    """A patched model of the zoo with random vectors, of which what is called so is trained too."""
    model: Any = zoo.tiny(name, **(sizes or {}))
    rk.patch(model, rk.RedConfig(**options))
    vectors = {id(own) for own in every_vector(model)}
    torch.manual_seed(4)
    with torch.no_grad():
        for key, own in model.named_parameters():
            if id(own) in vectors or any(f"{key}.".startswith(f"{one}.") for one in trained):
                own.requires_grad_(True).add_(torch.randn(own.shape) * 0.3)
    return model


def logits(model: Any, name: str) -> torch.Tensor:
    given = zoo.inputs(name)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**given).logits
    return found


def by_peft(folder: Path, name: str, sizes: dict[str, Any] | None = None) -> Any:
    model: Any = zoo.tiny(name, **(sizes or {}))
    return PeftModel.from_pretrained(model, folder)


def by_ours(folder: Path, name: str, sizes: dict[str, Any] | None = None) -> Any:
    model = zoo.tiny(name, **(sizes or {}))
    rk.patch(model, rk.saved_config(folder))
    rk.load_edits(model, folder)
    return model


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- what was trained beside the edits


@pytest.mark.parametrize(
    ("name", "trained", "sizes"),
    [
        ("roberta", ["classifier.out_proj.bias"], {}),  # a part of a module, and PEFT loads all of it
        ("bert", ["cls"], {}),  # modules inside of a module with a Parameter of its own, one of them tied
        ("llama", ["model.embed_tokens"], {"tie_word_embeddings": True}),  # PEFT copies one of two tied modules
        ("t5", ["shared"], {}),
        ("vit", ["vit.embeddings.cls_token", "classifier"], {}),
    ],
    ids=["a bias", "a head with a tied weight", "tied embeddings", "shared by two stacks", "a token"],
)
def test_heads(name: str, trained: list[str], sizes: dict[str, Any], tmp_path: Path) -> None:
    model = edited(name, *trained, sizes=sizes)
    save_trained(model, tmp_path)
    adapter = by_peft(tmp_path, name, sizes)
    assert torch.equal(logits(adapter, name), logits(model, name))
    adapter.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(by_ours(tmp_path / "again", name, sizes), name), logits(model, name))


def test_a_module_whose_name_ends_like_that_of_the_head(tmp_path: Path) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = zoo.tiny("bert")
            self.pre_head, self.head = nn.Linear(61, 5), nn.Linear(5, 2)

        def forward(self, **given: Any) -> torch.Tensor:
            found: torch.Tensor = self.head(self.pre_head(self.body(**given).logits))
            return found

    torch.manual_seed(1)
    model, other = Head(), Head()
    other.load_state_dict(model.state_dict())
    rk.patch(model, rk.RedConfig(sites="*.output.dense"))
    model.head.requires_grad_(True)
    with torch.no_grad():
        for own in (*every_vector(model), model.head.bias):
            own.add_(0.5)
    save_trained(model, tmp_path)
    given = zoo.inputs("bert")
    assert torch.equal(PeftModel.from_pretrained(other, tmp_path).eval()(**given), model.eval()(**given))  # type: ignore[arg-type]


def test_what_has_no_place(tmp_path: Path) -> None:
    edits = [
        edited("llama", "model.layers.0.mlp.down_proj.weight"),  # of an edited module, which PEFT wraps once
        edited("mixtral"),  # a block of experts
        edited("qwen3_moe", position="ffn_attn"),
    ]
    for number, model in enumerate(edits):
        folder = tmp_path / str(number)
        save_trained(edited("llama"), folder)
        save_trained(model, folder)
        assert not names(folder) & set(PEFT_NAMES)
        rk.load_edits(model, folder)
    with pytest.raises(ValueError, match=r"no place for model\.layers\.0\.mlp\.down_proj\.weight"):
        convert(tmp_path / "0", tmp_path / "adapter", to="peft")
    assert not (tmp_path / "adapter").exists()


# ---- which modules, by which names


@pytest.mark.parametrize(
    "options",
    [
        {"stacks": "encoder"},
        {"stacks": "encoder", "position": "ia3", "kind": "scaling"},
        {"stacks": "decoder", "kind": "gift:2"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_stacks(options: dict[str, Any], tmp_path: Path) -> None:
    model = edited("t5", **options)
    rk.save_edits(model, tmp_path / "own")
    assert rk.saved_config(tmp_path / "own").stacks == (options["stacks"],)
    convert(tmp_path / "own", tmp_path / "adapter", to="peft")
    by_peft(tmp_path / "own", "t5").save_pretrained(tmp_path / "again")
    for folder in ("own", "adapter"):
        adapter = by_peft(tmp_path / folder, "t5")
        assert torch.equal(logits(adapter, "t5"), logits(model, "t5"))
        assert sum(map(torch.numel, every_vector(adapter))) == sum(map(torch.numel, every_vector(model)))
    for folder in ("own", "adapter", "again"):
        assert torch.equal(logits(by_ours(tmp_path / folder, "t5"), "t5"), logits(model, "t5"))


def test_a_part_of_the_model_was_patched(tmp_path: Path) -> None:
    model: Any = zoo.tiny("llama")
    rk.patch(model.model)
    model.model.norm.requires_grad_(True)
    with torch.no_grad():
        for own in every_vector(model):
            own.add_(torch.rand(own.shape))
    save_trained(model, tmp_path)
    assert torch.equal(logits(by_peft(tmp_path, "llama"), "llama"), logits(model, "llama"))


def test_a_model_inside_of_a_wrapper_without_a_config(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = edited("llama")
    model.config._name_or_path = "somebody/base"
    rk.save_edits(Wrapper(model), tmp_path)  # type: ignore[arg-type]
    assert json.loads((tmp_path / PEFT_NAMES[1]).read_text())["base_model_name_or_path"] == "somebody/base"
    assert torch.equal(logits(by_peft(tmp_path, "llama"), "llama"), logits(model, "llama"))


# ---- PEFT's form read back


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "reflections:2"},  # its vectors have the shapes of another number's
        {"kind": "rotation:2", "sizes": {"hidden_size": 64}},
        {"kind": "gift:2", "position": "more"},  # the file's first site is not the model's
        {"kind": "gift:2", "sites": ("*.q_proj", "*.o_proj")},
        {"sites": "lm_head"},  # PEFT saves its weight too
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_an_adapter_is_read_as_what_it_is(options: dict[str, Any], tmp_path: Path) -> None:
    sizes = options.pop("sizes", None)
    model = edited("llama", sizes=sizes, **options)
    rk.save_edits(model, tmp_path / "own")
    by_peft(tmp_path / "own", "llama", sizes).save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(by_ours(tmp_path / "adapter", "llama", sizes), "llama"), logits(model, "llama"))
    convert(tmp_path / "adapter", tmp_path / "back")
    assert torch.equal(logits(by_ours(tmp_path / "back", "llama", sizes), "llama"), logits(model, "llama"))


def test_vectors_that_all_sites_share_are_read_at_all_sites(tmp_path: Path) -> None:
    model = edited("llama", kind="gift:2")
    rk.save_edits(model, tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "adapter", to="peft")
    assert torch.equal(logits(by_ours(tmp_path / "adapter", "llama"), "llama"), logits(model, "llama"))
    (tmp_path / "own" / TENSORS_NAME).unlink()
    assert torch.equal(logits(by_ours(tmp_path / "own", "llama"), "llama"), logits(model, "llama"))
    rk.save_edits(edited("llama", kind="gift:2", sites="*.down_proj"), tmp_path / "globs")
    convert(tmp_path / "globs", tmp_path / "expression", to="peft")
    with pytest.raises(ValueError, match="names the sites by the expression"):
        rk.saved_config(tmp_path / "expression")


def test_outputs_and_inputs_are_not_taken_for_each_other(tmp_path: Path) -> None:
    square = {"intermediate_size": 32}  # the width of the FFN's input is that of its output

    def adapter(folder: str, **options: Any) -> Any:
        base: Any = zoo.tiny("llama", **square)
        made = get_peft_model(base, RedPeftConfig(kind="scaling", init_weights=False, **options))
        made.save_pretrained(tmp_path / folder)
        return made

    ffn = ["k_proj", "v_proj", "down_proj"]
    for folder, inputs in (("ia3", ["down_proj"]), ("outputs", None)):
        made = adapter(folder, target_modules=ffn, feedforward_modules=inputs)
        assert torch.equal(logits(by_ours(tmp_path / folder, "llama", square), "llama"), logits(made, "llama"))
    adapter("input", target_modules=["down_proj"], feedforward_modules=["down_proj"])
    with pytest.raises(ValueError, match=r"edits the input of .*down_proj.*PeftModel"):
        rk.saved_config(tmp_path / "input")


def test_a_kind_that_the_vectors_do_not_have(tmp_path: Path) -> None:
    get_peft_model(zoo.tiny("llama"), RedPeftConfig()).save_pretrained(tmp_path)  # type: ignore[arg-type]
    path = tmp_path / PEFT_NAMES[1]
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "bias"}))
    with pytest.raises(ValueError, match=r"says kind 'bias', but the vectors of .* are bias, scale|are scale, bias"):
        rk.saved_config(tmp_path)


# ---- folders in which others have saved


def test_an_adapter_that_was_saved_later_is_not_passed_over_in_silence(tmp_path: Path, recwarn: Any) -> None:
    model = edited("llama")
    rk.save_edits(model, tmp_path)
    by_peft(tmp_path, "llama").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"saved an adapter of RED here since {TENSORS_NAME} was written"):
        by_ours(tmp_path, "llama")
    done = convert(tmp_path, tmp_path / "authors", model=None)
    assert any("since" in note for note in done.notes)
    rk.save_edits(model, tmp_path)  # now ours is the later one
    recwarn.clear()
    assert torch.equal(logits(by_ours(tmp_path, "llama"), "llama"), logits(model, "llama"))
    assert not [one for one in recwarn if "adapter of RED" in str(one.message)]


def test_the_config_of_another_adapter_stays(tmp_path: Path) -> None:
    model = edited("llama")
    rk.save_edits(model, tmp_path)
    lora = get_peft_model(zoo.tiny("llama"), LoraConfig(target_modules=["q_proj"]))  # type: ignore[arg-type]
    lora.save_pretrained(tmp_path, safe_serialization=False)
    config = (tmp_path / PEFT_NAMES[1]).read_bytes()
    for peft in (True, False):
        rk.save_edits(model, tmp_path, peft=peft)
        assert (tmp_path / PEFT_NAMES[1]).read_bytes() == config
        assert names(tmp_path) - {"README.md"} == {TENSORS_NAME, PEFT_NAMES[1], "adapter_model.bin"}


def test_a_disk_that_gets_full_leaves_no_older_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rk.save_edits(edited("llama"), tmp_path)
    model = edited("llama")
    with torch.no_grad():
        every_vector(model)[0].fill_(2.0)
    write = checkpoint.write_files

    def full(folder: Path, contents: dict[str, bytes]) -> None:
        if PEFT_NAMES[0] in contents:
            raise OSError(errno.ENOSPC, "no space left")
        write(folder, contents)

    monkeypatch.setattr(checkpoint, "write_files", full)
    with pytest.raises(OSError, match="no space left"):
        rk.save_edits(model, tmp_path)
    assert names(tmp_path) == {TENSORS_NAME}
    assert torch.equal(logits(by_ours(tmp_path, "llama"), "llama"), logits(model, "llama"))
