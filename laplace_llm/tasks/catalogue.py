"""The registered tasks: the paper's six, its out-of-distribution sets, and two of label words.

The authors' code (see `prompts`) measures on the validation splits, ``task.rows("validation")``;
"test" is the test split here, where that has labels. It also leaves out the few rows of ARC that do
not have four choices; here they are kept, and the letters go up to E.
"""

from laplace_llm.collate import LETTERS
from laplace_llm.tasks.hub import (
    BOOLQ,
    SST2,
    TREC,
    Hub,
    boolq,
    multiple_choice,
    question_type,
    sentiment,
    winogrande,
)
from laplace_llm.tasks.prompts import BOOLQ_PROMPT, WINOGRANDE_PROMPT, Template, select_prompt
from laplace_llm.tasks.registry import Task, register_task

AB, ABCD, ABCDE = (tuple(LETTERS[:n]) for n in (2, 4, 5))


def _winogrande(config: str) -> Hub:
    return Hub("allenai/winogrande", (config,), winogrande, test="validation")


def _arc(config: str) -> Hub:
    return Hub("allenai/ai2_arc", (config,), multiple_choice)


def _mmlu(*subjects: str) -> Hub:
    return Hub("cais/mmlu", subjects, multiple_choice)


# The test splits of WinoGrande and SST-2 have no labels, and BoolQ has none.
for _task in (
    Task("winogrande-s", _winogrande("winogrande_s"), WINOGRANDE_PROMPT, AB),
    Task("winogrande-m", _winogrande("winogrande_m"), WINOGRANDE_PROMPT, AB),
    Task("arc-challenge", _arc("ARC-Challenge"), select_prompt, ABCDE),
    Task("arc-easy", _arc("ARC-Easy"), select_prompt, ABCDE),
    Task(
        "openbookqa", Hub("allenai/openbookqa", ("main",), multiple_choice), select_prompt, ABCD
    ),
    Task("boolq", Hub("google/boolq", (None,), boolq, test="validation"), BOOLQ_PROMPT, BOOLQ),
    # The groups of subjects of the paper's appendix. They have no training rows.
    Task(
        "mmlu-cs",
        _mmlu(
            "college_computer_science", "computer_security", "high_school_computer_science",
            "machine_learning",
        ),
        select_prompt,
        ABCD,
    ),
    Task("mmlu-engineering", _mmlu("electrical_engineering"), select_prompt, ABCD),
    Task(
        "mmlu-law",
        _mmlu("international_law", "jurisprudence", "professional_law"),
        select_prompt,
        ABCD,
    ),
    Task(
        "mmlu-health",
        _mmlu(
            "anatomy", "clinical_knowledge", "college_medicine", "human_aging", "nutrition",
            "professional_medicine", "virology",
        ),
        select_prompt,
        ABCD,
    ),
    Task(
        "trec",
        Hub("CogComp/trec", (None,), question_type),
        Template("Question: {question}\nThe answer is a"),
        TREC,
    ),
    Task(
        "sst2",
        Hub("stanfordnlp/sst2", (None,), sentiment, test="validation"),
        Template("Review: {question}\nSentiment:"),
        SST2,
    ),
):  # fmt: skip
    register_task(_task)
