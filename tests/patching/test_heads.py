"""The head of a patched model: named where it is frozen, trained beside the edits where that is asked for."""

from __future__ import annotations

import copy
import pickle

import model_zoo as zoo
import pytest
import torch
import transformers
from stack_helpers import STEPS, listed, rows
from torch import nn

import red_kernels as rk
from red_kernels.edits.find import edit_parameters
from red_kernels.finetune.head import train_head
from red_kernels.integrations.trainer import RedTrainer, head_parameters

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
PLAIN = {**SIZES, "pad_token_id": 0}
T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 2, "num_heads": 2, "pad_token_id": 0}
DISTIL = {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "pad_token_id": 0}
IMAGES = {**{key: SIZES[key] for key in list(SIZES)[1:]}, "image_size": 8, "patch_size": 4, "num_channels": 1}
BERT, LLAMA, MODERN = "BertConfig", "LlamaConfig", "ModernBertConfig"
HEADS = {
    "BertForSequenceClassification": (BERT, PLAIN, ["classifier"]),
    "BertForTokenClassification": (BERT, PLAIN, ["classifier"]),
    "BertForQuestionAnswering": (BERT, PLAIN, ["qa_outputs"]),
    "BertForMultipleChoice": (BERT, PLAIN, ["classifier"]),
    "RobertaForSequenceClassification": ("RobertaConfig", PLAIN, ["classifier"]),
    "DebertaV2ForSequenceClassification": ("DebertaV2Config", PLAIN, ["pooler", "classifier"]),
    "DistilBertForSequenceClassification": ("DistilBertConfig", DISTIL, ["pre_classifier", "classifier"]),
    "ModernBertForSequenceClassification": (MODERN, PLAIN, ["head", "classifier"]),
    "LlamaForSequenceClassification": (LLAMA, PLAIN, ["score"]),
    "LlamaForQuestionAnswering": (LLAMA, PLAIN, ["qa_outputs"]),
    "Qwen2ForTokenClassification": ("Qwen2Config", {**PLAIN, "num_key_value_heads": 2}, ["score"]),
    "GPT2ForSequenceClassification": ("GPT2Config", GPT2, ["score"]),
    "T5ForSequenceClassification": ("T5Config", T5, ["classification_head"]),
    "ViTForImageClassification": ("ViTConfig", IMAGES, ["classifier"]),
    # Heads that map back to the vocabulary come with the checkpoint.
    "BertForMaskedLM": (BERT, PLAIN, []),
    "ModernBertForMaskedLM": (MODERN, PLAIN, []),
    "DistilBertForMaskedLM": ("DistilBertConfig", DISTIL, []),
    "LlamaForCausalLM": (LLAMA, PLAIN, []),
    "GPT2LMHeadModel": ("GPT2Config", GPT2, []),
    "T5ForConditionalGeneration": ("T5Config", T5, []),
    # Base models have none.
    "BertModel": (BERT, PLAIN, []),
    "LlamaModel": (LLAMA, PLAIN, []),
    "T5EncoderModel": ("T5Config", T5, []),
}
TASKS = [name for name, (_, _, head) in HEADS.items() if head]


def made(name, **changes):
    torch.manual_seed(0)
    config, sizes, _ = HEADS[name]
    return getattr(transformers, name)(getattr(transformers, config)(**{**sizes, **changes}))


@pytest.mark.parametrize("name", HEADS)
def test_the_report_names_a_frozen_task_head(name):
    report = rk.patch(made(name))
    assert list(report.frozen_head) == HEADS[name][2]
    assert report.trained_head == ()
    assert ("train_head=True" in str(report)) == bool(report.frozen_head)
    assert all(part in str(report) for part in report.frozen_head)


