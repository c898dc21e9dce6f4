import numpy as np
import pytest
from tiny_run import config_file

from gadjax.data.source import PromptSource
from gadjax.data.versions import check_versions, matching, versions
from gadjax.errors import InputError
from gadjax.training.config import default_config, read_config
from gadjax.training.data import open_data
from gadjax.training.setup import prepare

PROMPTS = ["a red circle", "a blue square", "a red square"]


def data(**options):
    config = default_config().data
    config.update(prompts="p.txt", **options)
    return config


def tokenize(prompts):
    ids = np.array([[len(prompt), hash(prompt) % 97] for prompt in prompts])
    return ids, np.ones_like(ids)


def test_prompts_are_those_in_which_the_regex_matches():
    assert matching(PROMPTS, "") == PROMPTS and matching(PROMPTS, "red|nothing") == PROMPTS[::2]


def test_words_to_forget_are_replaced_and_labelled():
    prompts, arrays = versions(PROMPTS, data(forget="red", replacement="green"), tokenize)
    assert prompts == PROMPTS and arrays["label"].tolist() == [1, 0, 1]
    expected = tokenize(["a green circle", "a blue square", "a green square"])
    assert np.array_equal(arrays["override_ids"], expected[0])


def test_every_prompt_has_every_style_and_its_teacher_none():
    prompts, arrays = versions(PROMPTS, data(styles=("", ", in ink")), tokenize)
    assert prompts == PROMPTS + [f"{prompt}, in ink" for prompt in PROMPTS]
    assert arrays["label"].tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(arrays["override_ids"], tokenize(PROMPTS * 2)[0])


def test_a_source_keeps_both_versions_of_a_prompt_together():
    prompts, arrays = versions(PROMPTS, data(styles=("", ", in ink")), tokenize)
    rows = PromptSource(*tokenize(prompts), 0, arrays).batch(0, 6)
    assert rows["label"].tolist() == [which // 3 for which in rows["which"]]
    assert rows["override_ids"].tolist() == tokenize(PROMPTS * 2)[0][rows["which"]].tolist()


def test_without_such_options_the_source_is_as_it_was():
    prompts, arrays = versions(PROMPTS, data(), tokenize)
    assert prompts == PROMPTS and arrays is None
    assert set(PromptSource(*tokenize(prompts), 0).batch(0, 2)) == {"ids", "mask", "which"}


def test_a_run_encodes_both_versions(tmp_path):
    path = config_file(
        tmp_path / "config.py",
        teacher="asset:shapes_teacher",
        objective={"sfd": {}},
        data={"prompts": "asset:shapes_prompts.txt", "forget": "red", "replacement": "blue"},
    )
    config = read_config(["--config", str(path)])
    run = prepare(config, abstract=True)
    rows = open_data(config, run.pipeline)[0].batch(0, 64)
    differ = (rows["ids"] != rows["override_ids"]).any(1)
    assert np.array_equal(differ, rows["label"] == 1) and 0 < differ.sum() < 64
    config.data.forget = ""
    config.data.replacement = ""
    with pytest.raises(InputError, match="data.forget: found nothing; expected it set for this"):
        prepare(config, abstract=True)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"match": "("}, "data.match: found '\\(' .* expected a regex"),
        ({"forget": "x", "styles": ("a", "b")}, "data.styles: found it beside data.forget"),
        ({"replacement": "x"}, "data.replacement: found it without data.forget"),
        ({"styles": ("a",)}, "data.styles: found .* two different texts or more"),
        ({"styles": ("a", "a", "b")}, "data.styles: found .* two different texts or more"),
        ({"prompts": "", "match": "x"}, "data.match: found it without data.prompts"),
    ],
)
def test_bad_options(options, message):
    config = data()
    config.update(options)
    with pytest.raises(InputError, match=message):
        check_versions(config)


def test_words_or_patterns_in_no_prompt_are_refused():
    with pytest.raises(InputError, match="data.forget: found 'pink' in none of 3 prompts"):
        versions(PROMPTS, data(forget="pink"), tokenize)
    with pytest.raises(InputError, match="data.match: found 'pink', which matches none of 3"):
        matching(PROMPTS, "pink")
