"""Tasks: the paper's prompts letter by letter, rows of files and of the Hub, tasks of one's own."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from models import tiny_llama, tiny_tokenizer
from torch.utils.data import DataLoader

import laplace_llm
from laplace_llm import MultipleChoiceCollator, MultipleChoiceHead, letter_prompt
from laplace_llm.errors import DataError, OptionError
from laplace_llm.tasks import (
    Hub,
    Task,
    Template,
    load_task,
    read_jsonl,
    register_task,
    registered_tasks,
    registry,
)

# Rows in the form that the Hub's data sets have; the sentences are made up.
BLANK = {
    "sentence": "The ball did not fit the box because the _ was too big.",
    "option1": "ball",
    "option2": "box",
    "answer": "1",
}
ARC = {
    "id": "row_1",
    "question": "Which is a metal?",
    "choices": {"text": ["iron", "Wood.", "glass", "wool"], "label": ["A", "B", "C", "D"]},
    "answerKey": "A",
}
NUMBERED = {
    "id": "row_2",
    "question": "Which is hot?",
    "choices": {"text": ["ice", "fire", "snow"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
OPENBOOK = {
    "id": "7-1",
    "question_stem": "The sun is a",
    "choices": {"text": ["star", "moon", "comet", "cloud"], "label": ["A", "B", "C", "D"]},
    "answerKey": "A",
}
YES_OR_NO = {
    "question": "is the sky blue",
    "answer": True,
    "passage": "Seen from the ground, the sky is blue {by day}.",
}
MMLU = {
    "question": "What is 1 + 1?",
    "subject": "anatomy",
    "choices": ["0", "1", "2", "3"],
    "answer": 2,
}
ROW = {"question": "what colour is the sky ?", "choices": ["blue", "green"], "answer": 0}


@pytest.fixture
def hub(monkeypatch):
    """Put rows in the place of the Hub; returns what it was asked for."""
    asked, rows = [], []

    def load_dataset(path, name=None, *, split):
        asked.append((path, name, split))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return SimpleNamespace(asked=asked, rows=rows)


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    """Tasks registered in a test are gone after it."""
    monkeypatch.setattr(registry, "_TASKS", dict(registry._TASKS))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# The paper's six, from the Hub to the prompt ------------------------------------------------------

SELECT = "Select one of the choices that answers the following question: "
BLANK_TEXT = SELECT + (
    "The ball did not fit the box because the _ was too big. "
    "Choices: A. ball. B box. Answer:"
)  # fmt: skip
ARC_TEXT = SELECT + "Which is a metal? Choices: A. Iron. B. Wood. C. Glass. D. Wool. Answer:"
PAPER = [
    ("winogrande-s", "allenai/winogrande", "winogrande_s", "validation", BLANK, 0, BLANK_TEXT),
    ("winogrande-m", "allenai/winogrande", "winogrande_m", "validation", BLANK, 0, BLANK_TEXT),
    ("arc-challenge", "allenai/ai2_arc", "ARC-Challenge", "test", ARC, 0, ARC_TEXT),
    (
        "arc-easy", "allenai/ai2_arc", "ARC-Easy", "test", NUMBERED, 1,
        SELECT + "Which is hot? Choices: A. Ice. B. Fire. C. Snow. Answer:",
    ),
    (
        "openbookqa", "allenai/openbookqa", "main", "test", OPENBOOK, 0,
        SELECT + "The sun is a Choices: A. Star. B. Moon. C. Comet. D. Cloud. Answer:",
    ),
    (
        "boolq", "google/boolq", None, "validation", YES_OR_NO, 1,
        "Answer the question with only True or False: is the sky blue "
        "Context: Seen from the ground, the sky is blue {by day}.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dataset", "config", "test", "theirs", "answer", "text"),
    PAPER,
    ids=[case[0] for case in PAPER],
)
def test_the_papers_tasks(hub, name, dataset, config, test, theirs, answer, text):
    hub.rows.append(theirs)
    task = load_task(name)
    (row,) = task.rows("test")
    assert task.rows() == task.rows("train") == [row]
    assert hub.asked == [(dataset, config, test), *[(dataset, config, "train")] * 2]
    assert task.prompt(row) == text
    assert row["answer"] == answer
    assert len(row["choices"]) <= len(task.choices)


def test_letters_go_as_far_as_the_widest_rows():
    lengths = {name: len(task.choices) for name, task in registered_tasks().items()}
    assert [lengths[name] for name, *_ in PAPER] == [2, 2, 5, 5, 4, 2]
    assert load_task("boolq").choices == ("False", "True")
    assert load_task("arc-easy").choices == tuple("ABCDE")


def test_the_other_tasks(hub):
    theirs = {
        "trec": {"text": "q", "coarse_label": 3, "fine_label": 5},
        "sst2": {"idx": 0, "sentence": "q", "label": 1},
        **{f"mmlu-{group}": MMLU for group in ("cs", "engineering", "law", "health")},
    }
    for name, row in theirs.items():
        hub.rows[:] = [row]
        task = load_task(name)
        found = task.rows("test")
        assert len(found) == len(task.source.configs)
        expected = {"trec": "person", "sst2": "positive"}.get(name, "2")
        assert found[0]["choices"][found[0]["answer"]] == expected
    assert [len(load_task(f"mmlu-{group}").source.configs) for group in ("cs", "health")] == [4, 7]
    assert load_task("trec").prompt({"question": "q"}) == "Question: q\nThe answer is a"
    assert load_task("sst2").prompt({"question": "q"}) == "Review: q\nSentiment:"


def test_rows_as_the_package_datasets_gives_them(monkeypatch):
    datasets = pytest.importorskip("datasets")
    text = datasets.Value("string")
    choices = datasets.Sequence({"text": text, "label": text})
    features = {"id": text, "question": text, "choices": choices, "answerKey": text}
    arc = datasets.Dataset.from_list([ARC, NUMBERED], features=datasets.Features(features))
    boolq = datasets.Dataset.from_list([YES_OR_NO, {**YES_OR_NO, "answer": False}])
    found = {"allenai/ai2_arc": arc, "google/boolq": boolq}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, *, split: found[path])
    assert [row["answer"] for row in load_task("arc-easy").rows()] == [0, 1]
    assert load_task("arc-easy").rows()[1]["choices"] == ["ice", "fire", "snow"]
    assert [row["answer"] for row in load_task("boolq").rows("test")] == [1, 0]


def test_the_hubs_other_splits_are_asked_for_as_they_are(hub):
    load_task("arc-easy").rows("validation")
    assert hub.asked == [("allenai/ai2_arc", "ARC-Easy", "validation")]


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("winogrande-s", {**BLANK, "answer": ""}),  # as in its test split
        ("arc-easy", {**ARC, "answerKey": "E"}),
        ("boolq", {"question": "q", "answer": "maybe", "passage": "p"}),
        ("boolq", {"question": "q", "label": 1, "passage": "p"}),
        ("sst2", {"sentence": "q", "label": None}),
    ],
)
def test_a_row_of_the_hub_that_cannot_be_read_is_shown(hub, name, theirs):
    hub.rows.append(theirs)
    with pytest.raises(DataError, match=r"row 0 of 'train' is \{"):
        load_task(name).rows("train")


def test_what_the_hub_says_is_passed_on(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        DataError, match=r"'google/boolq' from the Hub.*ConnectionError: no network"
    ):
        load_task("boolq").rows()
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if not installed
    with pytest.raises(DataError, match="pip install datasets"):
        load_task("boolq").rows()


# Files --------------------------------------------------------------------------------------------


def test_rows_of_a_folder_and_of_a_path(tmp_path):
    task = load_task("winogrande-s", data=tmp_path)
    write(tmp_path / "winogrande-s.train.jsonl", ROW, ROW)
    write(tmp_path / "winogrande-s.test.jsonl", ROW)
    write(tmp_path / "mine.test.jsonl", {**ROW, "source": "me"})
    assert (task.rows("train"), task.rows("test")) == ([ROW, ROW], [ROW])
    assert task.prompt is load_task("winogrande-s").prompt
    own = load_task("winogrande-s", data=f"{tmp_path}/mine.{{split}}.jsonl")
    assert own.rows("test") == [{**ROW, "source": "me"}]
    with pytest.raises(DataError, match=r"there is no .*mine\.train\.jsonl"):
        own.rows("train")
    with pytest.raises(OptionError, match=r"Expected data to be a folder.*no such folder"):
        load_task("winogrande-s", data="no such folder")
    assert load_task("winogrande-s").source.dataset == "allenai/winogrande"


def test_blank_lines_and_rows_without_an_answer_are_fine(tmp_path):
    unlabelled = {key: ROW[key] for key in ("question", "choices")}
    path = write(tmp_path / "rows.jsonl", ROW, unlabelled)
    path.write_text(path.read_text().replace("\n", "\n\n"))
    assert read_jsonl(path) == read_jsonl(str(path)) == [ROW, unlabelled]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": ', "Expecting value"),
        ("[1, 2]", "of type list"),
        ('{"choices": ["a", "b"]}', "its question is None"),
        ('{"question": "q"}', "its choices are None"),
        ('{"question": "q", "choices": "ab"}', "its choices are 'ab'"),
        ('{"question": "q", "choices": ["a", 2]}', r"its choices are \['a', 2\]"),
        ('{"question": "q", "choices": ["a"]}', "it has 1 choices"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "its answer 2 is not an index"),
        ('{"question": "q", "choices": ["a", "b"], "answer": "b"}', "its answer 'b'"),
        ('{"question": "q", "choices": ["a", "b"], "answer": true}', "its answer True"),
        ('{"question": "q", "choices": ["a", "b"], "answer": null}', "its answer None"),
    ],
)
def test_a_malformed_row_is_named_with_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "mine.train.jsonl", ROW)
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(DataError, match=rf"mine\.train\.jsonl, line 3, but .*{message}"):
        Task("mine", tmp_path / "mine.{split}.jsonl").rows()


# Tasks of one's own -------------------------------------------------------------------------------


def test_a_registered_task_from_its_file_to_the_posterior(tmp_path):
    rows = [{**ROW, "answer": n % 2, "where": "the sea"} for n in range(5)]
    write(tmp_path / "mine.train.jsonl", *rows)
    prompt = Template("what colour is {where} ?")
    register_task(Task("mine", tmp_path / "mine.{split}.jsonl", prompt, ("blue", "green")))
    task, tokenizer = load_task("mine"), tiny_tokenizer()
    collate = MultipleChoiceCollator(tokenizer, task.prompt)
    head = MultipleChoiceHead.from_tokenizer(tiny_llama(), tokenizer, task.choices)
    loader = DataLoader(task.rows("train"), batch_size=2, collate_fn=collate)
    la = laplace_llm.Laplace(head)
    la.fit(loader)
    assert la.n_data == 5
    batch = next(iter(loader))
    assert batch["labels"].tolist() == [0, 1]
    assert tokenizer.decode(batch["input_ids"][0]) == "what colour is the sea ?"
    expected = tokenizer.convert_tokens_to_ids(["blue", "green"])
    assert list(head.choice_token_ids) == expected
    torch.testing.assert_close(la(batch).sum(-1), torch.ones(2, dtype=torch.float64))


def test_a_task_may_have_any_function_as_source():
    task = register_task(Task("mine", lambda split: iter([ROW] * len(split))))
    assert load_task("mine") is task
    assert load_task("mine").rows("test") == [ROW] * 4
    assert (task.prompt, task.choices) == (letter_prompt, ("A", "B", "C", "D"))
    assert load_task("mine", data="{split}.jsonl").source == "{split}.jsonl"


def test_several_configurations_are_one_task(hub):
    hub.rows.append(MMLU)
    source = Hub("cais/mmlu", ("anatomy", "virology"), load_task("mmlu-cs").source.read)
    assert len(Task("two", source).rows("test")) == 2
    assert [config for _, config, _ in hub.asked] == ["anatomy", "virology"]


def test_registering_again_replaces():
    before = registered_tasks()
    register_task(Task("boolq", "{split}.jsonl"))
    assert load_task("boolq").prompt is letter_prompt
    assert registered_tasks().keys() == before.keys()


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(OptionError, match=r"arc-challenge.*winogrande-m.*got 'winogrande'"):
        load_task("winogrande")


def test_rows_that_are_not_the_tasks_are_refused():
    words = Task("words", lambda split: [ROW], choices=("green", "blue"))
    with pytest.raises(DataError, match=r"'words' to be \('green', 'blue'\), but row 0 of 'train'"):
        words.rows("train")
    wide = {**ROW, "choices": list("abc")}
    with pytest.raises(DataError, match="at most 2, but row 1 of 'test'"):
        Task("narrow", lambda split: [ROW, wide], choices=("A", "B")).rows("test")


@pytest.mark.parametrize("choices", [(), ("yes",), "AB"])
def test_a_task_has_at_least_two_choices(choices):
    with pytest.raises(OptionError, match="at least two letters or words"):
        Task("mine", "{split}.jsonl", choices=choices)


def test_a_path_says_where_the_split_goes():
    with pytest.raises(OptionError, match=r"Expected \{split\} in the path.*'mine.jsonl'"):
        Task("mine", "mine.jsonl")


def test_a_prompt_names_the_field_that_a_row_lacks():
    with pytest.raises(DataError, match=r"'answer', 'choices', 'question'.*KeyError\('passage'\)"):
        load_task("boolq").prompt(ROW)
    with pytest.raises(DataError, match=r"1 choices .*IndexError"):
        load_task("winogrande-s").prompt({**ROW, "choices": ["a"]})
    assert Template('{{"q": "{question}"}}')({"question": "{x}"}) == '{"q": "{x}"}'
    with pytest.raises(DataError, match="at most 26 choices"):
        load_task("openbookqa").prompt({**ROW, "choices": ["a"] * 27})
