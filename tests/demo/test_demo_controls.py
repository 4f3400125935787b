"""Control arms: as many rounds on the same slices, from the same start, with nobody to learn from."""

import json
from pathlib import Path

import pytest

from fedmkt.demo import controls
from fedmkt.demo.controls import ARMS, Setting, llm_control, site_control
from fedmkt.ml.phases import own_knowledge
from fedmkt.private_set import PrivateSetTooSmall
from fedmkt.protocol import FederationConfig
from live_coordinator import stories, tiny_config
from tiny_models import save_tiny


@pytest.fixture(scope="module")
def config() -> FederationConfig:
    return tiny_config(("clinic",), lora=None)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, config: FederationConfig) -> Setting:
    folder = tmp_path_factory.mktemp("controls")
    (folder / "public.jsonl").write_bytes(stories(0, 24, domain="first"))
    (folder / "private.jsonl").write_bytes(stories(1000, 40))
    model = save_tiny(folder / "model", "llama")
    return Setting(str(model), None, folder / "public.jsonl", config, ((1, 0), (2, 1)), device="cpu")


def ignore(done: int, total: int) -> None: ...


def test_gold_labels_alone_leave_no_row_a_soft_target_and_the_party_itself_all(setting: Setting) -> None:
    party = controls._party(setting)
    for arm, supervised in (("public_only", 0.0), ("self_distillation", 1.0)):
        plan = controls._plans(setting, arm)[0]
        lesson = controls._teach(party, plan)(own_knowledge(party, plan, adapter_version=0))
        assert lesson.targets.supervised.mean() == supervised
    assert [controls._plans(setting, arm)[0].config.distillation.gold_weight for arm in ARMS] == [1.0, 0.5]


def test_arms_run_every_round_on_its_slice(setting: Setting) -> None:
    plans = controls._plans(setting, "public_only")
    assert [plan.round_number for plan in plans] == [1, 2]
    assert set(plans[0].samples).isdisjoint(plans[1].samples)


def test_the_llm_starts_each_arm_from_the_same_weights_and_ends_apart(setting: Setting) -> None:
    found = llm_control(ignore, setting)
    assert list(found) == ["public_only", "self_distillation"]
    gold, own = (found[arm] for arm in found)
    assert [len(gold), len(own)] == [2, 2]
    assert gold[0].before == own[0].before
    assert gold[1].before == gold[0].after
    assert gold[-1].after["first"].bits_per_byte != own[-1].after["first"].bits_per_byte


def test_a_site_s_first_private_training_is_shared_by_the_arms(setting: Setting) -> None:
    done: list[tuple[int, int]] = []
    private = setting.public_file.with_name("private.jsonl")
    found = site_control(lambda *step: done.append(step), setting, private, 0.25)
    gold, own = found["public_only"], found["self_distillation"]
    assert gold[0].before == own[0].before
    assert gold[-1].after != own[-1].after
    assert gold[1].before == gold[0].after  # measured before the second private training
    assert done[-1] == (5, 5)  # the first training, then two rounds in each of two arms


def test_an_arm_repeats_itself(setting: Setting) -> None:
    assert llm_control(ignore, setting) == llm_control(ignore, setting)


def test_private_text_of_a_control_arm_is_the_site_s_file(setting: Setting, tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text(json.dumps({"text": "too few"}) + "\n")
    with pytest.raises(PrivateSetTooSmall):
        site_control(ignore, setting, tmp_path / "few.jsonl", 0.25)
