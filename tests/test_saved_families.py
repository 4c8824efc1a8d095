"""What transformers saves of each family, under whatever names: found, and number for number what the model has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import FAMILIES, make

from foreshock.parameter_keys import Keys, aliases, renaming
from foreshock.saved import open_saved


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_behind_a_site_is_read_as_the_model_has_it(name: str, tmp_path: Path) -> None:
    family, model = FAMILIES[name], make(name)
    model.save_pretrained(tmp_path)
    saved, parameters = open_saved(tmp_path), dict(model.named_parameters())
    found, reasons = Keys(saved.shapes, renaming(model)).find(aliases(model))
    needed = [weight for pair in family.weights().values() for weights in pair for weight in weights]
    needed += family.router.names() if family.router is not None else []
    assert {weight: reasons[weight] for weight in needed if weight in reasons} == {}
    assert found.keys() | reasons.keys() == parameters.keys()
    for weight, key in found.items():
        [own] = saved.tensors([key]).values()
        assert torch.equal(own, parameters[weight].detach()), f"{weight} from {key}"
