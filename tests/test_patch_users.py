"""What users do to a model before or after it is patched: layers of their own, wrappers, two patches, an interrupt."""

from __future__ import annotations

import model_zoo as zoo
import pytest
import torch
from torch import nn

from red_kernels.config import RedConfig
from red_kernels.patch import edit_parameters, patch


class Wrapped(nn.Module):
    """A wrapper around a layer, which may change what comes out in place, or keep it."""

    def __init__(self, layer: nn.Module, shift: float = 0.0) -> None:
        super().__init__()
        self.layer, self.shift = layer, shift

    def forward(self, *args, **kwargs):
        z = self.layer(*args, **kwargs)
        if self.shift:
            z += self.shift
        self.seen = z
        return z


def test_the_same_layer_twice():
    """It would be edited in both places, whichever of them was asked for."""
    for config in (RedConfig(), RedConfig(layers=[1])):
        model = zoo.tiny("llama")
        model.model.layers[1] = model.model.layers[0]
        with pytest.raises(ValueError, match=r"model.layers.0 and model.layers.1 are the same module"):
            patch(model, config)
        assert not any("red_edit" in name for name, _ in model.named_modules())


def test_sites_of_another_type():
    with pytest.raises(TypeError, match="sites: got 5, expected a glob"):
        RedConfig(sites=5)


def test_patching_inside_inference_mode():
    model = zoo.tiny("llama")
    with torch.inference_mode():
        patch(model, RedConfig())
    vectors = [vector for parts in edit_parameters(model).values() for vector in parts.values()]
    assert not any(vector.is_inference() for vector in vectors)
    model(**zoo.inputs("llama")).loss.backward()
    assert all(vector.grad is not None for vector in vectors)


def test_a_wrapped_layer_beside_known_ones():
    """Nothing may be left out silently."""
    model = zoo.tiny("llama", num_hidden_layers=4)
    for index in (1, 3):
        model.model.layers[index] = Wrapped(model.model.layers[index])
    for config in (RedConfig(), RedConfig(layers=[0, 1])):
        with pytest.raises(ValueError, match=r"model.layers.1 \(Wrapped\).*before wrapping.*layers=.*sites="):
            patch(model, config)
    assert not any("red_edit" in name for name, _ in model.named_modules())
    with pytest.warns(UserWarning, match=r"not edited.*model.layers.1 \(Wrapped\), model.layers.3 \(Wrapped\)"):
        report = patch(model, RedConfig(layers=[0, 2]))
    assert "model.layers.3 (Wrapped)" in str(report)
    assert list(edit_parameters(model)) == ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"]


def test_a_layer_taken_out_of_the_list():
    """What has no linear layers has nothing to edit."""
    model = zoo.tiny("llama")
    model.model.layers[1] = nn.Identity()
    assert len(patch(model, RedConfig()).sites) == zoo.LAYERS - 1
