"""FacT as a member of PEFT's enum and mappings, and its config as a citizen of JSON and pickle."""

import copy
import importlib
import json
import pickle
import textwrap

import pytest
from peft import PeftConfig, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType

import fact_peft
from fact_peft import FacTConfig, FacTModel

pytestmark = pytest.mark.compatibility


def test_member_is_a_real_one():
    fact = PeftType.FACT
    assert fact is PeftType("FACT") is PeftType["FACT"] and isinstance(fact, PeftType) and fact == "FACT"
    assert (fact.name, fact.value) == ("FACT", "FACT")
    assert list(PeftType).count(fact) == 1 and list(PeftType)[-1] is fact and fact in PeftType
    assert pickle.loads(pickle.dumps(fact)) is fact and copy.deepcopy(fact) is fact
    assert repr(fact) == repr(PeftType.LORA).replace("LORA", "FACT")
    assert str(fact) == str(PeftType.LORA).replace("LORA", "FACT")
    assert json.dumps({"peft_type": fact}) == '{"peft_type": "FACT"}'
    assert len({PeftType.LORA, fact}) == 2


def test_mappings_know_the_method():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.FACT] is FacTConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.FACT] is FacTModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.FACT] == "fact_"


@pytest.fixture
def run(fork, tmp_path):
    """Run code that imports fact_peft for the first time; returns what it prints."""

    def run(code):
        status, output = fork(textwrap.dedent(code), tmp_path)
        assert status == 0, output
        return output

    return run


def test_importing_again_registers_the_new_classes(run):
    run(
        """
        import sys, fact_peft
        from peft import get_peft_config
        for name in [name for name in sys.modules if name.startswith("fact_peft")]:
            del sys.modules[name]
        import fact_peft as again
        assert again is not fact_peft
        assert type(get_peft_config({"peft_type": "FACT"})) is again.FacTConfig
        """
    )


def test_reload_is_harmless():
    importlib.reload(fact_peft)
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.FACT] is FacTModel


def test_stands_aside_for_a_method_of_the_same_name(run):
    run(
        """
        import warnings
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
        from peft.tuners import LoraConfig, LoraModel
        from peft.utils.peft_types import PeftType, register_peft_method
        from types import SimpleNamespace
        # What a PEFT with a method of its own would look like.
        member = str.__new__(PeftType, "FACT")
        member._name_ = member._value_ = "FACT"
        PeftType._member_names_.append("FACT")
        PeftType._member_map_["FACT"] = PeftType._value2member_map_["FACT"] = member
        type.__setattr__(PeftType, "FACT", member)
        theirs = type("FacTModel", (LoraModel,), {"prefix": "fact_", "__module__": "peft.tuners.fact"})
        register_peft_method(name="fact", config_cls=LoraConfig, model_cls=theirs)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import fact_peft
        assert any("peft.tuners.fact already provides PeftType.FACT" in str(w.message) for w in caught), caught
        assert PEFT_TYPE_TO_TUNER_MAPPING[member] is theirs
        """
    )


def test_a_pickled_config_brings_the_registration_along(run, tmp_path):
    file = tmp_path / "config.pkl"
    file.write_bytes(pickle.dumps(FacTConfig(rank=5)))
    assert run(f"import pickle; print(pickle.load(open({str(file)!r}, 'rb')).rank)").splitlines()[-1] == "5"


def test_config_round_trips(tmp_path):
    config = FacTConfig(
        rank=5,
        decomposition="tk",
        scale=10,
        fact_dropout=0.1,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[0, 2],
        modules_to_save=[],
        init_weights=False,
    )
    config.save_pretrained(tmp_path)
    for other in (
        PeftConfig.from_pretrained(tmp_path),
        FacTConfig.from_pretrained(tmp_path),
        get_peft_config(config.to_dict()),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
    ):
        assert type(other) is FacTConfig and other == config


def test_unknown_fields_of_a_later_version_are_ignored(tmp_path):
    FacTConfig(rank=3).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "invented_later": 1}))
    with pytest.warns(UserWarning, match="Unexpected keyword arguments .'invented_later'."):
        assert PeftConfig.from_pretrained(tmp_path).rank == 3
