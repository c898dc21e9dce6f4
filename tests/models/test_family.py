"""Every class in the registry has a family, which is the record of its kind."""

import pytest

from gadjax.models.config import BackboneConfig
from gadjax.models.family import Autoencoder, Backbone, TextEncoder
from gadjax.models.keymap import KeyMap
from gadjax.models.registry import COMPONENTS, family_of

KINDS = {"vae": Autoencoder, "text": TextEncoder}


@pytest.mark.parametrize("name", COMPONENTS)
def test_family_is_the_record_of_its_kind(name):
    family, package = family_of(name), COMPONENTS[name].split(".")[2]
    assert type(family) is KINDS.get(package, Backbone)
    assert name in family.class_names
    assert callable(family.keymap) != isinstance(family.keymap, KeyMap)
    assert issubclass(family.config, BackboneConfig) == (type(family) is Backbone)