@pytest.mark.parametrize("name", TASKS)
def test_the_head_is_kept_trainable(name):
    model = made(name)
    before = {own: parameter.requires_grad for own, parameter in model.named_parameters()}
    report = rk.patch(model, rk.RedConfig(train_head=True))
    assert list(report.trained_head) == HEADS[name][2]
    assert report.frozen_head == ()
    wanted = {own for own, _ in model.named_parameters() if own.split(".")[0] in report.trained_head}
    assert head_parameters(model).keys() == wanted
    trained = {own for own, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained - wanted == {own for own, _ in model.named_parameters() if ".red_edit." in own}
    assert report.trainable == sum(own.numel() for own in model.parameters() if own.requires_grad)
    rk.unpatch(model)
    assert {own: parameter.requires_grad for own, parameter in model.named_parameters()} == before


def test_untied_and_tied_heads_of_language_models():
    model = made("LlamaForCausalLM", tie_word_embeddings=False)
    assert rk.patch(model).frozen_head == ()
    rk.unpatch(model)
    assert rk.patch(model, rk.RedConfig(train_head=True)).trained_head == ("lm_head",)
    for name in ("LlamaForCausalLM", "GPT2LMHeadModel"):
        tied = made(name, tie_word_embeddings=True)
        with pytest.raises(ValueError, match="train_head"):
            rk.patch(tied, rk.RedConfig(train_head=True))
        assert all(own.requires_grad for own in tied.parameters())
        rk.patch(tied)  # nothing was left behind


class Classifier(nn.Module):
    """A head of a person's own, around a base model."""

    def __init__(self, inner):
        super().__init__()
        self.encoder = inner
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, input_ids):
        return self.scale * self.head(self.encoder(input_ids=input_ids).last_hidden_state[:, 0])


class ValueModel(nn.Module):
    """A language model with a head for values, as reinforcement learning uses it."""

    def __init__(self, inner):
        super().__init__()
        self.pretrained_model = inner
        self.v_head = nn.Linear(32, 1)


class Remote(transformers.PreTrainedModel):
    """Code from the hub: without the name of its base model."""

    config_class = transformers.BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.encoder = transformers.BertModel(config)
        self.out = nn.Linear(32, 3)

    def forward(self, input_ids, labels=None):
        return self.out(self.encoder(input_ids=input_ids).pooler_output)


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = made("BertModel"), made("BertModel")
        self.similarity = nn.Bilinear(32, 32, 1)


OWN = {
    "head": (lambda: Classifier(made("BertModel")), ["scale", "head"]),
    "value": (lambda: ValueModel(made("LlamaForCausalLM", tie_word_embeddings=False)), ["v_head"]),
    "remote": (lambda: Remote(transformers.BertConfig(**PLAIN)), ["out"]),
    "towers": (Towers, ["similarity"]),
    "nested": (lambda: nn.ModuleDict({"inner": made("BertForSequenceClassification")}), ["inner.classifier"]),
}


@pytest.mark.parametrize(("make", "head"), OWN.values(), ids=OWN)
def test_heads_of_other_classes(make, head):
    report = rk.patch(make())
    assert sorted(report.frozen_head) == sorted(head)
    report = rk.patch(make(), rk.RedConfig(train_head=True))
    assert set(head) <= set(report.trained_head)


def test_a_model_of_no_known_base_has_no_known_head():
    def model():
        return nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2))

    report = rk.patch(model(), rk.RedConfig(sites="0.*"))
    assert report.frozen_head == ()
    fresh = model()
    with pytest.raises(ValueError, match="train_head"):
        rk.patch(fresh, rk.RedConfig(sites="0.*", train_head=True))
    assert all(own.requires_grad for own in fresh.parameters())


@pytest.mark.parametrize("value", [1, "yes", None])
def test_train_head_is_a_bool(value):
    with pytest.raises(TypeError, match="train_head"):
        rk.RedConfig(train_head=value)


def test_what_was_frozen_before():
    """A part of the head that its owner has frozen stays so; a head that is frozen whole is trained when asked for."""
    model = made("RobertaForSequenceClassification")
    model.classifier.dense.requires_grad_(False)
    rk.patch(model, rk.RedConfig(train_head=True))
    assert {name.split(".")[1] for name in head_parameters(model)} == {"out_proj"}
    model = made("RobertaForSequenceClassification").requires_grad_(False)
    rk.patch(model, rk.RedConfig(train_head=True))
    assert {name.split(".")[1] for name in head_parameters(model)} == {"dense", "out_proj"}
    rk.unpatch(model)
    assert not any(own.requires_grad for own in model.parameters())


