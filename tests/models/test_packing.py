"""A model that would mix packed documents is noticed, and refused where nothing helps."""

from __future__ import annotations

import pytest
import torch

from ftrun.errors import ConfigError
from ftrun.models.architecture import describe
from ftrun.models.packing import find_way


def backbone(model):
    return model.get_submodule(describe(model).backbone)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gpt_neox"])
def test_positions_are_enough(make, family):
    model = make(family)
    assert find_way(model, backbone(model)) == "positions"


def test_opt_needs_the_mask(make):
    model = make("opt")
    assert find_way(model, backbone(model)) == "mask"


def test_a_model_that_mixes_documents_is_refused(make):
    model = make("llama")
    decoder = backbone(model)
    plain = decoder.forward

    def forgetful(input_ids, use_cache, position_ids=None, attention_mask=None):
        return plain(input_ids=input_ids, use_cache=use_cache)

    decoder.forward = forgetful
    with pytest.raises(ConfigError, match="mixes the documents"):
        find_way(model, decoder)


def test_a_window_leaves_no_second_way(make):
    """A mask of ours would replace the windowed one too: where positions fail, such a model is refused."""
    model = make("mistral")
    decoder = backbone(model)
    plain = decoder.forward
    decoder.forward = lambda position_ids=None, **inputs: plain(**inputs)
    with pytest.raises(ConfigError, match="mixes the documents"):
        find_way(model, decoder)


def test_trying_leaves_the_model_as_it_was(make):
    model = make("gpt2").train()
    state = torch.get_rng_state()
    find_way(model, backbone(model))
    assert all(module.training for module in model.modules()) and torch.equal(state, torch.get_rng_state())