def test_a_quantised_head_is_refused():
    model = made("BertForSequenceClassification")
    packed = nn.Parameter(torch.zeros(2, 32, dtype=torch.uint8), requires_grad=False)
    model.classifier.weight = packed
    with pytest.raises(ValueError, match=r"classifier\.weight is quantised"):
        rk.patch(model, rk.RedConfig(train_head=True))
    assert model.bert.embeddings.word_embeddings.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "LlamaForSequenceClassification"])
def test_a_head_in_half_precision_is_trained_in_fp32(name, dtype):
    model = made(name).to(dtype).eval()
    keys = list(model.state_dict())
    ids = torch.arange(3, 11)[None]
    plain = model(ids).logits
    inputs = []
    layer = next(module for module in (model.get_submodule(at) for at in HEADS[name][2]) if hasattr(module, "weight"))
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    rk.patch(model)
    model(ids)
    handle.remove()
    rk.unpatch(model)
    wide = torch.promote_types(dtype, torch.float32)
    bias = None if layer.bias is None else layer.bias.to(wide)
    wanted = nn.functional.linear(inputs[0].to(wide), layer.weight.to(wide), bias).detach()
    wanted = wanted if wanted.dim() == 2 else wanted[:, -1]
    rk.patch(model, rk.RedConfig(train_head=True))
    head = head_parameters(model)
    assert all(own.dtype == wide for own in head.values())
    body = [own for own in model.parameters() if not own.requires_grad]
    assert {own.dtype for own in body} == {dtype}
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = one(ids).logits
        assert torch.equal(found, wanted)
        found.sum().backward()
        assert all(own.grad is not None for own in head_parameters(one).values())
    rk.unpatch(model)
    assert {own.dtype for own in model.parameters()} == {dtype}
    assert list(model.state_dict()) == keys
    assert torch.equal(model(ids).logits, plain)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_parameter_beside_the_base_keeps_its_dtype():
    """The inputs of its module go to the base model as well."""
    model = Classifier(made("BertModel")).bfloat16()
    rk.patch(model, rk.RedConfig(train_head=True))
    assert model.scale.requires_grad
    assert model.scale.dtype == torch.bfloat16
    assert model.head[0].weight.dtype == torch.float32
    model(torch.arange(3, 11)[None]).sum().backward()
    assert model.scale.grad is not None


def test_the_head_of_finetune_is_that_of_a_patch():
    """`finetune` adds what the checkpoint lacked, such as a pooler; a patch may have the head trainable already."""
    first, second = (made("BertForSequenceClassification").bfloat16() for _ in range(2))
    rk.patch(first, rk.RedConfig(train_head=True))
    rk.patch(second)
    train_head(first, ["bert.pooler.dense.weight", "bert.pooler.dense.bias"])
    train_head(second, ["bert.pooler.dense.weight", "bert.pooler.dense.bias"])
    assert head_parameters(first).keys() == head_parameters(second).keys()
    assert {name.rpartition(".")[0] for name in head_parameters(first)} == {"classifier", "bert.pooler.dense"}
    for model in (first, second):
        ids = torch.arange(3, 11)[None]
        model(ids).logits.sum().backward()
        rk.unpatch(model)
        assert {own.dtype for own in model.parameters()} == {torch.bfloat16}
        assert all(own.requires_grad for own in model.parameters())


def test_red_trainer_trains_saves_and_resumes_it(tmp_path):
    """The head ends elsewhere than it began, and a run that stopped half-way ends as one that did not."""

    def run(resume=None):
        model = zoo.tiny("roberta")
        rk.patch(model, rk.RedConfig(train_head=True))
        head = head_parameters(model)
        assert head
        start = {name: own.detach().clone() for name, own in head.items()}
        optimizer = torch.optim.SGD([*listed(edit_parameters(model)), *head.values()], lr=0.1)
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=STEPS, save_steps=2, use_cpu=True, report_to="none", disable_tqdm=True,
            per_device_train_batch_size=4, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = RedTrainer(
            model=model, args=arguments, train_dataset=rows("roberta", 16), optimizers=(optimizer, None)
        )
        trainer.train(resume_from_checkpoint=resume)
        for name, own in head.items():
            assert not torch.equal(own, start[name]), name
        return model

    whole = run()
    resumed = run(str(tmp_path / "checkpoint-2"))
    for first, second in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(first, second)
